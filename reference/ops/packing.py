"""Packing: five trits to a byte, the canonical form of checkpoints and audits.

Legend: n number of trits. byte = sum over j of (t_j + 1) * 3**j, the first trit least significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    DEFAULT_GROUP_SIZE,
    TRITS_PER_BYTE,
    groups_per_row,
    packed_bytes,
)
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["pack_trits", "unpack_trits"]


@op
def pack_trits(trits: Tensor) -> Tensor:
    """Return trits packed five to a byte, row-major.

    Math:    byte = sum_j (t_j + 1) * 3**j, j = 0..4; a short last byte is filled with trit 0
    Shapes:  trits int8 [...], any shape, in {-1, 0, 1}
    Returns: uint8 [ceil(n / 5)], in 0..242
    Raises:  TypeError for another dtype; ValueError for a value outside {-1, 0, 1}
    Laws:    unpack_trits(pack_trits(t), t.shape) == t; a negated tensor packs to 242 - byte
    Source:  docs/spec/packing.md
    """
    checks.dtype_in("trits", trits, (torch.int8,))
    checks.values_between("trits", trits, -1, 1)
    digits = trits.reshape(-1).to(torch.int16) + 1
    padding = packed_bytes(digits.numel()) * TRITS_PER_BYTE - digits.numel()
    # Digit 1 is trit 0.
    digits = torch.cat([digits, digits.new_ones(padding)])
    places = torch.tensor([3**j for j in range(TRITS_PER_BYTE)], dtype=torch.int16, device=trits.device)
    return (digits.reshape(-1, TRITS_PER_BYTE) * places).sum(dim=1).to(torch.uint8)


@op
def unpack_trits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the trits of `packed` in the given shape.

    Math:    t_j = (byte // 3**j) mod 3 - 1
    Shapes:  packed uint8 [ceil(n / 5)] with n = product of `shape`
    Returns: int8 `shape`, in {-1, 0, 1}
    Raises:  TypeError for another dtype; ValueError for a wrong length or a byte above 242. The unused places of a short
             last byte are ignored, so a file that fills them with another trit still reads
    Laws:    pack_trits(unpack_trits(p, [5 * len(p)])) == p for every valid p
    Source:  docs/spec/packing.md
    """
    shape = checks.sizes("shape", shape)
    checks.tensor("packed", packed, torch.uint8, (packed_bytes(math.prod(shape)),))
    checks.weight_values("packed", "packed", packed)
    return digits_of(packed, shape)


TRITS_OF_BYTE = torch.tensor(
    [[byte // 3**j % 3 - 1 for j in range(TRITS_PER_BYTE)] for byte in range(256)], dtype=torch.int8
)
"""The five trits of each byte, int8 [256, 5]. To look them up is faster than to divide."""


def digits_of(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the first trits of `packed`, int8 `shape`."""
    digits = TRITS_OF_BYTE.to(packed.device)[packed.to(torch.int64)]
    return digits.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def digits_at(packed: Tensor, positions: Tensor) -> Tensor:
    """Return the trits at flat int64 `positions` of `packed`, int8 in the shape of `positions`."""
    byte = packed[positions // TRITS_PER_BYTE].to(torch.int64)
    return TRITS_OF_BYTE.to(packed.device)[byte, positions % TRITS_PER_BYTE]


def weight_of_trits(
    trits: Tensor, exponents: Tensor, group_size: int = DEFAULT_GROUP_SIZE, *, mantissa_bits: int = 0
) -> TernaryWeight:
    """Return a weight with empty accumulators from int8 trits [N, K] and int8 exponents [N, KG].

    Raises ValueError for trits outside {-1, 0, 1} or exponents outside their range, TypeError for other dtypes.
    """
    checks.group_size(group_size)
    checks.mantissa_bits(mantissa_bits)
    checks.matrix("trits", trits, (torch.int8,))
    shape = (trits.shape[0], trits.shape[1])
    checks.tensor("exponents", exponents, torch.int8, (shape[0], groups_per_row(shape[1], group_size)))
    checks.weight_values("exponents", "exponents", exponents, mantissa_bits)
    return TernaryWeight(
        packed=pack_trits(trits),
        exponents=exponents.clone(),
        trit_accum=torch.zeros_like(trits, memory_format=torch.contiguous_format),
        exponent_accum=torch.zeros_like(exponents, memory_format=torch.contiguous_format),
        shape=shape,
        group_size=group_size,
        mantissa_bits=mantissa_bits,
    )


def weight_without_values(shape: tuple[int, int], group_size: int) -> TernaryWeight:
    """Return a weight on the meta device: its tensors have shapes and dtypes, and take no memory.

    Ops that make a weight return this one there. To compute values that nobody can read would import torch's compiler, which takes
    seconds.
    """
    num_rows, num_columns = shape
    trits = torch.empty(shape, dtype=torch.int8, device="meta")
    exponents = trits.new_empty((num_rows, groups_per_row(num_columns, group_size)))
    return TernaryWeight(
        packed=trits.new_empty(packed_bytes(num_rows * num_columns), dtype=torch.uint8),
        exponents=exponents,
        trit_accum=trits,
        exponent_accum=exponents.new_empty(exponents.shape),
        shape=shape,
        group_size=group_size,
    )


def trits_of(weight: TernaryWeight) -> Tensor:
    """Return the trits of a weight, int8 [N, K] in {-1, 0, 1}."""
    return unpack_trits(weight.packed, weight.shape)
