"""What heads do to vectors without a weight: scale rows to unit size, widen results."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference.constants import DEFAULT_EPS


def widened(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Return x with rows of root mean square 1: RMSNorm without a weight. Computed in float32 or better.

    Heads whose weight counts the seeds give to the last one have no room for the ones of a frozen norm, which would
    change nothing.
    """
    wide = widened(x)
    return (wide / (wide.square().mean(dim=-1, keepdim=True) + DEFAULT_EPS).sqrt()).to(x.dtype)
