"""Laws of the update: votes are counted, and counting moves no weight."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import EXPONENT_RULES, RESERVED_STEP
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import CLOCK, I8, ids, meta, ones, refusals, refused, scalar, weight
from ..subject import Subject

mutant = mutants_of("update")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


FIRST_ROWS = st.sampled_from((0, 2**20 + 5))
"""Places of a weight in its table. Few, since a kernel may be compiled for each."""


def voters(draw: st.DrawFn) -> tuple[TernaryWeight, tuple[int, int], dict[str, Any]]:
    """Draw a weight, the shape of what votes for all or some of its rows, and how."""
    weight = draw(ss.weights())
    kwargs = {"exponent_rule": draw(st.sampled_from(EXPONENT_RULES)), **draw(ss.clocks())}
    if not draw(st.booleans(), label="some rows"):
        return weight, weight.shape, kwargs
    kwargs["rows"] = draw(ss.row_choices(weight.shape[0]))
    return weight, (kwargs["rows"].numel(), weight.shape[1]), kwargs


@calls("accumulate")
def accumulate_calls(draw: st.DrawFn) -> Case:
    weight, shape, kwargs = voters(draw)
    votes = draw(ss.vote_tensors(shape)) if shape[0] else torch.zeros(shape, dtype=torch.int8)
    kwargs["first_row"] = draw(FIRST_ROWS)
    ss.with_out(draw, weight, kwargs)
    return Case((weight, votes), kwargs)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


SMALL = ss.weights(limit=33)
TINY = ss.weights(limit=13)
"""For laws that take several updates of a weight: a group that is full, one that is short, and several rows."""

RULES = st.sampled_from(("score", "sign", "frozen"))


def votes_for(weight: TernaryWeight) -> st.SearchStrategy[Tensor]:
    return ss.vote_tensors(weight.shape)


def trit_rows(weight: TernaryWeight) -> list[list[int]]:
    num_rows, num_columns = weight.shape
    flat = oracle.unpack(weight.packed.tolist(), num_rows * num_columns)
    return [flat[row * num_columns : (row + 1) * num_columns] for row in range(num_rows)]


ACCUMULATE_WRAPS = mutant(
    "accumulate_wraps",
    "count.clamp(-ACCUM_MAX, ACCUM_MAX).to(torch.int8)",
    "count.to(torch.int8)",
    compared="accumulate",
)
ACCUMULATE_TO_MINUS_128 = mutant(
    "accumulate_to_minus_128",
    "count.clamp(-ACCUM_MAX, ACCUM_MAX)",
    "count.clamp(-128, ACCUM_MAX)",
    compared="accumulate",
)
ACCUMULATE_REPLACES = mutant(
    "accumulate_replaces",
    "_saturate(trit_accum[rows].to(torch.int16) + votes_NK)",
    "_saturate(0 * trit_accum[rows].to(torch.int16) + votes_NK)",
    compared="accumulate",
)
SCORE_WITHOUT_TRITS = mutant(
    "score_without_trits",
    "votes_NK.to(torch.int32) * trits_of(weight)[rows]",
    "votes_NK.to(torch.int32)",
    compared="accumulate",
)
SCORE_DROPS_THE_TAIL = mutant(
    "score_drops_the_tail",
    "score = padded.reshape(-1, groups, weight.group_size).sum(dim=2)",
    "score = padded.reshape(-1, groups, weight.group_size)[..., : weight.group_size - 1].sum(dim=2)",
    compared="accumulate",
)
SCORE_TRUNCATED = mutant(
    "score_truncated",
    "(score + exponent_dither) >> SCORE_SHIFT",
    "torch.div(score + exponent_dither, 32, rounding_mode='trunc')",
    compared="accumulate",
)
WRITES_ITS_INPUT = mutant(
    "writes_its_input",
    "trit_accum = weight.trit_accum.clone()",
    "trit_accum = weight.trit_accum",
    compared="accumulate",
)


@law(
    weight=SMALL,
    rule=RULES,
    clock=ss.clocks(),
    data=st.data(),
    rejects=[
        ACCUMULATE_WRAPS,
        ACCUMULATE_TO_MINUS_128,
        ACCUMULATE_REPLACES,
        mutant(
            "score_after_the_flip",
            "votes_NK.to(torch.int32) * trits_of(weight)[rows]",
            "votes_NK.to(torch.int32) * (trits_of(weight)[rows] - (trit_accum[rows] >= DEFAULT_THETA).to(torch.int8)"
            " + (trit_accum[rows] <= -DEFAULT_THETA).to(torch.int8)).clamp(-1, 1)",
            compared="accumulate",
        ),
        SCORE_WITHOUT_TRITS,
        SCORE_DROPS_THE_TAIL,
        mutant(
            "score_dither_of_a_place",
            "dither[..., weight.group_size]",
            "dither[..., weight.group_size - 1]",
            compared="accumulate",
        ),
        SCORE_TRUNCATED,
        WRITES_ITS_INPUT,
    ],
)
def test_accumulate_by_element(
    ops: Subject, weight: TernaryWeight, rule: str, clock: dict[str, Any], data: st.DataObject
) -> None:
    """Counts and scores one element at a time: the trit before any flip, the exponent's own dither byte, saturation."""
    votes = data.draw(votes_for(weight))
    after = ops.accumulate(weight, votes, exponent_rule=rule, **clock)
    numbers = {name: int(value) for name, value in clock.items()}
    size, groups = weight.group_size, weight.exponents.shape[1]
    rows = zip(
        votes.tolist(),
        trit_rows(weight),
        weight.trit_accum.tolist(),
        weight.exponent_accum.tolist(),
        strict=True,
    )
    for n, (v, t, count, residue) in enumerate(rows):
        want = [oracle.saturate(a + b) for a, b in zip(count, v, strict=True)]
        assert after.trit_accum[n].tolist() == want, f"trit_accum of row {n}"
        for j in range(groups):
            place = slice(j * size, (j + 1) * size)
            score = sum(a * b for a, b in zip(v[place], t[place], strict=True))
            byte = oracle.dither(n * groups + j, size, **numbers)[size]
            level = oracle.saturate(residue[j] + oracle.exponent_vote(score, byte, rule))
            assert after.exponent_accum[n, j].item() == level, (
                f"exponent_accum of group {n, j}, score {score}"
            )


