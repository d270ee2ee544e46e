"""Rows of a table that ranks keep for each other: what they find, fetch and revive together is what one process finds.

The ranks are threads here, which deal their tensors at a table. `test_distributed.py` has processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops
from arbitor.reference.graph import spread as spread_module
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.graph.spread import Spread, fetched, queries, revival, search
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance.distributed.threads import Table, on_threads

WIDTH = 7
"""Columns of a code. Five rows are no whole number of groups, words or bytes but of the canonical form."""


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, number: int, table: Table) -> None:
        self.number, self.count = number, table.count
        self._table = table

    def dealt(self, parts: Sequence[Tensor]) -> list[Tensor]:
        assert len(parts) == self.count
        found = [of_rank[self.number].clone() for of_rank in self._table.meet(self.number, parts)]
        # A rank may write to its parts once all have their copies.
        self._table.meet(self.number, None)
        return found


def on_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what each of some ranks returns."""
    return on_threads(count, lambda number, table: work(ThreadRanks(number, table)))


def reader(weight: TernaryWeight) -> Callable[[Tensor], Tensor]:
    return partial(ops.embedding, weight=weight, dtype=torch.float32)


def table_of(num_codes: int, generator: torch.Generator, *, copies: bool) -> TernaryWeight:
    """Return codes with scales beyond those that a search sees. With `copies` each stands several times, often far apart."""
    trits = torch.randint(-1, 2, (num_codes, WIDTH), generator=generator, dtype=torch.int8)
    exponents = torch.randint(-7, 4, (num_codes, 1), generator=generator, dtype=torch.int8)
    if copies:
        of = torch.randint(0, max(num_codes // 6, 1), (num_codes,), generator=generator)
        trits, exponents = trits[of], exponents[of]
    return weight_of_trits(trits, exponents)


@st.composite
def cases(draw: st.DrawFn) -> tuple[TernaryWeight, list[Tensor], Tensor]:
    """Draw a table, the vectors of each rank, of which one may have none, and counts of use."""
    count = draw(st.integers(1, 4), label="ranks")
    num_codes = draw(st.integers(5 * count, 60), label="codes")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))
    weight = table_of(num_codes, generator, copies=draw(st.booleans(), label="copies"))
    sizes = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count), label="vectors")
    # Halves make ties, and the last ones lie beyond what a search sees.
    vectors = [(torch.randn(size, WIDTH, generator=generator) * 4).round() / 2 for size in sizes]
    if draw(st.booleans(), label="coarse"):
        vectors = [each.sign() for each in vectors]
    usage = torch.randint(0, 3, (num_codes,), generator=generator, dtype=torch.int16)
    return weight, vectors, usage


@pytest.mark.parametrize("num_rows", [5, 9, 23, 60, 34_108, 10_000_000])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_each_row_has_one_keeper(num_rows: int, count: int) -> None:
    if count > -(-num_rows // 5):
        count = 1
    spreads = [Spread(num_rows, number, count) for number in range(count)]
    assert [row for s in spreads for row in (s.rows.start, s.rows.stop)][1:-1:2] == [
        s.rows.start for s in spreads[1:]
    ]
    assert spreads[0].rows.start == 0 and spreads[-1].rows.stop == num_rows
    assert all(len(s.rows) > 0 and s.rows.start % 5 == 0 for s in spreads)
    edges = torch.tensor([row for s in spreads for row in (s.rows.start, s.rows.stop - 1)])
    assert spreads[0].keepers(edges).tolist() == [number for number in range(count) for _ in range(2)]


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_nearest_code_is_that_of_the_whole_table(
    case: tuple[TernaryWeight, list[Tensor], Tensor],
) -> None:
    """Whatever the number of parts, ties go to the lowest code."""
    weight, vectors, _ = case

    def work(ranks: Ranks) -> Tensor:
        spread = Spread(weight.shape[0], ranks.number, ranks.count)
        part = spread.part(weight)
        return search(vectors[ranks.number], part, spread, reader(part), ranks, ops)

    for found, z in zip(on_ranks(len(vectors), work), vectors, strict=True):
        assert torch.equal(found, ops.nearest_codes(z, weight))


@settings(max_examples=40, deadline=None)
@given(case=cases(), dtype=st.sampled_from((torch.float32, torch.bfloat16)), data=st.data())
def test_rows_are_those_of_the_whole_table(
    case: tuple[TernaryWeight, list[Tensor], Tensor], dtype: torch.dtype, data: st.DataObject
) -> None:
    weight, vectors, _ = case
    ids = [torch.randint(0, weight.shape[0], (len(each), 2)) for each in vectors]

    def work(ranks: Ranks) -> Tensor:
        spread = Spread(weight.shape[0], ranks.number, ranks.count)
        return fetched(ids[ranks.number], spread, reader(spread.part(weight)), ranks, dtype)

    for found, wanted in zip(on_ranks(len(ids), work), ids, strict=True):
        assert torch.equal(found, ops.embedding(wanted, weight, dtype=dtype)) and found.dtype is dtype


def test_every_scale_and_sign_is_a_byte() -> None:
    exponents = torch.arange(-32, 16, dtype=torch.int8)[:, None]
    trits = torch.tensor([[-1, 0, 1]], dtype=torch.int8).expand(len(exponents), -1)
    rows = ops.dequantize(weight_of_trits(trits.contiguous(), exponents))
    sent = spread_module.as_bytes(rows)
    assert sent.dtype is torch.int8 and sent.unique().numel() == 2 * 48 + 1
    assert torch.equal(spread_module.of_bytes(sent, torch.float32), rows)


@settings(max_examples=80, deadline=None)
@given(case=cases(), data=st.data())
def test_codes_die_and_become_vectors_as_in_the_whole_table(
    case: tuple[TernaryWeight, list[Tensor], Tensor], data: st.DataObject
) -> None:
    """Revival in a window that begins anywhere, and wraps: the same table and the same counts."""
    weight, vectors, usage = case
    num_codes = weight.shape[0]
    first = data.draw(st.integers(0, 3 * num_codes), label="first")
    window = data.draw(st.integers(0, num_codes), label="window")
    z = torch.cat(vectors)
    ids = ops.nearest_codes(z, weight)
    # A vector that stays without a code counts for nothing.
    ids = torch.where(torch.arange(len(ids)) % 5 == 4, -1, ids)
    found = ops.revival_vectors(z, weight, ids, usage, first=first, window=window)
    whole = ops.revive_codes(weight, z, found, first=first)
    aged = ops.age_codes(usage, found, first=first)

    def work(ranks: Ranks) -> tuple[TernaryWeight, Tensor]:
        spread = Spread(num_codes, ranks.number, ranks.count)
        part, own = spread.part(weight), usage[spread.rows.start : spread.rows.stop]
        place, mine = revival(
            queries(z), part, ids, own, first=first, window=window, spread=spread, read=reader(part), ranks=ranks, ops=ops
        )  # fmt: skip
        z_seen = spread_module.vectors(queries(z))
        return ops.revive_codes(part, z_seen, mine, first=place), ops.age_codes(own, mine, first=place)

    parts = on_ranks(len(vectors), work)
    for name, tensor in whole.tensors().items():
        assert torch.equal(torch.cat([part.tensors()[name] for part, _ in parts]), tensor), name
    assert torch.equal(torch.cat([own for _, own in parts]), aged)
