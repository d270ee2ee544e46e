"""N-grams of codes, and strengths of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import integer
from arbitor.reference.checks.tensors import dtype_in, same_device, tensor
from arbitor.reference.constants import MAX_ORDER, STRENGTH_MAX


def ngrams(codes_BP: Tensor, order: int, num_rows: int, salt: int, previous: Tensor | None) -> None:
    """Refuse codes that are not int64 [B, P], an order, table or salt out of range, or previous codes that do not fit."""
    dtype_in("codes_BP", codes_BP, (torch.int64,))
    if codes_BP.ndim != 2:
        raise ValueError(f"codes_BP has shape {tuple(codes_BP.shape)}, but must be [batch, positions]")
    integer("order", order, 1, MAX_ORDER)
    integer("num_rows", num_rows, 1, 2**31 - 1)
    integer("salt", salt, 0, 2**32 - 1)
    if previous is not None:
        tensor("previous", previous, torch.int64, (codes_BP.shape[0], order - 1))
        same_device(codes_BP=codes_BP, previous=previous)


def strengths_of(strengths: Tensor, out: Tensor | None) -> None:
    """Refuse strengths that are not int8 [N], or an `out` that they do not fit."""
    dtype_in("strengths", strengths, (torch.int8,))
    if strengths.ndim != 1 or strengths.numel() == 0:
        raise ValueError(
            f"strengths has shape {tuple(strengths.shape)}, but must be one-dimensional with at least one row"
        )
    if out is not None:
        tensor("out", out, torch.int8, strengths.shape)
        same_device(strengths=strengths, out=out)


def strength_rule(gain: int, shift: int) -> None:
    """Refuse a gain or a shift that is out of range."""
    integer("gain", gain, 0, STRENGTH_MAX)
    integer("shift", shift, 0, 7)
