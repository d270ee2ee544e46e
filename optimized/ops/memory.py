"""Memory. See `arbitor.reference.ops.memory`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels import memory as kernels
from arbitor.optimized.kernels.launch import may_look_at_values, same_device, values_between
from arbitor.optimized.ops.layout import deliver_table, table_target
from arbitor.optimized.ops.op import op
from arbitor.reference import checks

__all__ = ["ngram_rows", "touch_strengths"]


@op()
def ngram_rows(
    codes_BP: Tensor, *, order: int, num_rows: int, salt: int, previous: Tensor | None = None
) -> Tensor:
    """See reference."""
    checks.ngrams(codes_BP, order, num_rows, salt, previous)
    for name, codes in (("codes_BP", codes_BP), ("previous", previous)):
        if codes is not None:
            values_between(name, codes, -1, 2**32 - 1)
    return kernels.ngram_rows(codes_BP, previous, order, num_rows, salt)


@op()
def touch_strengths(
    strengths: Tensor,
    rows: Tensor,
    *,
    gain: int,
    first: int | Tensor,
    window: int,
    shift: int,
    out: Tensor | None = None,
) -> Tensor:
    """See reference."""
    checks.strengths_of(strengths, out)
    checks.dtype_in("rows", rows, (torch.int64,))
    checks.same_device(strengths=strengths, rows=rows)
    checks.strength_rule(gain, shift)
    checks.code_window(strengths.numel(), first, window, values=may_look_at_values(first))
    same_device("first", first, strengths.device)
    values_between("rows", rows, -1, strengths.numel() - 1)
    target = table_target(strengths, out)
    kernels.touch_(target, rows.reshape(-1), gain, first, window, shift)
    return deliver_table(target, out)
