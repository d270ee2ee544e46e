"""Dither. See `arbitor.reference.ops.dither`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels import dither
from arbitor.optimized.kernels.launch import Clock, values_between
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import RESERVED_STEP

__all__ = ["dither_bytes"]


@op()
def dither_bytes(
    group_ids: Tensor, *, group_size: int, seed: int, step: int | Tensor, tensor_id: int
) -> Tensor:
    """See reference."""
    checks.dtype_in("group_ids", group_ids, (torch.int64,))
    values_between("group_ids", group_ids, 0, 2**32 - 1)
    checks.group_size(group_size)
    return dither.dither(
        group_ids, group_size, Clock.of(seed, step, tensor_id, group_ids.device, last_step=RESERVED_STEP)
    )
