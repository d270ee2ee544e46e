"""Laws of the router's choice: exact scores choose, the lowest of equal experts comes first, and each vector chooses alone.

Legend: E experts, K inputs, M vectors.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import MAX_ROUTER_COLUMNS, groups_per_row, packed_bytes
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, ids, meta, ones, refusals, refused, weight
from ..subject import Subject
from .test_codebook import vectors
from .test_experts import EXPERTS

mutant = mutants_of("experts")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@st.composite
def routers(draw: st.DrawFn) -> TernaryWeight:
    """Draw a router's weight. Levels are near each other or over all their range. Rows may be equal, or one trit apart."""
    shape = (draw(st.one_of(EXPERTS, st.just(64)), label="E"), draw(ss.sizes(70), label="K"))
    weight = draw(ss.weights(shape, levels=draw(st.sampled_from((ss.NARROW, None)), label="levels")))
    kind = draw(st.sampled_from(("free", "equal", "one trit apart")), label="rows")
    if kind == "free":
        return weight
    experts = torch.arange(shape[0])
    rows = experts % (draw(st.sampled_from((1, 3)), label="different rows") if kind == "equal" else 1)
    trits = trits_of(weight)[rows]
    # These scores differ in their last bits alone.
    if kind == "one trit apart":
        places = (experts, experts % shape[1])
        trits[places] = (trits[places] + 2) % 3 - 1
    levels, size = weight.exponents[rows], weight.group_size
    return weight_of_trits(trits, levels, size, mantissa_bits=weight.mantissa_bits)


@st.composite
def handicaps(draw: st.DrawFn, num_experts: int) -> Tensor:
    """Draw handicaps: small ones, which decide where scores are close, or over all their range."""
    most = draw(st.sampled_from((1, 40, 32767)), label="largest handicap")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    return torch.randint(-most, most + 1, (num_experts,), generator=rng).to(torch.int16)


@calls("choose_experts")
def choose_experts_calls(draw: st.DrawFn) -> Case:
    weight = draw(routers())
    kwargs = {"top_k": draw(st.integers(1, weight.shape[0]), label="k")}
    if draw(st.booleans(), label="with handicaps"):
        kwargs["handicap_E"] = draw(handicaps(weight.shape[0]))
    return Case((draw(vectors(weight.shape[1])), weight), kwargs)


@calls("balance_experts")
def balance_experts_calls(draw: st.DrawFn) -> Case:
    num_experts = draw(st.one_of(EXPERTS, st.just(64)), label="E")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    few = draw(st.sampled_from((1, 3, num_experts)), label="experts in use")
    count = draw(st.sampled_from((0, 1, 33, 5000)), label="choices")
    chosen = torch.randint(-1, min(few, num_experts), (count,), generator=rng)
    load = torch.randint(0, 2**40, (num_experts,), generator=rng)
    tables = (load, draw(handicaps(num_experts)))
    kind = draw(st.sampled_from(("new", "others", "themselves")), label="out")
    outs = {"new": None, "others": tuple(table + 1 for table in tables), "themselves": tables}
    return Case((chosen, *tables), {} if outs[kind] is None else {"out": outs[kind]})


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


SCORES = "scores_ME = x_MK @ router_rows(weight).T"
ORDER = "order_ME = scores_ME.sort(dim=-1, descending=True, stable=True).indices"
OCTAVES = "levels.amax() - (ROUTER_OCTAVES << weight.mantissa_bits)"

TIES_TO_THE_LAST_EXPERT = mutant(
    "ties_to_the_last_expert",
    ORDER,
    "order_ME = weight.shape[0] - 1 - scores_ME.flip(1).sort(dim=-1, descending=True, stable=True).indices",
    compared="choose_experts",
)


def seen_levels(weight: TernaryWeight) -> list[list[int]]:
    """Return the levels of a router's weight as the choice sees them, by plain Python: 16 octaves at most."""
    rows = weight.exponents.tolist()
    least = max(map(max, rows)) - (16 << weight.mantissa_bits)
    return [[max(level, least) for level in row] for row in rows]


def sixteenths(x: float) -> int:
    """Return a number in whole sixteenths, by plain Python, whose round takes halves to even."""
    return 0 if math.isnan(x) else round(min(max(16 * x, -127.0), 127.0))


