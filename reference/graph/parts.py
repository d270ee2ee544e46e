"""A weight in parts of whole rows, so that a look at a large table never decodes all of it at once.

Legend: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from arbitor.reference.constants import TRITS_PER_BYTE, packed_bytes
from arbitor.reference.types import LaidOutWeight, TernaryWeight

PART_TRITS = 2**23
"""Most trits of a part. To look at a part takes the reference some 40 bytes a trit, 320 MiB."""


def looked_at(weight: LaidOutWeight) -> Iterator[LaidOutWeight]:
    """Yield a weight in the parts in which ops look at it.

    Ops decode what they look at of a canonical weight, so they are given some rows at a time. Kernels look at other layouts without
    decoding them to memory, so they are given all of a weight.
    """
    if isinstance(weight, TernaryWeight):
        yield from row_parts(weight)
    else:
        yield weight


def row_parts(weight: LaidOutWeight, max_trits: int = PART_TRITS) -> Iterator[LaidOutWeight]:
    """Yield a weight of any layout in parts of whole rows, first rows first. The parts are views, so nothing is copied.

    A part has at most `max_trits` trits. If five rows have more, it has five rows, which end on a byte of the canonical form.
    """
    num_rows, num_columns = weight.shape
    step = max(max_trits // (TRITS_PER_BYTE * num_columns), 1) * TRITS_PER_BYTE
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        bytes_ = slice(first * num_columns // TRITS_PER_BYTE, packed_bytes(last * num_columns))
        tensors: dict[str, Tensor] = {
            name: tensor[first:last] if tensor.ndim == 2 else tensor[bytes_]
            for name, tensor in weight.tensors().items()
        }
        # Both kinds of weight are dataclasses. The protocol does not say so, because nothing else needs it.
        yield replace(cast(Any, weight), shape=(last - first, num_columns), **tensors)
