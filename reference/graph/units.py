"""What heads do to vectors without a weight: scale their rows to unit size."""

from __future__ import annotations

from torch import Tensor

from arbitor.reference.dtypes import widened
from arbitor.reference.ops import norm


def unit_rows(x: Tensor) -> Tensor:
    """Return x with rows of root mean square 1: RMSNorm without a weight. Computed in float32 or better.

    Heads whose weight counts the seeds give to the last one have no room for the ones of a frozen norm, which would
    change nothing.
    """
    return norm.unit_rows(widened(x)).to(x.dtype)