@law(
    weight=SMALL,
    rule=RULES,
    data=st.data(),
    rejects=[
        mutant("frozen_exponents_count", 'if exponent_rule != "frozen":', "if True:", compared="accumulate"),
        mutant(
            "accumulate_flips_at_once",
            "weight.with_tensors(trit_accum=trit_accum,",
            "weight.with_tensors(packed=pack_trits((trits_of(weight) - (trit_accum == 127).to(torch.int8)).clamp(-1, 1)),"
            " trit_accum=trit_accum,",
            compared="accumulate",
        ),
        WRITES_ITS_INPUT,
    ],
)
def test_accumulate_moves_no_weight(
    ops: Subject, weight: TernaryWeight, rule: str, data: st.DataObject
) -> None:
    """Accumulating changes counts only: trits and exponents keep every byte."""
    after = ops.accumulate(weight, data.draw(votes_for(weight)), exponent_rule=rule, **CLOCK)
    exact(after.packed, weight.packed)
    exact(after.exponents, weight.exponents)
    if rule == "frozen":
        exact(after.exponent_accum, weight.exponent_accum)


@law(weight=SMALL, rejects=[ACCUMULATE_WRAPS, ACCUMULATE_TO_MINUS_128])
def test_accumulate_saturates(ops: Subject, weight: TernaryWeight) -> None:
    """Two rounds of full votes reach the rail from anywhere, and stay."""
    for vote in (127, -127):
        votes = torch.full(weight.shape, vote, dtype=torch.int8)
        after = weight
        for _ in range(2):
            after = ops.accumulate(after, votes, **CLOCK)
        assert (after.trit_accum == vote).all()
        assert after.exponent_accum.min() >= -127


SCORE_DITHER_TOO_WIDE = mutant(
    "score_dither_too_wide", ">> (8 - SCORE_SHIFT)", ">> (7 - SCORE_SHIFT)", compared="accumulate"
)


@law(weight=SMALL, rejects=[ACCUMULATE_REPLACES, SCORE_DITHER_TOO_WIDE])
def test_accumulate_of_no_votes(ops: Subject, weight: TernaryWeight) -> None:
    """Votes of zero change not one byte, under every rule: a score of 0 and a dither below 32 give 0."""
    votes = torch.zeros(weight.shape, dtype=torch.int8)
    for rule in ("score", "sign", "frozen"):
        exact(ops.accumulate(weight, votes, exponent_rule=rule, **CLOCK), weight, rule)


@law(
    share=0.3,
    score=st.integers(-40, 40),
    sign=st.sampled_from((-1, 1)),
    rejects=[SCORE_DROPS_THE_TAIL, SCORE_DITHER_TOO_WIDE, SCORE_TRUNCATED],
)
def test_accumulate_exponent_is_unbiased(ops: Subject, score: int, sign: int) -> None:
    """Over all dither values of the exponent, a score moves its count by exactly score / 32 on average."""
    trits = torch.full((800, 6), sign, dtype=torch.int8)
    weight = weight_of_trits(trits, torch.zeros(800, 1, dtype=torch.int8), 6)
    dither = ops.dither_bytes(torch.arange(800)[:, None], group_size=6, **CLOCK)[..., 6].reshape(-1) // 8
    one_of_each = torch.stack([(dither == value).nonzero()[0, 0] for value in range(32)])
    votes = torch.zeros(32, 6, dtype=torch.int8)
    votes[:, 5] = score * sign
    moved = (
        ops.accumulate(weight, votes, rows=one_of_each, **CLOCK).exponent_accum.sum(dtype=torch.int64).item()
    )
    assert moved == score, f"32 groups of score {score} moved by {moved}"


