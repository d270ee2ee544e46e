"""The dtypes in which sums run and come out. They run in float64 for float64, in float32 for every narrower float."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over `x` run: float64 for float64, float32 for float32 and bfloat16."""
    return torch.promote_types(x.dtype, torch.float32)


def sum_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over `x` are rounded to where `dtype` is asked for: sums over float64 stay float64."""
    return x.dtype if x.dtype is torch.float64 else dtype


def widened(x: Tensor) -> Tensor:
    """Return `x` in the dtype in which sums over it run."""
    return x.to(wide_dtype(x))
