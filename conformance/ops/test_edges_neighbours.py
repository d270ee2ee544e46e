"""Tables of neighbours: frequent targets are kept, new ones start fresh, and only the sources' rows change.

Legend: N nodes, J slots of a row, M pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import I8, ids, meta, ones, refusals, refused, weight
from ..subject import Subject

mutant = mutants_of("edges")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


Tables = tuple[Tensor, Tensor, TernaryWeight]


@st.composite
def neighbour_tables(draw: st.DrawFn, num_nodes: int, num_targets: int, num_slots: int) -> Tables:
    """Draw tables: never used, filled, with low scores of which some are 0, or with scores near the rail."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    kind = draw(st.sampled_from(("new", "full", "low", "high")), label="tables")
    shape = (num_nodes, num_slots)
    names = torch.rand(num_nodes, max(num_targets, num_slots), generator=rng).argsort(dim=1)[:, :num_slots]
    neighbours = torch.where(names < num_targets, names, -1)
    low, high = {"low": (0, 4), "high": (124, 128)}.get(kind, (0, 128))
    scores = torch.randint(low, high, shape, generator=rng)
    if kind == "new":
        neighbours = torch.full(shape, -1)
    scores = torch.where(neighbours < 0, 0, scores)
    return neighbours.to(torch.int32), scores.to(torch.int8), draw(ss.weights(shape))


@st.composite
def pair_tensors(draw: st.DrawFn, num_nodes: int, num_targets: int, most: int = 300) -> tuple[Tensor, Tensor]:
    """Draw pairs: any, from few sources, or many times the same. Some are left out."""
    count = draw(st.sampled_from([size for size in (0, 1, 7, 40, most) if size <= most]), label="M")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    few = draw(st.sampled_from((1, 3, 1000)), label="spread")
    sources = torch.randint(num_nodes, (count,), generator=rng) % few
    # a skew, so that some targets are frequent
    targets = (torch.rand(count, generator=rng) ** 3 * num_targets).to(torch.int64).clamp(max=num_targets - 1)
    sources = torch.where(torch.rand(count, generator=rng) < 0.05, -1, sources)
    targets = torch.where(torch.rand(count, generator=rng) < 0.05, -1, targets)
    return sources.clamp(max=num_nodes - 1), targets


@calls("update_neighbours")
def update_neighbours_calls(draw: st.DrawFn) -> Case:
    num_nodes, num_slots = draw(st.sampled_from((1, 2, 9, 20))), draw(st.sampled_from((1, 2, 5, 10, 16)))
    loops = draw(st.booleans(), label="another table")
    num_targets = draw(st.sampled_from((1, 30, 2**31 - 1))) if loops else num_nodes
    tables = draw(neighbour_tables(num_nodes, min(num_targets, 30), num_slots))
    pairs = draw(pair_tensors(num_nodes, num_targets))
    kwargs: dict[str, Any] = {"allow_loops": loops}
    out = draw(st.sampled_from(("none", "itself", "another")), label="out")
    if out == "itself":
        kwargs["out"] = tables
    if out == "another":
        scores = torch.full_like(tables[1], 99)
        kwargs["out"] = (torch.full_like(tables[0], 7), scores, blank_like(tables[2]))
    return Case((*tables, *pairs), kwargs)


def blank_like(weight: TernaryWeight) -> TernaryWeight:
    """Return a weight of the same kind with other bytes, to be overwritten."""
    return weight.with_tensors(
        **{name: torch.zeros_like(tensor) for name, tensor in weight.tensors().items()}
    )


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