@law(
    weight=SMALL,
    clock=ss.clocks(),
    data=st.data(),
    rejects=[
        mutant(
            "all_rows_at_once",
            "first_row + rows[:, None]) * groups",
            "first_row + torch.arange(rows.numel())[:, None]) * groups",
            compared="accumulate",
        ),
        mutant(
            "stale_rows",
            "trit_accum = weight.trit_accum.clone()",
            "trit_accum = weight.trit_accum * 0",
            compared="accumulate",
        ),
    ],
)
def test_accumulate_some_rows(
    ops: Subject, weight: TernaryWeight, clock: dict[str, Any], data: st.DataObject
) -> None:
    """Named rows are counted as in the whole weight. Every other row keeps every byte. Unused slots touch nothing."""
    rows = data.draw(ss.row_choices(weight.shape[0]))
    votes = data.draw(votes_for(weight))
    slots = torch.where(rows[:, None] >= 0, votes[rows], 5)
    some = ops.accumulate(weight, slots.to(torch.int8), rows=rows, **clock)
    whole = ops.accumulate(weight, votes, **clock)
    same_but_for_rows(some, whole, weight, rows)


def same_but_for_rows(some: TernaryWeight, whole: TernaryWeight, before: TernaryWeight, rows: Tensor) -> None:
    """Fail unless the named rows equal the rows of `whole`, and all other rows the rows of `before`."""
    named = torch.zeros(before.shape[0], dtype=torch.bool)
    named[rows[rows >= 0]] = True
    for name, state in (
        ("trits", lambda w: trits_of(w)),
        *((n, lambda w, n=n: w.tensors()[n]) for n in BY_ROW),
    ):
        exact(state(some)[named], state(whole)[named], f"{name} of named rows")
        exact(state(some)[~named], state(before)[~named], f"{name} of untouched rows")


BY_ROW = ("exponents", "trit_accum", "exponent_accum")


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_update = refusals(
    "update",
    refused("accumulate", "float votes", TypeError, "votes_NK", weight, ones(3, 14), **CLOCK),
    refused("accumulate", "a column too few", ValueError, "votes_NK", weight, ones(3, 13, dtype=I8), **CLOCK),
    refused("accumulate", "a vote of -128", ValueError,
            "votes_NK", weight, lambda: torch.full((3, 14), -128, dtype=I8), **CLOCK),
    refused("accumulate", "another device", ValueError, "votes_NK", weight, meta(3, 14, dtype=I8), **CLOCK),
    refused("accumulate", "an unknown rule", ValueError,
            "exponent_rule", weight, ones(3, 14, dtype=I8), exponent_rule="ema", **CLOCK),
    refused("accumulate", "a row named twice", ValueError, "rows", weight, ones(2, 14, dtype=I8), rows=ids(1, 1), **CLOCK),
    refused("accumulate", "row N", ValueError, "rows", weight, ones(1, 14, dtype=I8), rows=ids(3), **CLOCK),
    refused("accumulate", "row -2", ValueError, "rows", weight, ones(1, 14, dtype=I8), rows=ids(-2), **CLOCK),
    refused("accumulate", "a first row below 0", ValueError, "first_row", weight, ones(3, 14, dtype=I8), first_row=-1, **CLOCK),
    refused("accumulate", "more groups than are dithered", ValueError,
            "first_row", weight, ones(3, 14, dtype=I8), first_row=2**31 - 2, **CLOCK),
    refused("accumulate", "another out", ValueError, "out", weight, ones(3, 14, dtype=I8), out=lambda: weight(4), **CLOCK),
    refused("accumulate", "an out elsewhere", ValueError,
            "out", weight, ones(3, 14, dtype=I8), out=lambda: weight().to("meta"), **CLOCK),
    refused("accumulate", "the reserved step", ValueError,
            "step", weight, ones(3, 14, dtype=I8), **{**CLOCK, "step": RESERVED_STEP}),
    refused("accumulate", "step tensor -1", ValueError, "step", weight, ones(3, 14, dtype=I8), **{**CLOCK, "step": scalar(-1)}),
    refused("accumulate", "a list of rows", TypeError, "rows", weight, ones(2, 14, dtype=I8), rows=[0, 1], **CLOCK),
    refused("accumulate", "a row named twice, with an out", ValueError,
            "rows", weight, ones(2, 14, dtype=I8), rows=ids(1, 1), out=weight, **CLOCK),
    rejects=[mutant("rows_unchecked", "checks.row_values(rows, weight.shape[0])", "pass", times=3)],
)
# fmt: on
