"""A position sees an unbroken past, in blocks that grow with their age, whatever else is asked in the same call."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from arbitor.reference.constants import CONTEXT_CHILDREN as CHILDREN
from arbitor.reference.constants import CONTEXT_LEVELS as LEVELS
from arbitor.reference.graph.scheduler import ContextAttentionScheduler
from arbitor.reference.ops.attention import block_starts
from conformance.graph.models import NANO

SHAPES = [(6, 2, 1), (4, 4, 2), (3, 1, 2), (1, 1, 1), (512, 64, 16)]
"""Window, block and summaries a level."""

View = dict[int, float]
"""What one query sees: the bias of a row by its place in the log."""


def scheduler(window: int, block: int, num_summaries: int) -> ContextAttentionScheduler:
    config = replace(NANO, window=window, block=block, num_summaries=num_summaries)
    return ContextAttentionScheduler(config)


def log_order(block: int, positions: int) -> list[tuple[int, int]]:
    """Return (positions, first position) of every row of the log, by reading positions one after the other."""
    rows = []
    for position in range(positions):
        rows.append((1, position))
        for level in range(LEVELS):
            size = block * CHILDREN**level
            if (position + 1) % size == 0:
                rows.append((size, position + 1 - size))
    return rows


def by_hand(position: int, window: int, block: int, num_summaries: int) -> list[tuple[int, int]]:
    """Return (positions, first position) of what a position sees, youngest first, from the words of the spec."""
    start = 0
    while position - (start + block) + 1 >= window:
        start += block
    seen = [(1, one) for one in range(start, position + 1)]
    size = block
    for _ in range(LEVELS):
        count = 0
        while start > 0 and (count < num_summaries or start % (CHILDREN * size)):
            start, count = start - size, count + 1
            seen.append((size, start))
        size *= CHILDREN
    return seen


def views(tested: ContextAttentionScheduler, first: list[int], num_queries: int) -> list[list[View]]:
    """Return what every query sees, by sequence."""
    seen = tested.seen(torch.tensor(first), num_queries)
    assert seen.places_BS.min() >= 0
    found = []
    for places, bias_QS in zip(seen.places_BS.tolist(), seen.bias_BQS.tolist(), strict=True):
        found.append([])
        for row in bias_QS:
            shown = [(place, bias) for place, bias in zip(places, row, strict=True) if bias > -math.inf]
            assert len({place for place, _ in shown}) == len(shown), "a row is seen twice"
            found[-1].append(dict(shown))
    return found


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_a_position_sees_what_the_spec_says(shape: tuple[int, int, int]) -> None:
    tested, order = scheduler(*shape), log_order(shape[1], 400)
    for position in (*range(40), 63, 64, 127, 255, 256, 399):
        [[view]] = views(tested, [position], 1)
        got = sorted((*order[place], bias) for place, bias in view.items())
        want = by_hand(position, *shape)
        assert [row[:2] for row in got] == sorted(want)
        for size, _, bias in got:
            assert bias == pytest.approx(math.log(size), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", [0, 5, 511, 512, 700, 10_000, 123_456, 5_000_000])
def test_the_past_is_seen_without_gaps_at_bounded_cost(shape: tuple[int, int, int], position: int) -> None:
    window, block, num_summaries = shape
    tested = scheduler(*shape)
    starts = [int(start) for start in block_starts(torch.tensor(position), *shape)]
    assert starts[0] % block == 0 and (starts[0] == 0 or window <= position + 1 - starts[0] < window + block)
    for level, size in enumerate(tested.sizes):
        blocks, rest = divmod(starts[level] - starts[level + 1], size)
        assert rest == 0 and starts[level + 1] % (CHILDREN * size) == 0
        assert num_summaries <= blocks < num_summaries + CHILDREN or starts[level + 1] == 0
    [[view]] = views(tested, [position], 1)
    assert len(view) <= window + block - 1 + LEVELS * (num_summaries + CHILDREN - 1)
    seen = sum(round(math.exp(bias)) if bias < 8 else math.exp(bias) for bias in view.values())
    assert seen == pytest.approx(position + 1 - starts[-1], rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_what_a_position_sees_is_its_own_affair(shape: tuple[int, int, int]) -> None:
    """A position sees the same alone and among others, in one sequence and beside another. Shapes depend on the count alone."""
    tested, first, count = scheduler(*shape), [0, 37, 130], 41
    together = views(tested, first, count)
    for sequence, start in enumerate(first):
        for ahead in range(0, count, 5):
            assert together[sequence][ahead] == views(tested, [start + ahead], 1)[0][0]
    shapes = {tested.seen(torch.tensor([start]), 7).bias_BQS.shape for start in (0, 9, 10**6)}
    assert len(shapes) == 1


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_log_has_a_place_for_every_row(shape: tuple[int, int, int]) -> None:
    tested, order = scheduler(*shape), log_order(shape[1], 300)
    assert tested.log_size(300) == len(order)
    places = tested.place_of_position(torch.arange(300)).tolist()
    assert [order[place] for place in places] == [(1, position) for position in range(300)]
    for level, size in enumerate(tested.sizes):
        places += tested.place_of_block(level, torch.arange(300 // size)).tolist()
    assert sorted(places) == list(range(len(order)))
    for level, size in enumerate(tested.sizes):
        blocks = torch.arange(300 // size)
        rows = [order[place] for place in tested.place_of_block(level, blocks).tolist()]
        assert rows == [(size, size * block) for block in blocks.tolist()]
        for block, places in zip(
            blocks.tolist(), tested.places_of_parts(level, blocks).tolist(), strict=True
        ):
            part = size // (CHILDREN if level else shape[1])
            assert [order[place][1] for place in places] == list(
                range(size * block, size * (block + 1), part)
            )