@law(
    weight=routers(),
    data=st.data(),
    rejects=[
        TIES_TO_THE_LAST_EXPERT,
        mutant(
            "experts_chosen_by_rounded_products",
            SCORES,
            "scores_ME = (x_MK.to(torch.bfloat16) @ router_rows(weight).T.to(torch.bfloat16)).to(torch.float64)",
            compared="choose_experts",
        ),
        mutant(
            "experts_chosen_by_vectors_as_they_are",
            "x_MK = whole_sixteenths(x).to(torch.float64)",
            "x_MK = x.nan_to_num(nan=0.0).to(torch.float64)",
            compared="choose_experts",
        ),
        mutant(
            "experts_at_all_octaves",
            OCTAVES,
            "levels.amax() - (100 << weight.mantissa_bits)",
            compared="choose_experts",
        ),
        mutant(
            "octaves_without_mantissa_bits",
            OCTAVES,
            "levels.amax() - ROUTER_OCTAVES",
            compared="choose_experts",
        ),
        mutant(
            "octaves_of_each_row",
            "levels.amax() -",
            "levels.amax(dim=1, keepdim=True) -",
            compared="choose_experts",
        ),
        mutant(
            "experts_by_score",
            "return order_ME[:, :top_k].sort(dim=-1).values",
            "return order_ME[:, :top_k]",
            compared="choose_experts",
        ),
        mutant(
            "the_least_experts",
            ORDER,
            "order_ME = scores_ME.sort(dim=-1, stable=True).indices",
            compared="choose_experts",
        ),
    ],
)
def test_choose_experts_by_fractions(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Scores without a rounding error choose, largest first, ties to the lowest expert. The chosen are in ascending order."""
    x = data.draw(vectors(weight.shape[1]))
    top_k = data.draw(st.integers(1, weight.shape[0]), label="k")
    x_MK = x.reshape(-1, weight.shape[1])[:5]
    scales = [[oracle.scale(level, weight.mantissa_bits) for level in row] for row in seen_levels(weight)]
    trits = oracle.unpack(weight.packed.tolist(), math.prod(weight.shape))
    want = []
    for row in x_MK.tolist():
        steps = list(map(sixteenths, row))
        scores = [
            sum(trits[e * len(row) + k] * of[k // weight.group_size] * step for k, step in enumerate(steps))
            for e, of in enumerate(scales)
        ]
        want.append(sorted(sorted(range(len(scores)), key=lambda e, s=scores: -s[e])[:top_k]))
    got = ops.choose_experts(x_MK, weight, top_k=top_k)
    exact(got, torch.tensor(want, dtype=torch.int64).reshape(len(want), top_k))


@law(
    weight=routers(),
    data=st.data(),
    rejects=[
        mutant(
            "handicaps_that_help",
            "scores_ME = scores_ME - handicap_E",
            "scores_ME = scores_ME + handicap_E",
            compared="choose_experts",
        ),
        mutant(
            "handicaps_in_steps_of_a_sixteenth",
            "(QUERY_STEPS / HANDICAP_STEPS)",
            "(1 / QUERY_STEPS)",
            compared="choose_experts",
        ),
    ],
)
def test_choose_experts_after_handicaps(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """A handicap of four steps counts as much as a score of 1, which a column of one sixteenth times a scale of 1 has."""
    num_experts = weight.shape[0]
    top_k = data.draw(st.integers(1, num_experts), label="k")
    handicap = data.draw(handicaps(num_experts))
    # Trits of -1 in the first columns, one for each part of the handicap: scores of whole numbers up to 2**13.
    parts = [1, 4, 16, 64, 127]
    counts = torch.randint(
        0, 5, (num_experts, len(parts)), generator=ss.generator(data.draw(ss.GENERATOR_SEEDS))
    )
    trits = (counts - 2).sign().to(torch.int8)
    router = weight_of_trits(trits, torch.zeros(num_experts, 1, dtype=torch.int8), 12)
    x = torch.tensor(parts, dtype=torch.float32) / 16
    scores = [
        4 * sum(part * int(trit) for part, trit in zip(parts, row, strict=True)) - int(taken)
        for row, taken in zip(trits, handicap, strict=True)
    ]
    want = sorted(sorted(range(num_experts), key=lambda e: -scores[e])[:top_k])
    exact(ops.choose_experts(x, router, top_k=top_k, handicap_E=handicap), torch.tensor(want))


@law(weight=routers(), data=st.data(), rejects=[TIES_TO_THE_LAST_EXPERT])
def test_choose_experts_lets_the_lowest_of_equal_rows_win(
    ops: Subject, weight: TernaryWeight, data: st.DataObject
) -> None:
    """A router beside its own copy: the first of each pair comes before the second, whatever the vector."""
    twice = weight_of_trits(
        trits_of(weight).repeat(2, 1),
        weight.exponents.repeat(2, 1),
        weight.group_size,
        mantissa_bits=weight.mantissa_bits,
    )
    x, num_experts = data.draw(vectors(weight.shape[1])), weight.shape[0]
    top_k = data.draw(st.integers(1, 2 * num_experts), label="k")
    chosen = ops.choose_experts(x, twice, top_k=top_k)
    assert chosen.shape == (*x.shape[:-1], top_k)
    for row in chosen.reshape(-1, top_k).tolist():
        assert all(expert - num_experts in row for expert in row if expert >= num_experts), row


@law(
    weight=routers(),
    data=st.data(),
    share=0.5,
    rejects=[
        mutant(
            "experts_of_all_vectors",
            SCORES,
            "scores_ME = (x_MK - x_MK.cumsum(0)[-1:].expand_as(x_MK)) @ router_rows(weight).T",
        ),
    ],
)
def test_choose_experts_of_each_vector_alone(
    ops: Subject, weight: TernaryWeight, data: st.DataObject
) -> None:
    """What a vector chooses depends neither on what comes with it nor on its place."""
    x = data.draw(vectors(weight.shape[1])).reshape(-1, weight.shape[1])
    top_k = data.draw(st.integers(1, weight.shape[0]), label="k")
    together = ops.choose_experts(x, weight, top_k=top_k)
    exact(ops.choose_experts(x.flip(0), weight, top_k=top_k).flip(0), together, "in another order")
    for place in range(min(len(x), 3)):
        exact(ops.choose_experts(x[place], weight, top_k=top_k), together[place], "alone")


@pytest.mark.parametrize("num_vectors", [2, 17], ids=["few vectors", "more"])
def test_choose_experts_of_more_than_a_kernel_ranks(subject: Subject, num_vectors: int) -> None:
    """Handicaps count among many experts as among few: here they order experts of equal rows."""
    count, rng = 1100, ss.generator(3)
    weight = weight_of_trits(torch.ones(count, 4, dtype=torch.int8), torch.zeros(count, 1, dtype=torch.int8))
    handicap = torch.randperm(count, generator=rng).to(torch.int16)
    got = subject.call("choose_experts", torch.ones(num_vectors, 4), weight, top_k=3, handicap_E=handicap)
    exact(got, handicap.argsort()[:3].sort().values.expand(num_vectors, 3).contiguous())


@law(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=9),
    data=st.data(),
    rejects=[
        mutant(
            "moves_without_a_bound",
            '.clamp(max=HANDICAP_MOVE)\n    moved_E',
            "\n    moved_E",
            compared="balance_experts",
        ),
        mutant(
            "moves_rounded_down",
            'rounding_mode="trunc"',
            'rounding_mode="floor"',
            compared="balance_experts",
        ),
        mutant("the_least_is_kept", "moved_E - moved_E.amin()", "moved_E", compared="balance_experts"),
        mutant("handicaps_of_the_idle", "num_experts * count_E - total", "total - num_experts * count_E",
               compared="balance_experts"),
        mutant("moves_without_a_choice", "torch.where(total > 0, evened_E, handicap_E)", "evened_E",
               compared="balance_experts"),
    ],
)  # fmt: skip
def test_balance_experts_by_fractions(ops: Subject, counts: list[int], data: st.DataObject) -> None:
    """In plain Python: what an expert has above its share, in sixteenths of it, cut towards 0, at most 16 of them."""
    num_experts, total = len(counts), sum(counts)
    before = data.draw(handicaps(num_experts))
    chosen = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(counts))
    order = torch.randperm(total, generator=ss.generator(data.draw(ss.GENERATOR_SEEDS)))
    load, handicap = ops.balance_experts(chosen[order], torch.arange(num_experts), before)
    assert load.tolist() == [number + count for number, count in enumerate(counts)]
    want = before.tolist()
    if total:
        moves = [min(math.trunc(Fraction(16 * (num_experts * n - total), total)), 16) for n in counts]
        want = [h + move for h, move in zip(want, moves, strict=True)]
        want = [min(h - min(want), 32767) for h in want]
    assert handicap.tolist() == want


def test_balance_experts_writes_columns_of_a_table(subject: Subject) -> None:
    """Tables to write into may lie apart in memory."""
    chosen = torch.tensor([0, 0, 1, 3])
    load, handicap = torch.arange(4), torch.tensor([0, 3, 1, 2], dtype=torch.int16)
    want = subject.call("balance_experts", chosen, load, handicap)
    out = (torch.zeros(4, 2, dtype=torch.int64)[:, 0], torch.zeros(4, 2, dtype=torch.int16)[:, 0])
    got = subject.call("balance_experts", chosen, load, handicap, out=out)
    exact(tuple(each.contiguous() for each in got), want)


# --- what is refused -------------------------------------------------------------------------------------------------


_SIX = lambda: weight(6)  # noqa: E731  six experts


def _wide_router() -> TernaryWeight:
    """Return a weight of more columns than a sum over them is exact for, on a device without memory."""
    columns = MAX_ROUTER_COLUMNS + 1
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.int8, device="meta")  # noqa: E731
    groups = groups_per_row(columns, 96)
    packed = torch.zeros(packed_bytes(columns), dtype=torch.uint8, device="meta")
    return TernaryWeight(packed, zeros(1, groups), zeros(1, columns), zeros(1, groups), (1, columns), 96)


# fmt: off
test_refusals_of_experts_choice = refusals(
    "experts_choice",
    refused("choose_experts", "no expert", ValueError, "top_k", ones(2, 14), _SIX, top_k=0),
    refused("choose_experts", "seven of six experts", ValueError, "top_k", ones(2, 14), _SIX, top_k=7),
    refused("choose_experts", "half an expert", TypeError, "top_k", ones(2, 14), _SIX, top_k=0.5),
    refused("choose_experts", "13 columns", ValueError, "x", ones(2, 13), _SIX, top_k=2),
    refused("choose_experts", "a number", ValueError, "x", ones(), _SIX, top_k=2),
    refused("choose_experts", "float16", TypeError, "x", ones(2, 14, dtype=F16), _SIX, top_k=2),
    refused("choose_experts", "another device", ValueError, "x", meta(2, 14), _SIX, top_k=2),
    refused("choose_experts", "too many columns", ValueError, "weight", meta(2, 14), _wide_router, top_k=1),
    refused("choose_experts", "five handicaps", ValueError,
            "handicap_E", ones(2, 14), _SIX, top_k=2, handicap_E=ones(5, dtype=torch.int16)),
    refused("choose_experts", "int32 handicaps", TypeError,
            "handicap_E", ones(2, 14), _SIX, top_k=2, handicap_E=ones(6, dtype=torch.int32)),
    refused("choose_experts", "handicaps elsewhere", ValueError,
            "handicap_E", ones(2, 14), _SIX, top_k=2, handicap_E=meta(6, dtype=torch.int16)),
    refused("balance_experts", "int32 choices", TypeError,
            "chosen", ones(2, dtype=torch.int32), ids(0, 0), ones(2, dtype=torch.int16)),
    refused("balance_experts", "expert E", ValueError, "chosen", ids(2), ids(0, 0), ones(2, dtype=torch.int16)),
    refused("balance_experts", "expert -2", ValueError, "chosen", ids(-2), ids(0, 0), ones(2, dtype=torch.int16)),
    refused("balance_experts", "a matrix of loads", ValueError,
            "load_E", ids(0), lambda: torch.zeros(1, 2, dtype=torch.int64), ones(2, dtype=torch.int16)),
    refused("balance_experts", "no expert", ValueError,
            "load_E", ids(-1), lambda: torch.zeros(0, dtype=torch.int64), ones(0, dtype=torch.int16)),
    refused("balance_experts", "three handicaps of two", ValueError,
            "handicap_E", ids(0), ids(0, 0), ones(3, dtype=torch.int16)),
    refused("balance_experts", "int32 handicaps", TypeError,
            "handicap_E", ids(0), ids(0, 0), ones(2, dtype=torch.int32)),
    refused("balance_experts", "choices elsewhere", ValueError,
            "load_E", meta(2, dtype=torch.int64), ids(0, 0), ones(2, dtype=torch.int16)),
    refused("balance_experts", "one table to write into", ValueError,
            "out", ids(0), ids(0, 0), ones(2, dtype=torch.int16), out=lambda: (torch.zeros(2, dtype=torch.int64),)),
    refused("balance_experts", "another table to write into", TypeError, "out", ids(0), ids(0, 0),
            ones(2, dtype=torch.int16), out=lambda: (torch.zeros(2, dtype=torch.int64),) * 2),
    rejects=[mutant("a_router_unchecked", "checks.router(x, weight, top_k, handicap_E, weight.packed)", "pass")],
)
# fmt: on
