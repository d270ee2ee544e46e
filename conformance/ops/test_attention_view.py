"""Laws of the view on a long past: what a position sees is told in plain Python, and depends on no other query."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import ids, refusals, refused
from ..subject import Subject

mutant = mutants_of("attention")

SIZES = st.sampled_from(((6, 2, 1), (4, 4, 2), (3, 1, 2), (1, 1, 1), (40, 5, 3)))
"""Window, block and summaries a level."""

FIRST = st.one_of(st.integers(0, 90), st.sampled_from((1_000, 99_999, 2**30)))
"""First positions: where the first blocks come and go, and after long texts."""


def named(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("window", "block", "num_summaries"), sizes, strict=True))


@calls("visible_slots")
def visible_slots_calls(draw: st.DrawFn) -> Case:
    first = draw(st.lists(FIRST, max_size=3), label="first")
    num_queries = draw(st.sampled_from((1, 2, 5, 19)), label="Q")
    first_B = torch.tensor(first, dtype=torch.int64)
    return Case((first_B,), {"num_queries": num_queries, **named(draw(SIZES))})


def log_place(position: int, block: int) -> int:
    return position + sum(position // (block * 4**level) for level in range(8))


def seen_by_hand(position: int, window: int, block: int, num_summaries: int) -> dict[int, float]:
    """Return the biases of the rows that a position sees by their place, youngest first, from the words of the spec."""
    start = block * max(0, (position + 1 - window) // block)
    found = {log_place(each, block): 0.0 for each in range(start, position + 1)}
    for level in range(8):
        size = block * 4**level
        end, start = start, 4 * size * max(0, (start - num_summaries * size) // (4 * size))
        for begin in range(start, end, size):
            found[log_place(begin + size - 1, block) + 1 + level] = math.log(size)
    return found


@law(
    first=st.lists(FIRST, min_size=1, max_size=3),
    num_queries=st.sampled_from((1, 2, 17)),
    sizes=SIZES,
    rejects=[
        mutant("a_window_of_one_more", "(positions + 1 - window) // block", "(positions - window) // block",
               compared="visible_slots"),
        mutant("future_positions", "& (exact_BS[:, None] <= last_BQ[:, :, None])", "", compared="visible_slots"),
        mutant("blocks_twice", "& (begin_B1S < starts[level])", "", compared="visible_slots"),
        mutant("blocks_of_one_weight", "weights.append(math.log(size))", "weights.append(math.log(block))",
               compared="visible_slots"),
        mutant("blocks_at_their_position", "- 1, sizes) + 1 + level)", "- 1, sizes))", compared="visible_slots"),
        mutant("its_own_place_by_count", "place_in_log(last_BQ, sizes)\n", "last_BQ\n", compared="visible_slots"),
    ],
)  # fmt: skip
def test_visible_slots_by_hand(
    ops: Subject, first: list[int], num_queries: int, sizes: tuple[int, int, int]
) -> None:
    """Each query sees the rows that plain Python names, each once, with its weight. Its own row is the last position's."""
    window, block, num_summaries = sizes
    places, bias, own = ops.visible_slots(torch.tensor(first), num_queries=num_queries, **named(sizes))
    for sequence, begin in enumerate(first):
        for query in range(num_queries):
            row = bias[sequence, query]
            shown = row > -math.inf
            got = dict(zip(places[sequence][shown].tolist(), row[shown].tolist(), strict=True))
            want = seen_by_hand(begin + query, window, block, num_summaries)
            assert len(got) == int(shown.sum()), "a row is seen twice"
            assert got == {place: torch.tensor(weight).item() for place, weight in want.items()}
            assert own[sequence, query] == log_place(begin + query, block)


@law(
    first=FIRST,
    sizes=SIZES,
    rejects=[
        mutant("oldest_of_the_newest", "oldest, newest = starts_of(first_B1), starts_of(first_B1 + num_queries - 1)",
               "oldest = newest = starts_of(first_B1 + num_queries - 1)", compared="visible_slots"),
    ],
)  # fmt: skip
def test_visible_slots_of_each_query_alone(ops: Subject, first: int, sizes: tuple[int, int, int]) -> None:
    """What a query sees beside others is what it sees alone."""
    places, bias, own = ops.visible_slots(torch.tensor([first]), num_queries=9, **named(sizes))
    for query in range(9):
        alone = ops.visible_slots(torch.tensor([first + query]), num_queries=1, **named(sizes))
        views = []
        for of_places, of_bias in ((places[0], bias[0, query]), (alone[0][0], alone[1][0, 0])):
            shown = of_bias > -math.inf
            order = of_places[shown].argsort()
            views.append((of_places[shown][order], of_bias[shown][order]))
        exact(views[0], views[1], f"query {query}")
        exact(own[0, query], alone[2][0, 0])


HOW = {"num_queries": 1, "window": 6, "block": 2, "num_summaries": 1}


# fmt: off
test_refusals_of_attention_view = refusals(
    "attention_view",
    refused("visible_slots", "int32 positions", TypeError, "first_B", lambda: torch.zeros(2, dtype=torch.int32), **HOW),
    refused("visible_slots", "a matrix of positions", ValueError, "first_B", lambda: torch.zeros(2, 1, dtype=torch.int64), **HOW),
    refused("visible_slots", "position -1", ValueError, "first_B", ids(0, -1), **HOW),
    refused("visible_slots", "no query", ValueError, "num_queries", ids(0), **{**HOW, "num_queries": 0}),
    refused("visible_slots", "half a window", TypeError, "window", ids(0), **{**HOW, "window": 0.5}),
    refused("visible_slots", "no window", ValueError, "window", ids(0), **{**HOW, "window": 0}),
    refused("visible_slots", "no block", ValueError, "block", ids(0), **{**HOW, "block": 0}),
    refused("visible_slots", "no summaries", ValueError, "num_summaries", ids(0), **{**HOW, "num_summaries": 0}),
    rejects=[mutant("views_unchecked", "checks.values_between(\"first_B\", first_B, 0, 2**48)", "pass")],
)
# fmt: on
