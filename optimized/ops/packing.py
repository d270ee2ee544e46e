"""Packing. See `arbitor.reference.ops.packing`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.optimized.kernels import packing
from arbitor.optimized.kernels.launch import values_between
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import MAX_PACKED_BYTE, packed_bytes

__all__ = ["pack_trits", "unpack_trits"]


@op()
def pack_trits(trits: Tensor) -> Tensor:
    """See reference."""
    checks.dtype_in("trits", trits, (torch.int8,))
    values_between("trits", trits, -1, 1)
    return packing.pack(trits)


@op()
def unpack_trits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """See reference."""
    num_trits = math.prod(checks.sizes("shape", shape))
    checks.tensor("packed", packed, torch.uint8, (packed_bytes(num_trits),))
    values_between("packed", packed, 0, MAX_PACKED_BYTE)
    return packing.unpack(packed, num_trits).reshape(tuple(shape))
