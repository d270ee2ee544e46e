"""What a row of the table says of an op, and the classes by which outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = Mapping[str, int]
"""Sizes of one case, by the names in the legend."""


@dataclass(frozen=True)
class Exact:
    """Outputs equal the reference in bits, dtype and shape."""

    def __str__(self) -> str:
        """Return the class as tables print it."""
        return "EXACT"


@dataclass(frozen=True)
class NoWorse:
    """Floats err at most k times as much as the reference op, plus one rounding; integers equal."""

    k: float

    def __str__(self) -> str:
        """Return the class as tables print it."""
        return f"NO_WORSE({self.k:g})"


EXACT = Exact()
"""The class of every op whose outputs are integers, and of floats that the formula gives exactly."""

TWICE = NoWorse(2.0)
"""Room for another order of summation, no more; see docs/numerics.md."""


@dataclass(frozen=True)
class OpRow:
    """What the suites, the benchmarks and the docs know about an op.

    name:       attribute of `arbitor.reference.ops` and `arbitor.optimized.ops`
    family:     file that holds it, in both folders
    output:     EXACT or NoWorse(k): how its outputs are compared
    shapes:     sizes to time it at, by name
    bytes_min:  least memory traffic of a shape, in bytes
    ops_min:    least arithmetic of a shape, in operations
    capturable: may be recorded in a CUDA graph; while it is, the op asks the host about no value
    """

    name: str
    family: str
    output: Exact | NoWorse
    shapes: Mapping[str, Shape]
    bytes_min: Callable[[Shape], int]
    ops_min: Callable[[Shape], int]
    capturable: bool = True

    @property
    def doc(self) -> str:
        """Return where the prose of the op is."""
        return f"docs/spec/{self.family}.md#{self.name}"
