"""Poison: memory that an implementation allocates without writing is filled with values that comparers notice.

Floats become NaN. Integers become one of two bit patterns, so that a pattern that happens to be right once is wrong the
other time: 0x5A is an ordinary value everywhere, 0xFB is a packed byte that no trits encode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PATTERNS = (0x5A, 0xFB)
"""Bytes that integers are filled with."""

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def fill(tensor: Tensor, pattern: int) -> Tensor:
    """Fill fresh memory with poison and return it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(bool(pattern & 1))
    signed = tensor.dtype.is_signed
    return tensor.fill_(int.from_bytes(bytes([pattern]) * tensor.element_size(), "little", signed=signed))


@contextmanager
def poisoned(pattern: int) -> Iterator[None]:
    """Fill what torch's `empty` family returns, until the block ends."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    for owner, name, allocate in originals:
        setattr(owner, name, _filling(allocate, pattern))
    try:
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


def _filling(allocate: Callable[..., Tensor], pattern: int) -> Callable[..., Tensor]:
    """Return an allocator whose memory is poisoned."""

    def poisonous(*args: Any, **kwargs: Any) -> Tensor:
        return fill(allocate(*args, **kwargs), pattern)

    return poisonous
