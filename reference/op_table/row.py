"""The rows of the table of ops, and the classes by which outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.reference.dtypes import sum_dtype

Shape = Mapping[str, int]
"""Sizes of one case, by the names in the legend."""


@dataclass(frozen=True)
class Exact:
    """The class of outputs that equal the reference in bits, dtype and shape."""

    def __str__(self) -> str:
        """Return the class as tables print it."""
        return "EXACT"


@dataclass(frozen=True)
class NoWorse:
    """The class of floats that err at most k times as much as the reference op, plus one rounding; integers are equal."""

    k: float

    def __str__(self) -> str:
        """Return the class as tables print it."""
        return f"NO_WORSE({self.k:g})"


EXACT = Exact()
"""The class of every op whose outputs are integers, and of floats that the formula gives exactly."""

TWICE = NoWorse(2.0)
"""The class of ops that may sum in another order, and no more (docs/numerics.md)."""


@dataclass(frozen=True)
class OpRow:
    """The facts about an op that the suites, the benchmarks and the docs share.

    name:       attribute of `arbitor.reference.ops` and `arbitor.optimized.ops`
    family:     file that holds it, in both folders
    output:     EXACT or NoWorse(k): how its outputs are compared
    shapes:     sizes to time it at, by name
    bytes_min:  least memory traffic of a shape, in bytes
    ops_min:    least arithmetic of a shape, in operations
    capturable: whether the op may be recorded in a CUDA graph; a recorded op reads no value on the host
    like:       what the compiler is told of a result: empty tensors like it, from the arguments by name. Only shapes and dtypes are
                read, and of a weight its shape and exponents. An op without it runs outside of graphs of torch.compile
    """

    name: str
    family: str
    output: Exact | NoWorse
    shapes: Mapping[str, Shape]
    bytes_min: Callable[[Shape], int]
    ops_min: Callable[[Shape], int]
    capturable: bool = True
    like: Callable[..., Tensor | Sequence[Tensor]] | None = None


def sums(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an empty tensor of a shape in the dtype of sums over x that are rounded to `dtype`."""
    return torch.empty(shape, dtype=sum_dtype(x, dtype), device=x.device)
