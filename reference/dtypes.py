"""The dtype in which sums run: float64 for float64, float32 for every narrower float."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over `x` run: float64 for float64, float32 for float32 and bfloat16."""
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """Return `x` in the dtype in which sums over it run."""
    return x.to(wide_dtype(x))
