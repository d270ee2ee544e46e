"""What draws tensors for the ops that are timed, and the pieces that several families share.

Legend: N rows, K columns, G columns a group, M activation rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.constants import (
    DEFAULT_MANTISSA_BITS,
    DEFAULT_THETA,
    MAX_PACKED_BYTE,
    groups_per_row,
    packed_bytes,
)
from arbitor.reference.types import TernaryWeight

Sizes = Mapping[str, int]
"""Sizes of one case, by the names in the legend of its family."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one call."""

CLOCK = {"seed": 20261121, "step": 7, "tensor_id": 3}
"""Dither coordinates of all timed votes."""

ORIGIN = {"seed": CLOCK["seed"], "tensor_id": CLOCK["tensor_id"]}
"""Dither coordinates of all weights that are timed in the making."""

RATE = 6.0
"""Rate of all timed votes, which is the rate of the flat part of a run."""

FLOATS = {2: torch.bfloat16, 4: torch.float32}
"""Activation dtype by the `float_bytes` of a shape."""

# A byte of five zero trits. The trits after the last one of a weight are zeros by the spec.
_NO_TRITS = 121


class Maker:
    """Draws tensors on a device from a seed of its own, so that every implementation of a case gets the same ones."""

    def __init__(self, device: torch.device | str, name: str) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(zlib.crc32(name.encode()))

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return integers in low .. high."""
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=dtype, device=self.device)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device)

    def trits(self, shape: tuple[int, ...]) -> Tensor:
        """Return int8 trits, each value as often as the others."""
        return self.integers(-1, 1, shape, torch.int8)

    def packed(self, num_rows: int, num_columns: int) -> Tensor:
        """Return packed trits of a weight."""
        packed = self.integers(0, MAX_PACKED_BYTE, (packed_bytes(num_rows * num_columns),), torch.uint8)
        packed[-1] = _NO_TRITS
        return packed

    def weight(self, num_rows: int, num_columns: int, group_size: int) -> TernaryWeight:
        """Return a weight in the midst of training: varied scales with the mantissa of a model's, accumulators partly filled."""
        groups = (num_rows, groups_per_row(num_columns, group_size))
        steps = 2**DEFAULT_MANTISSA_BITS
        return TernaryWeight(
            packed=self.packed(num_rows, num_columns),
            exponents=self.integers(-8 * steps, -4 * steps, groups, torch.int8),
            trit_accum=self.integers(-DEFAULT_THETA, DEFAULT_THETA, (num_rows, num_columns), torch.int8),
            exponent_accum=self.integers(-127, 127, groups, torch.int8),
            shape=(num_rows, num_columns),
            group_size=group_size,
            mantissa_bits=DEFAULT_MANTISSA_BITS,
        )


Inputs = Callable[[Maker, Sizes], Arguments]
"""Returns the arguments of an op for a shape, in canonical form, on the maker's device."""


def weight(make: Maker, s: Sizes) -> TernaryWeight:
    """Return a weight of N rows and K columns."""
    return make.weight(s["N"], s["K"], s["G"])


def gradient(make: Maker, s: Sizes) -> Tensor:
    """Return a gradient [N, K], in float32 unless the sizes name another dtype."""
    return make.normal((s["N"], s["K"]), FLOATS[s.get("float_bytes", 4)])


def activations(make: Maker, s: Sizes, width: str) -> Tensor:
    """Return M rows of activations, as wide as the size called `width`."""
    return make.normal((s["M"], s[width]), FLOATS[s["float_bytes"]])


def ids(make: Maker, s: Sizes) -> Tensor:
    """Return M ids of rows, int64 in 0 .. N - 1."""
    return make.integers(0, s["N"] - 1, (s["M"],), torch.int64)


def in_place(into: TernaryWeight, *rest: Any, **clock: Any) -> Arguments:
    """Return the arguments of a call that writes its result into the weight that it reads."""
    return (into, *rest), {**clock, "out": into}