def _by_hand(tables: Tables, pairs: tuple[Tensor, Tensor], loops: bool) -> Tables:
    """Return the tables after the pairs, the rule told once more: by dictionaries, one pair of a target at a time."""
    neighbours, scores, signs = (value.clone() for value in tables)
    flat = oracle.unpack(signs.packed.tolist(), neighbours.numel())
    trits = torch.tensor(flat, dtype=torch.int8).reshape(neighbours.shape)
    counted = Counter(
        (i, j)
        for i, j in zip(*(p.tolist() for p in pairs), strict=True)
        if i >= 0 and j >= 0 and (loops or i != j)
    )
    for (source, target), count in sorted(counted.items()):
        # Beyond this number nothing changes any more.
        for _ in range(min(count, 300)):
            held = neighbours[source].tolist()
            if target in held:
                slot = held.index(target)
                scores[source, slot] = min(int(scores[source, slot]) + 1, 127)
            elif scores[source].gt(0).all():
                scores[source] -= 1
            else:
                slot = next(slot for slot, score in enumerate(scores[source].tolist()) if score <= 0)
                neighbours[source, slot], scores[source, slot] = target, 1
                trits[source, slot], signs.trit_accum[source, slot] = 1, 0
    made = weight_of_trits(trits, signs.exponents, signs.group_size, mantissa_bits=signs.mantissa_bits)
    counts = {"trit_accum": signs.trit_accum, "exponent_accum": signs.exponent_accum}
    return neighbours, scores, made.with_tensors(**counts)


PAIRS_IN_THEIR_ORDER = mutant(
    "pairs_in_their_order",
    "pairs.unique(dim=0, return_counts=True)",
    "pairs, torch.ones_like(pairs[:, 0])",
    compared="update_neighbours",
)
PAIRS_COUNT_ONCE = mutant(
    "pairs_count_once", "number[:, None]]", "number[:, None].clamp(max=1)]", compared="update_neighbours"
)
THE_OLDEST_NEIGHBOUR_GOES = mutant(
    "the_oldest_neighbour_goes",
    "    if min(scores) > 0:\n",
    "    if min(scores) > 0:\n        scores[0] = 0\n",
    compared="update_neighbours",
)
OLD_SIGNS_FOR_NEW_NEIGHBOURS = mutant(
    "old_signs_for_new_neighbours",
    "torch.where(taken, 1, trits[ids])",
    "trits[ids]",
    compared="update_neighbours",
)
OLD_VOTES_FOR_NEW_NEIGHBOURS = mutant(
    "old_votes_for_new_neighbours",
    "torch.where(taken, 0, trit_accum[ids])",
    "trit_accum[ids]",
    compared="update_neighbours",
)
ALL_SCORES_AGE = mutant(
    "all_scores_age",
    "fresh = weight_of_trits(",
    "scores_NJ = (scores_NJ - 1).clamp(min=0)\n    fresh = weight_of_trits(",
    compared="update_neighbours",
)


@law(
    num_nodes=st.sampled_from((1, 2, 9)),
    slots=st.sampled_from((1, 2, 5, 16)),
    loops=st.booleans(),
    data=st.data(),
    rejects=[
        mutant(
            "loops_kept",
            "    if not allow_loops:\n        counts &=",
            "    if False:\n        counts &=",
            compared="update_neighbours",
        ),
        PAIRS_IN_THEIR_ORDER,
        PAIRS_COUNT_ONCE,
        mutant(
            "scores_saturate_early",
            "scores[slot] = min(scores[slot] + count, SCORE_MAX)",
            "scores[slot] = min(scores[slot] + count, 3)",
            compared="update_neighbours",
        ),
        THE_OLDEST_NEIGHBOUR_GOES,
        mutant(
            "newcomers_start_at_one",
            "target, min(count, SCORE_MAX), True",
            "target, 1, True",
            compared="update_neighbours",
        ),
        mutant(
            "the_last_free_slot",
            "next(slot for slot, score in enumerate(scores) if score <= 0)",
            "max(slot for slot, score in enumerate(scores) if score <= 0)",
            compared="update_neighbours",
        ),
        OLD_SIGNS_FOR_NEW_NEIGHBOURS,
        OLD_VOTES_FOR_NEW_NEIGHBOURS,
        ALL_SCORES_AGE,
    ],
)
def test_update_neighbours_by_hand(
    ops: Subject, num_nodes: int, slots: int, loops: bool, data: st.DataObject
) -> None:
    """A batch does what its pairs do one after the other, sorted by source and target."""
    num_targets = 30 if loops else num_nodes
    tables = data.draw(neighbour_tables(num_nodes, num_targets, slots))
    pairs = data.draw(pair_tensors(num_nodes, num_targets))
    exact(ops.update_neighbours(*tables, *pairs, allow_loops=loops), _by_hand(tables, pairs, loops))


