"""Rows of a weight spread over ranks: which rank keeps which, and how ranks read, search and revive rows that others keep.

A function that exchanges is called by every rank. What it returns is what one process returns that has all rows. The rule is in
docs/spec/distributed.md.
Legend: N rows of the table, P ranks, C columns, Q vectors of a rank, R vectors of all ranks, M slots of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.constants import (
    CODE_EXPONENT_MAX,
    CODE_EXPONENT_MIN,
    EXPONENT_MAX,
    EXPONENT_MIN,
    QUERY_STEPS,
    TRITS_PER_BYTE,
    packed_bytes,
)
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.ops.codebook import revived_trits, whole_sixteenths
from arbitor.reference.ops.packing import pack_trits, trits_of
from arbitor.reference.types import LaidOutWeight, TernaryWeight

Read = Callable[[Tensor], Tensor]
"""A function from places of rows that this rank keeps, int64 [...], to the rows, [..., C]; of a ternary table, float32."""

_IDS = 2**32
"""More than a code can be, so that a score and a code make one number."""


@dataclass(frozen=True)
class Spread:
    """Which rows of a table each rank keeps, and which of them this rank does.

    Math:    blocks of b rows, S = ceil(N / b) of them; rank r keeps the blocks from floor(r S / P) up to floor((r + 1) S / P)
    Fields:
        num_rows: N.
        number:   this rank.
        count:    P, at most S, so that each rank keeps rows.
        block:    b: the rows of an expert; else 5, so that the trits of a rank are whole bytes of the canonical form.
    """

    num_rows: int
    number: int
    count: int
    block: int = TRITS_PER_BYTE

    @property
    def _blocks(self) -> int:
        return -(-self.num_rows // self.block)

    def rows_of(self, rank: int) -> range:
        """Return the rows that a rank keeps."""
        first, last = (
            min(each * self._blocks // self.count * self.block, self.num_rows) for each in (rank, rank + 1)
        )
        return range(first, last)

    @property
    def rows(self) -> range:
        """The rows that this rank keeps."""
        return self.rows_of(self.number)

    def keepers(self, ids: Tensor) -> Tensor:
        """Return the rank that keeps each row, int64, for ids of 0 .. N - 1."""
        return ((ids // self.block + 1) * self.count - 1) // self._blocks

    def places(self, ids: Tensor) -> Tensor:
        """Return the places of rows among those of this rank, and -1 for rows that it does not keep."""
        rows = self.rows
        return torch.where((ids >= rows.start) & (ids < rows.stop), ids - rows.start, -1)

    def part(self, weight: TernaryWeight) -> TernaryWeight:
        """Return the rows of a whole weight that this rank keeps, copied."""
        rows, num_columns = self.rows, weight.shape[1]
        first, last = rows.start * num_columns, rows.stop * num_columns
        by_row: dict[str, Any] = {
            name: tensor[rows.start : rows.stop].clone()
            for name, tensor in weight.tensors().items()
            if name != "packed"
        }
        ends = last % TRITS_PER_BYTE == 0 or rows.stop == self.num_rows
        if first % TRITS_PER_BYTE == 0 and ends:
            packed = weight.packed[first // TRITS_PER_BYTE : packed_bytes(last)].clone()
        elif weight.device.type == "meta":
            packed = weight.packed.new_empty(packed_bytes(last - first))
        else:
            packed = pack_trits(trits_of(weight)[rows.start : rows.stop])
        return replace(weight, shape=(len(rows), num_columns), packed=packed, **by_row)

    def dealt(self, ids: Tensor, *values: Tensor) -> list[list[Tensor]]:
        """Return ids and their values by the rank that keeps the rows: a list of P tensors for each argument.

        The order within a rank stays. Ids below 0 are left out.
        """
        used = ids >= 0
        keepers = self.keepers(ids[used])
        order = keepers.argsort(stable=True)
        sizes = torch.bincount(keepers, minlength=self.count).tolist()
        return [list(each[used][order].split(sizes)) for each in (ids, *values)]

    def window(self, first: int, size: int) -> tuple[int, tuple[int, int]]:
        """Return the rows of this rank in the window of rows (first + j) mod N, j < size.

        Returns:
            The place of the first of them among the rows of this rank; and how many there are before the window wraps around the
            end of the table, and after that. Where both numbers are above 0, the first run ends with the last row of this rank.
        """
        rows, first = self.rows, first % self.num_rows
        begins = max(first, rows.start), rows.start
        ends = min(first + size, rows.stop), min(first + size - self.num_rows, rows.stop)
        before, after = (max(end - begin, 0) for begin, end in zip(begins, ends, strict=True))
        return (begins[0] - rows.start if before else 0), (before, after)


def joined(parts: Sequence[TernaryWeight]) -> TernaryWeight:
    """Return a whole weight of the parts that the ranks keep, in the order of their numbers."""
    first = parts[0]
    shape = sum(part.shape[0] for part in parts), first.shape[1]
    by_row: dict[str, Any] = {
        name: torch.cat([part.tensors()[name] for part in parts])
        for name in first.tensors()
        if name != "packed"
    }
    if all(math.prod(part.shape) % TRITS_PER_BYTE == 0 for part in parts[:-1]):
        packed = torch.cat([part.packed for part in parts])
    else:
        packed = pack_trits(torch.cat([trits_of(part) for part in parts]))
    return replace(first, shape=shape, packed=packed, **by_row)


def sent_rows(ids: Tensor, spread: Spread, read: Read, ranks: Ranks) -> Tensor:
    """Return rows of a table, [..., C], for ids int64 [...] in 0 .. N - 1, as the ranks that keep them read them.

    Each rank names the rows that it wants once.
    """
    wanted, places = ids.reshape(-1).unique(return_inverse=True)
    (asked,) = spread.dealt(wanted)
    rows = torch.cat(ranks.dealt([read(theirs - spread.rows.start) for theirs in ranks.dealt(asked)]))
    return rows[places].reshape(*ids.shape, rows.shape[1])


def fetched(ids: Tensor, spread: Spread, read: Read, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """Return rows of a ternary table, in a dtype; exact. They are sent as a byte for each element."""
    return of_bytes(sent_rows(ids, spread, lambda places: as_bytes(read(places)), ranks), dtype)


def as_bytes(rows: Tensor) -> Tensor:
    """Return elements T 2**E as one byte each: 0 for T = 0, else T (E + 33)."""
    _, exponents = torch.frexp(rows)
    # An element is 1/2 times two to the power of its frexp exponent, E + 1.
    return (rows.sign() * (exponents - EXPONENT_MIN)).to(torch.int8)


def of_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the elements that `as_bytes` made bytes of."""
    powers = torch.tensor([0.0, *(2.0**e for e in range(EXPONENT_MIN, EXPONENT_MAX + 1))])
    sizes = powers.to(rows.device)[rows.abs().to(torch.int64)]
    return (sizes * rows.sign()).to(dtype)


