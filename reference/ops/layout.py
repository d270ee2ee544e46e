"""Layout: how an op set keeps a weight in memory. The reference computes on the canonical form itself.

Both functions exist so that one graph can run on either op set. `optimized` converts to a device layout and back.
"""

from __future__ import annotations

from arbitor.reference.promises import is_weight, op
from arbitor.reference.types import TernaryWeight

__all__ = ["from_spec", "to_spec"]


@op
def from_spec(weight: TernaryWeight) -> TernaryWeight:
    """Return the weight in the form that these ops compute on: the canonical form, unchanged."""
    is_weight("weight", weight)
    return weight


@op
def to_spec(weight: TernaryWeight) -> TernaryWeight:
    """Return the weight in canonical form, unchanged; the inverse of `from_spec`."""
    is_weight("weight", weight)
    return weight
