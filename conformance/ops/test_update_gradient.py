"""The fused update: a gradient votes and its votes are counted in one call. Rows that are not finite are counted as faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import RESERVED_STEP
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import CLOCK, F32, I8, ids, meta, ones, refusals, refused, scalar, weight
from ..subject import Subject
from .test_update import BY_ROW, FIRST_ROWS, RULES, SMALL, voters
from .test_votes import DITHER_AT_RATE_ZERO, RATE_UNCHECKED

mutant = mutants_of("update")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("accumulate_gradient")
def accumulate_gradient_calls(draw: st.DrawFn) -> Case:
    weight, shape, kwargs = voters(draw)
    if draw(st.booleans(), label="faults"):
        kwargs["faults"] = torch.tensor(draw(st.sampled_from((0, 2**40))))
    kwargs["first_row"] = draw(FIRST_ROWS)
    ss.with_out(draw, weight, kwargs)
    return Case((weight, draw(ss.gradients(shape)), draw(ss.rates())), kwargs)


@calls("count_nonfinite_rows")
def count_nonfinite_rows_calls(draw: st.DrawFn) -> Case:
    return Case((draw(ss.gradients(draw(ss.gradient_shapes()))),))


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


@law(
    weight=SMALL,
    rule=RULES,
    rate=ss.rates(),
    clock=ss.clocks(),
    data=st.data(),
    rejects=[
        mutant(
            "fused_forgets_rows",
            "exponent_rule=exponent_rule,\n        rows=rows,\n        first_row=first_row",
            'exponent_rule="score",\n        rows=rows,\n        first_row=first_row',
            compared="accumulate_gradient",
        ),
    ],
)
def test_accumulate_gradient_is_its_parts(
    ops: Subject, weight: TernaryWeight, rule: str, rate: float, clock: dict[str, Any], data: st.DataObject
) -> None:
    """The fused update casts the same votes and counts them in the same way, of all rows or of some."""
    grad = data.draw(ss.gradients(weight.shape))
    rows = data.draw(st.one_of(st.none(), ss.row_choices(weight.shape[0])))
    grad = grad if rows is None else grad[rows]
    votes = ops.stochastic_votes(grad, rate, group_size=weight.group_size, rows=rows, **clock)
    parts = ops.accumulate(weight, votes, exponent_rule=rule, rows=rows, **clock)
    exact(ops.accumulate_gradient(weight, grad, rate, exponent_rule=rule, rows=rows, **clock), parts)


@law(
    weight=SMALL,
    rule=RULES,
    rate=ss.rates(),
    clock=ss.clocks(),
    data=st.data(),
    rejects=[
        mutant("a_part_is_a_weight", "(first_row + rows[:, None]) * groups", "rows[:, None] * groups", compared="accumulate"),
        mutant("votes_of_a_part_are_of_a_weight", "first_row + local", "local", compared="accumulate_gradient"),
    ],
)  # fmt: skip
def test_a_part_of_a_table_counts_as_in_the_table(
    ops: Subject, weight: TernaryWeight, rule: str, rate: float, clock: dict[str, Any], data: st.DataObject
) -> None:
    """The votes of rows that are kept apart, all of them or some, are those of the same rows in the whole table."""
    first = data.draw(st.integers(0, weight.shape[0] - 1), label="first row")
    grad = data.draw(ss.gradients(weight.shape))
    whole = ops.accumulate_gradient(weight, grad, rate, exponent_rule=rule, **clock)
    trits, last = trits_of(weight), weight.shape[0]
    kept = {name: weight.tensors()[name][first:].clone() for name in BY_ROW}
    packed = weight_of_trits(trits[first:], torch.zeros_like(kept["exponents"]), weight.group_size).packed
    part = replace(weight, packed=packed, shape=trits[first:].shape, **kept)
    got = ops.accumulate_gradient(part, grad[first:], rate, exponent_rule=rule, first_row=first, **clock)
    for name in BY_ROW:
        exact(got.tensors()[name], whole.tensors()[name][first:], name)
    rows = data.draw(ss.row_choices(last - first), label="rows of the part")
    # Two unused slots would be one row twice, if they were taken for rows.
    rows = torch.cat([rows, torch.tensor([-1, -1])])
    named = torch.where(rows >= 0, rows + first, -1)
    slots = grad[named]
    some = ops.accumulate_gradient(part, slots, rate, exponent_rule=rule, rows=rows, first_row=first, **clock)
    of_table = ops.accumulate_gradient(weight, slots, rate, exponent_rule=rule, rows=named, **clock)
    for name in BY_ROW:
        exact(some.tensors()[name], of_table.tensors()[name][first:], f"{name}, some rows")


FAULTS_WITHOUT_INFINITY = mutant(
    "faults_without_infinity",
    "(~grad_NK.isfinite().all(dim=1)).sum()",
    "grad_NK.isnan().any(dim=1).sum()",
    compared="count_nonfinite_rows",
)
COUNTS_BEFORE_IT_REFUSES = mutant(
    "counts_before_it_refuses",
    "    votes = stochastic_votes(",
    "    if faults is not None:\n        faults += 1\n    votes = stochastic_votes(",
    compared="accumulate_gradient",
)


@law(
    weight=SMALL,
    before=st.integers(0, 2**40),
    data=st.data(),
    rejects=[
        mutant(
            "faults_not_counted",
            "faults += count_nonfinite_rows(grad_NK)",
            "pass",
            compared="accumulate_gradient",
        ),
        FAULTS_WITHOUT_INFINITY,
        COUNTS_BEFORE_IT_REFUSES,
    ],
)
def test_accumulate_gradient_counts_faults(
    ops: Subject, weight: TernaryWeight, before: int, data: st.DataObject
) -> None:
    """`faults` grows by the rows that are not finite. These rows keep every byte."""
    grad = data.draw(ss.gradients(weight.shape))
    bad = [
        n
        for n, row in enumerate(grad.tolist())
        if oracle.row_exponent(row) is None and any(g != 0 for g in row)
    ]
    faults = torch.tensor(before)
    after = ops.accumulate_gradient(weight, grad, 127.0, faults=faults, **CLOCK)
    assert faults.item() == before + len(bad)
    assert ops.count_nonfinite_rows(grad).item() == len(bad)
    exact(after.trit_accum[bad], weight.trit_accum[bad], "rows that are not finite")


@law(weight=SMALL, data=st.data(), rejects=[DITHER_AT_RATE_ZERO])
def test_accumulate_gradient_at_rate_zero(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    exact(ops.accumulate_gradient(weight, data.draw(ss.gradients(weight.shape)), 0.0, **CLOCK), weight)


@law(
    grad=ss.matrix_shapes(60).flatmap(ss.gradients),
    rejects=[
        mutant(
            "faults_by_element",
            "(~grad_NK.isfinite().all(dim=1)).sum()",
            "(~grad_NK.isfinite()).sum()",
            compared="count_nonfinite_rows",
        ),
        FAULTS_WITHOUT_INFINITY,
    ],
)
def test_count_nonfinite_rows_by_row(ops: Subject, grad: Tensor) -> None:
    want = sum(not all(abs(g) < float("inf") for g in row) for row in grad.tolist())
    exact(ops.count_nonfinite_rows(grad), torch.tensor(want))


# --- what is refused -------------------------------------------------------------------------------------------------


def faulty(*shape: int) -> Callable[[], Tensor]:
    """Return a maker of a gradient of ones whose last element is a NaN, so that it would be counted."""
    return lambda: torch.ones(shape).index_fill_(-1, torch.tensor([shape[-1] - 1]), float("nan"))


# fmt: off
test_refusals_of_update_gradient = refusals(
    "update_gradient",
    refused("accumulate_gradient", "float64", TypeError, "grad_NK", weight, ones(3, 14, dtype=torch.float64), 1.0, **CLOCK),
    refused("accumulate_gradient", "another shape", ValueError, "grad_NK", weight, ones(14, 3), 1.0, **CLOCK),
    refused("accumulate_gradient", "rate 200", ValueError, "rate", weight, ones(3, 14), 200.0, **CLOCK),
    refused("accumulate_gradient", "rate tensor -1", ValueError, "rate", weight, ones(3, 14), scalar(-1.0, F32), **CLOCK),
    refused("accumulate_gradient", "rate tensor NaN", ValueError,
            "rate", weight, ones(3, 14), scalar(float("nan"), F32), **CLOCK),
    refused("accumulate_gradient", "step tensor 2**32 + 5", ValueError,
            "step", weight, ones(3, 14), 1.0, **{**CLOCK, "step": scalar(2**32 + 5)}),
    refused("accumulate_gradient", "the reserved step", ValueError,
            "step", weight, ones(3, 14), 1.0, **{**CLOCK, "step": RESERVED_STEP}),
    refused("accumulate_gradient", "a first row of 2.0", TypeError, "first_row", weight, ones(3, 14), 1.0, first_row=2.0, **CLOCK),
    refused("accumulate_gradient", "more groups than are dithered", ValueError,
            "first_row", weight, ones(3, 14), 1.0, first_row=2**31 - 2, **CLOCK),
    refused("accumulate_gradient", "a list of rows", TypeError, "rows", weight, ones(2, 14), 1.0, rows=[0, 1], **CLOCK),
    refused("accumulate_gradient", "an out elsewhere", ValueError,
            "out", weight, faulty(3, 14), 1.0, faults=scalar(0), out=lambda: weight().to("meta"), **CLOCK),
    refused("accumulate_gradient", "faults elsewhere", ValueError,
            "faults", weight, faulty(3, 14), 1.0, faults=meta(dtype=torch.int64), out=weight, **CLOCK),
    refused("accumulate_gradient", "an unknown rule, with faults", ValueError,
            "exponent_rule", weight, faulty(3, 14), 1.0, exponent_rule="ema", faults=scalar(5), out=weight, **CLOCK),
    refused("accumulate_gradient", "seed -1, with faults", ValueError,
            "seed", weight, faulty(3, 14), 1.0, faults=scalar(5), out=weight, **{**CLOCK, "seed": -1}),
    refused("accumulate_gradient", "a row named twice, with faults", ValueError,
            "rows", weight, faulty(2, 14), 1.0, rows=ids(1, 1), faults=scalar(5), out=weight, **CLOCK),
    refused("accumulate_gradient", "a row named twice", ValueError,
            "rows", weight, ones(2, 14), 1.0, rows=ids(1, 1), **CLOCK),
    refused("accumulate_gradient", "int32 faults", TypeError,
            "faults", weight, ones(3, 14), 1.0, faults=ones(dtype=torch.int32), **CLOCK),
    refused("accumulate_gradient", "an unknown rule", ValueError,
            "exponent_rule", weight, ones(3, 14), 1.0, exponent_rule="", **CLOCK),
    refused("count_nonfinite_rows", "int8", TypeError, "grad_NK", ones(3, 14, dtype=I8)),
    rejects=[RATE_UNCHECKED, COUNTS_BEFORE_IT_REFUSES],
)
# fmt: on