def searched(rows: Tensor) -> Tensor:
    """Return codes as the search sees them, T 2**clamp(E, -5, 2), for codes float32 [..., C]."""
    return rows.sign() * rows.abs().clamp(2.0**CODE_EXPONENT_MIN, 2.0**CODE_EXPONENT_MAX)


def queries(z: Tensor) -> Tensor:
    """Return vectors as the search sees them, in whole sixteenths, int8."""
    return whole_sixteenths(z).to(torch.int8)


def vectors(z_q: Tensor) -> Tensor:
    """Return a vector, float32, of which `queries` makes z_q."""
    return z_q.to(torch.float32) / QUERY_STEPS


def found_keys(z_q: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    """Return a score and its code as one number: of two codes the one of the lower number is nearer, or as near and the lower one.

    Math:    2**32 (2**11 score) + id, score as in nearest_codes; 2**11 score = 2**10 |c'|**2 - 2**7 z_q . c' is whole, below 2**24
    Shapes:  z_q int8 [Q, C]; codes float32 [Q, C] as the search sees them; ids int64 [Q] -> int64 [Q]
    """
    scores = (2.0**10 * codes.square() - 2.0**7 * z_q.to(torch.float32) * codes).sum(dim=1)
    return scores.to(torch.int64) * _IDS + ids


def nearest(keys: Sequence[Tensor]) -> Tensor:
    """Return the nearest code of each vector, int64 [Q], from the keys of the nearest of each rank, int64 [Q]."""
    return torch.stack(list(keys)).amin(dim=0) % _IDS


def search(
    z: Tensor, weight: LaidOutWeight, spread: Spread, read: Read, ranks: Ranks, ops: ModuleType
) -> Tensor:
    """Return the code nearest to each vector, as `nearest_codes` does with the whole table.

    Every rank looks for the vectors of all ranks among its own codes. Then each gets the nearest of every rank, and takes the best.
    Shapes:  z [..., C] -> int64 [...]
    """
    own_QC = queries(z).reshape(-1, z.shape[-1])
    asked = ranks.dealt([own_QC] * ranks.count)
    z_RC = torch.cat(asked)
    places_R = ops.nearest_codes(vectors(z_RC), weight)
    keys_R = found_keys(z_RC, searched(read(places_R)), places_R + spread.rows.start)
    return nearest(ranks.dealt(list(keys_R.split([len(each) for each in asked])))).reshape(z.shape[:-1])


def revival_keys(
    z_RC: Tensor, weight: LaidOutWeight, ids_R: Tensor, spread: Spread, read: Read, ops: ModuleType
) -> Tensor:
    """Return the farthest vector of each code of this rank that has one, in the order of `revival_vectors`.

    Shapes:  z_RC int8, the vectors of all ranks in whole sixteenths; ids int64 [R], their codes, or -1
    Returns: int64 [F, 2]: a number that is the lower the larger the gain, and of equal gains the lower the code; and the vector
    """
    places_R = spread.places(ids_R)
    dead_N = torch.zeros(len(spread.rows), dtype=torch.int16, device=z_RC.device)
    window = min(len(spread.rows), len(places_R))
    found = ops.revival_vectors(vectors(z_RC), weight, places_R, dead_N, first=0, window=window)
    found_F = found[found >= 0]
    z_FC, places_F = z_RC[found_F].to(torch.float32), places_R[found_F]
    gains_F = _distances(z_FC, searched(read(places_F))) - _distances(z_FC, revived_trits(z_FC))
    return torch.stack([places_F + spread.rows.start - gains_F * _IDS, found_F], dim=1)


def _distances(z_FC: Tensor, codes_FC: Tensor) -> Tensor:
    """Return 2**10 |z_q / 16 - c|**2, int64 [F], for z_q and c float32."""
    return (2 * z_FC.to(torch.float64) - 2 * QUERY_STEPS * codes_FC).square().sum(dim=1).to(torch.int64)


def chosen_vectors(keys: Sequence[Tensor]) -> Tensor:
    """Return the vectors that unused codes become, the farthest first, int64 [F], from the `revival_keys` of all ranks."""
    keys_F2 = torch.cat(list(keys))
    return keys_F2[keys_F2[:, 0].argsort(), 1]


def vectors_of_rows(dead_W: Tensor, earlier: tuple[int, int], before: int, chosen_F: Tensor) -> Tensor:
    """Return the vector that each row of this rank in a window becomes, int64 [W], -1 for none, as `revival_vectors` does.

    Args:
        dead_W: bool, which of the rows of this rank in the window are unused.
        earlier: unused rows of the window before the first of these rows, and before the first of them after the wrap.
        before: how many of these rows come before the window wraps.
        chosen_F: `chosen_vectors`.
    """
    places_W = dead_W.cumsum(dim=0) - 1 + earlier[0]
    places_W[before:] += earlier[1] - earlier[0] - dead_W[:before].sum()
    given_W = dead_W & (places_W < len(chosen_F))
    vectors_W = torch.full_like(places_W, -1)
    vectors_W[given_W] = chosen_F[places_W[given_W]]
    return vectors_W


def revival(
    z_RC: Tensor,
    weight: LaidOutWeight,
    ids_R: Tensor,
    usage: Tensor,
    *,
    first: int,
    window: int,
    spread: Spread,
    read: Read,
    ranks: Ranks,
    ops: ModuleType,
) -> tuple[int, Tensor]:
    """Return what `revival_vectors` returns for the rows of this rank: the place of the first in the window, and their vectors.

    Shapes:  z_RC int8 and ids_R as in `revival_keys`; usage int16, of the rows of this rank -> first, int64 [W]
    """
    keys = revival_keys(z_RC, weight, ids_R, spread, read, ops)
    chosen_F = chosen_vectors(ranks.dealt([keys] * ranks.count))
    place, (before, after) = spread.window(first, window)
    rows_W = (place + torch.arange(before + after, device=usage.device)) % len(usage)
    dead_W = usage[rows_W] == 0
    mine = torch.stack([dead_W[:before].sum(), dead_W[before:].sum()])
    counts_P2 = torch.stack(ranks.dealt([mine] * ranks.count)).tolist()
    earlier = sum(before for before, _ in counts_P2[: spread.number])
    wrapped = sum(before for before, _ in counts_P2) + sum(after for _, after in counts_P2[: spread.number])
    return place, vectors_of_rows(dead_W, (earlier, wrapped), before, chosen_F)


class Slots:
    """The slots of this rank at the ranks that keep their experts, and those of all ranks at this one.

    Attributes:
        experts: int64, the expert of each slot that has arrived here, by its place among the experts of this rank. The slots of
            rank 0 come first, and those of a rank keep their order.
    """

    def __init__(self, experts_M: Tensor, spread: Spread, ranks: Ranks) -> None:
        """Deal slots by their experts, int64 [M] in -1 .. E - 1. A slot of -1 stays."""
        rows_M = torch.where(experts_M < 0, -1, experts_M * spread.block)
        rows, places = spread.dealt(rows_M, torch.arange(len(rows_M), device=rows_M.device))
        arrived = ranks.dealt(rows)
        self.experts = (torch.cat(arrived) - spread.rows.start) // spread.block
        self._ranks, self._num_slots, self._places = ranks, len(experts_M), torch.cat(places)
        self._sent, self._arrived = [len(each) for each in places], [len(each) for each in arrived]

    def there(self, values_MK: Tensor) -> Tensor:
        """Return what the slots at this rank were given, for what this rank gives to its own slots, [M, K]."""
        return torch.cat(self._ranks.dealt(list(values_MK[self._places].split(self._sent))))

    def back(self, values: Tensor) -> Tensor:
        """Return what the slots of this rank were given, [M, K], for what this rank gives to the slots at it; zeros for -1."""
        home = torch.cat(self._ranks.dealt(list(values.split(self._arrived))))
        return home.new_zeros(self._num_slots, *home.shape[1:]).index_copy_(0, self._places, home)
