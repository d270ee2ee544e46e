"""The device layout of a weight: private to `optimized`, lossless, and fast to unpack.

Legend: N rows, K columns, KW = ceil(K / 16) words a row, KG groups a row.

The canonical form packs five trits to a byte across row ends. This costs a division by a power of three per trit, and rows share
bytes. In the device layout a row starts on a word of its own, and a trit is a two-bit two's complement number: 0 is 00, +1 is 01,
-1 is 11. Lane l of word w of a row is column 16 * w + l, and lanes past the last column hold 0. The three int8 tensors are those
of the canonical form. The resident state is about 1/4 + 1 + 2/G bytes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_GROUP_SIZE, groups_per_row
from arbitor.reference.types import StateTensors, TernaryWeight, has_memory, rows_of

TRITS_PER_WORD = 16
"""Trits in one 32-bit word, two bits each."""

MAX_COLUMNS = 2**31 - 2**16
"""Most columns of a row: kernels count columns in 32 bits, and round up to whole tiles."""


def words_per_row(num_columns: int) -> int:
    """Return KW = ceil(K / 16), the 32-bit words that hold the trits of one row."""
    return -(-num_columns // TRITS_PER_WORD)


@dataclass(frozen=True)
class DeviceWeight(StateTensors):
    """A ternary weight in device layout. Fields as in `TernaryWeight`, with `words` int32 [N, KW] in place of `packed`.

    Raises ValueError or TypeError when the tensors do not fit each other.
    """

    words: Tensor
    exponents: Tensor
    trit_accum: Tensor
    exponent_accum: Tensor
    shape: tuple[int, int]
    group_size: int = DEFAULT_GROUP_SIZE
    mantissa_bits: int = 0

    def __post_init__(self) -> None:
        """Refuse tensors whose shapes, dtypes or devices do not fit each other."""
        object.__setattr__(self, "shape", checks.matrix_shape("shape", self.shape))
        checks.group_size(self.group_size)
        checks.mantissa_bits(self.mantissa_bits)
        num_rows, num_columns = self.shape
        if num_columns > MAX_COLUMNS:
            raise ValueError(f"shape is {self.shape}, but a row may have at most {MAX_COLUMNS} columns")
        groups = groups_per_row(num_columns, self.group_size)
        checks.tensor("words", self.words, torch.int32, (num_rows, words_per_row(num_columns)))
        checks.tensor("exponents", self.exponents, torch.int8, (num_rows, groups))
        checks.tensor("trit_accum", self.trit_accum, torch.int8, (num_rows, num_columns))
        checks.tensor("exponent_accum", self.exponent_accum, torch.int8, (num_rows, groups))
        checks.same_device(**self.tensors())
        for name, tensor in self.tensors().items():
            if has_memory(tensor) and not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}, but must be contiguous")

    def check_values(self, prefix: str, name: str, tensor: Tensor) -> None:
        """Refuse a tensor for the field `name` with an element that no weight has there; errors call it prefix + name."""
        if name != "words":
            checks.weight_values(prefix + name, name, tensor, self.mantissa_bits)
        elif tensor.device.type != "meta" and (_misread_lanes(tensor, self.shape[1]) != 0).any():
            raise ValueError(
                f"{prefix + name} holds a lane that is no trit, or one past the last column that is not 0"
            )

    def part(self, rows: range) -> DeviceWeight:
        """Return some rows, one after the other, as a weight that shares memory with this one."""
        return replace(self, shape=(len(rows), self.shape[1]), **rows_of(self, rows))


def _misread_lanes(words: Tensor, num_columns: int) -> Tensor:
    """Return words of a row's layout [N, KW] that are 0 where every lane is a trit, and 0 past the last column."""
    low_bits = 0x55555555
    # A lane of 10 has its high bit set and its low bit not.
    wrong = (words >> 1) & ~words & low_bits
    lanes = num_columns % TRITS_PER_WORD
    if lanes and words.numel():
        wrong[:, -1] |= words[:, -1] >> (2 * lanes)
    return wrong


def resident_bytes(weight: TernaryWeight) -> int:
    """Return the bytes that the training state of a canonical weight, which may be on the meta device, takes in device layout."""
    num_rows, num_columns = weight.shape
    return weight.state_bytes - weight.packed.numel() + 4 * num_rows * words_per_row(num_columns)


AnyWeight = TernaryWeight | DeviceWeight
"""The weights that every optimized op takes. An op returns the kind of weight that it was given."""
