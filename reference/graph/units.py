"""What heads do to vectors without a weight: scale their rows to unit size."""

from __future__ import annotations

from torch import Tensor

from arbitor.reference.constants import DEFAULT_EPS
from arbitor.reference.dtypes import widened


def unit_rows(x: Tensor) -> Tensor:
    """Return x with rows of root mean square 1: RMSNorm without a weight. Computed in float32 or better.

    Heads whose weight counts the seeds give to the last one have no room for the ones of a frozen norm, which would
    change nothing.
    """
    wide = widened(x)
    return (wide / (wide.square().mean(dim=-1, keepdim=True) + DEFAULT_EPS).sqrt()).to(x.dtype)