@law(
    tables=neighbour_tables(9, 9, 3),
    pairs=pair_tensors(9, 9, 40),
    seed=ss.GENERATOR_SEEDS,
    rejects=[PAIRS_IN_THEIR_ORDER],
)
def test_update_neighbours_ignores_the_order_of_pairs(
    ops: Subject, tables: Tables, pairs: tuple[Tensor, Tensor], seed: int
) -> None:
    order = torch.randperm(pairs[0].numel(), generator=ss.generator(seed))
    shuffled = tuple(part[order] for part in pairs)
    exact(ops.update_neighbours(*tables, *shuffled), ops.update_neighbours(*tables, *pairs))


@law(
    slots=st.sampled_from((1, 3, 10)),
    batches=st.lists(pair_tensors(2, 30, 40), min_size=1, max_size=3),
    data=st.data(),
    rejects=[PAIRS_COUNT_ONCE, THE_OLDEST_NEIGHBOUR_GOES],
)
def test_update_neighbours_keeps_frequent_targets(
    ops: Subject, slots: int, batches: list[tuple[Tensor, Tensor]], data: st.DataObject
) -> None:
    """The promise of heavy hitters: what more than one in J + 1 pairs of a source name is among its neighbours."""
    _, _, signs = data.draw(neighbour_tables(2, 30, slots))
    tables = (torch.full((2, slots), -1, dtype=torch.int32), torch.zeros(2, slots, dtype=torch.int8), signs)
    for pairs in batches:
        tables = ops.update_neighbours(*tables, *pairs, allow_loops=True)
    named = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    for source in range(2):
        targets = named[1][(named[0] == source) & (named[1] >= 0)].tolist()
        held = tables[0][source][tables[1][source] > 0].tolist()
        for target, count in Counter(targets).items():
            assert target in held or count * (slots + 1) <= len(targets), f"{count} of {len(targets)}"


@law(
    share=0.5,
    scores=st.lists(st.integers(1, 127), min_size=1, max_size=5),
    count=st.integers(128, 300),
    rejects=[
        mutant("counts_cut_before_the_rule", "number[:, None]]", "number[:, None].clamp(max=SCORE_MAX)]"),
    ],
)
def test_update_neighbours_of_more_pairs_than_a_score_holds(
    ops: Subject, scores: list[int], count: int
) -> None:
    """A count is cut at 127 where it becomes a score, and not before."""
    slots = len(scores)
    signs = weight_of_trits(torch.zeros(1, slots, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.int8))
    tables = (
        torch.arange(slots, dtype=torch.int32)[None],
        torch.tensor([scores], dtype=torch.int8),
        signs,
    )
    pairs = (torch.zeros(count, dtype=torch.int64), torch.full((count,), slots))
    exact(ops.update_neighbours(*tables, *pairs, allow_loops=True), _by_hand(tables, pairs, True))


@law(
    tables=neighbour_tables(20, 20, 10),
    pairs=pair_tensors(20, 20, 40),
    rejects=[
        OLD_SIGNS_FOR_NEW_NEIGHBOURS,
        OLD_VOTES_FOR_NEW_NEIGHBOURS,
        ALL_SCORES_AGE,
        mutant(
            "exponents_start_again",
            "trits, signs.exponents, signs.group_size",
            "trits, signs.exponents * 0, signs.group_size",
            compared="update_neighbours",
        ),
    ],
)
def test_update_neighbours_touches_sources_alone(
    ops: Subject, tables: Tables, pairs: tuple[Tensor, Tensor]
) -> None:
    """Rows that are no source keep every byte. Signs change only in slots that took another neighbour, and exponents never."""
    neighbours, scores, signs = ops.update_neighbours(*tables, *pairs)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[pairs[0][pairs[0] >= 0]] = False
    exact(neighbours[untouched], tables[0][untouched])
    exact(scores[untouched], tables[1][untouched])
    exact((signs.exponents, signs.exponent_accum), (tables[2].exponents, tables[2].exponent_accum))
    same = neighbours == tables[0]
    moved = (trits_of(signs) != trits_of(tables[2])) | (signs.trit_accum != tables[2].trit_accum)
    assert not moved[untouched].any()
    assert trits_of(signs)[~same].eq(1).all() and signs.trit_accum[~same].eq(0).all(), (
        "an old sign on a new neighbour"
    )


