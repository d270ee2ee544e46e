"""Rows of unit size, which heads make without a weight."""

from __future__ import annotations

from torch import Tensor

from arbitor.reference.dtypes import widened
from arbitor.reference.ops import norm


def unit_rows(x: Tensor) -> Tensor:
    """Return x with rows of root mean square 1: RMSNorm without a weight. Computed in float32 or better.

    The seeds give the exact number of weights of some heads, which leaves no room for the weight of a norm. A frozen norm of ones
    would give the same result.
    """
    return norm.unit_rows(widened(x)).to(x.dtype)
