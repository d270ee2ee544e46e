"""Helpers for the rows of several families: sizes, and the least bytes and operations of weights, votes and linears."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from arbitor.reference.constants import groups_per_row, packed_bytes
from arbitor.reference.op_table.row import Shape

PHILOX_OPS = 100
"""Integer operations of one Philox4x32-10 call: ten rounds of 4 half products, 4 exclusive ors, 2 sums."""

PHILOX_BYTES = 16
"""Dither bytes from one Philox call."""


def sizes(**by_name: Shape) -> Mapping[str, Shape]:
    """Return a read-only mapping of named shapes; a leading underscore lets a name start with a digit."""
    return MappingProxyType(
        {name.removeprefix("_"): MappingProxyType(dict(sizes)) for name, sizes in by_name.items()}
    )


def elements(s: Shape) -> int:
    """Return the elements of a weight."""
    return s["N"] * s["K"]


def groups(s: Shape) -> int:
    """Return the groups of a weight."""
    return s["N"] * groups_per_row(s["K"], s["G"])


def packed(s: Shape) -> int:
    """Return the bytes of a weight's packed trits."""
    return packed_bytes(elements(s))


def values(s: Shape) -> int:
    """Return the bytes of what a forward pass reads of a weight: packed trits and exponents."""
    return packed(s) + groups(s)


def state(s: Shape) -> int:
    """Return the canonical bytes of a weight: trits, exponents and both accumulators."""
    return values(s) + elements(s) + groups(s)


def dither_ops(groups: int, group_size: int) -> int:
    """Return the operations that dither `groups` groups: whole Philox calls for G places and the exponent."""
    return groups * (group_size // PHILOX_BYTES + 1) * PHILOX_OPS


def linear_activations(s: Shape) -> int:
    """Return the bytes of a linear's input and output (or of their gradients)."""
    return s["float_bytes"] * s["M"] * (s["N"] + s["K"])


def linear_ops(s: Shape) -> int:
    """Return the operations of a linear, or of one of its gradients."""
    return 2 * s["M"] * s["N"] * s["K"]


def vote_ops(s: Shape) -> int:
    """Return the operations of stochastic votes: square, sum, scale, clamp, round, dither, shift, clamp."""
    return 8 * elements(s) + dither_ops(groups(s), s["G"])


# Sizes of weights.
MATRIX = sizes(
    tiny={"N": 256, "K": 256, "G": 12},
    _3072={"N": 3072, "K": 3072, "G": 12},
    _7168={"N": 7168, "K": 7168, "G": 12},
)

# Sizes of activations and of one row of a weight.
ROWS = sizes(
    tiny={"M": 256, "N": 1, "K": 256, "G": 12, "float_bytes": 2},
    _3072={"M": 4096, "N": 1, "K": 3072, "G": 12, "float_bytes": 2},
    _7168={"M": 4096, "N": 1, "K": 7168, "G": 12, "float_bytes": 2},
)