# --- what is refused -------------------------------------------------------------------------------------------------


_BF16, _I32, _I64 = torch.bfloat16, torch.int32, torch.int64


def _out(*makers: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    """Return a maker of tables to write into."""
    return lambda: tuple(make() for make in makers)


_TABLE, _SCORES = ones(3, 14, dtype=_I32), ones(3, 14, dtype=I8)
_PAIRS = (ids(0, 1), ids(2, 0))


# fmt: off
test_refusals_of_edges_neighbours = refusals(
    "edges_neighbours",
    refused("update_neighbours", "source N", ValueError, "sources_M", _TABLE, _SCORES, weight, ids(0, 3), ids(1, 1)),
    refused("update_neighbours", "source -2", ValueError, "sources_M", _TABLE, _SCORES, weight, ids(-2), ids(1)),
    refused("update_neighbours", "target N", ValueError, "targets_M", _TABLE, _SCORES, weight, ids(0), ids(3)),
    refused("update_neighbours", "target 2**31", ValueError,
            "targets_M", _TABLE, _SCORES, weight, ids(0), ids(2**31), allow_loops=True),
    refused("update_neighbours", "target -2", ValueError,
            "targets_M", _TABLE, _SCORES, weight, ids(0), ids(-2), allow_loops=True),
    refused("update_neighbours", "a number for signs to write into", TypeError, "out[2] is a int",
            _TABLE, _SCORES, weight, ids(0), ids(1), out=lambda: (_TABLE(), _SCORES(), 3)),
    refused("update_neighbours", "more targets", ValueError, "targets_M", _TABLE, _SCORES, weight, ids(0), ids(1, 2)),
    refused("update_neighbours", "a matrix of pairs", ValueError,
            "sources_M", _TABLE, _SCORES, weight, ones(1, 1, dtype=_I64), ones(1, 1, dtype=_I64)),
    refused("update_neighbours", "int32 pairs", TypeError,
            "sources_M", _TABLE, _SCORES, weight, ones(1, dtype=_I32), ids(1)),
    refused("update_neighbours", "int64 neighbours", TypeError,
            "neighbours_NJ", ones(3, 14, dtype=_I64), _SCORES, weight, *_PAIRS),
    refused("update_neighbours", "17 slots", ValueError,
            "neighbours_NJ", ones(3, 17, dtype=_I32), ones(3, 17, dtype=I8), lambda: weight(3, 17), *_PAIRS),
    refused("update_neighbours", "scores of another shape", ValueError,
            "scores_NJ", _TABLE, ones(3, 13, dtype=I8), weight, *_PAIRS),
    refused("update_neighbours", "int16 scores", TypeError,
            "scores_NJ", _TABLE, ones(3, 14, dtype=torch.int16), weight, *_PAIRS),
    refused("update_neighbours", "signs of another shape", ValueError,
            "signs", _TABLE, _SCORES, lambda: weight(3, 13), *_PAIRS),
    refused("update_neighbours", "a number for a flag", TypeError,
            "allow_loops", _TABLE, _SCORES, weight, *_PAIRS, allow_loops=1),
    refused("update_neighbours", "pairs elsewhere", ValueError,
            "sources_M", _TABLE, _SCORES, weight, meta(2, dtype=_I64), meta(2, dtype=_I64)),
    refused("update_neighbours", "out that is no tuple", TypeError,
            "out", _TABLE, _SCORES, weight, *_PAIRS, out=weight),
    refused("update_neighbours", "out of two parts", ValueError,
            "out", _TABLE, _SCORES, weight, *_PAIRS, out=(_TABLE, _SCORES)),
    refused("update_neighbours", "out of another shape", ValueError,
            "out[1]", _TABLE, _SCORES, weight, *_PAIRS, out=_out(_TABLE, ones(3, 13, dtype=I8), weight)),
    refused("update_neighbours", "signs to write into that do not fit", ValueError,
            "out", _TABLE, _SCORES, weight, *_PAIRS, out=_out(_TABLE, _SCORES, lambda: weight(4))),
    rejects=[
        mutant("pairs_unchecked", 'checks.values_between("sources_M", sources_M, -1, num_nodes - 1)', "pass"),
    ],
)
# fmt: on
