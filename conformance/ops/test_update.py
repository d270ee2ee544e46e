"""Laws of the update: votes are counted, full counts move one level, against the gradient, and nothing else moves."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import level_range
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight
from conformance import oracle
from conformance import strategies as ss
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject

SMALL = ss.weights(limit=33)
ON_FLIP = st.sampled_from(("reset", "carry"))
RULES = st.sampled_from(("score", "sign", "frozen"))
THETAS = st.one_of(st.sampled_from((1, 2, 16, 127)), st.integers(1, 127))
CLOCK = {"seed": 11, "step": 12, "tensor_id": 13}


def _votes(weight: TernaryWeight) -> st.SearchStrategy[Tensor]:
    return ss.vote_tensors(weight.shape)


def _trits(weight: TernaryWeight) -> list[list[int]]:
    num_rows, num_columns = weight.shape
    flat = oracle.unpack(weight.packed.tolist(), num_rows * num_columns)
    return [flat[row * num_columns : (row + 1) * num_columns] for row in range(num_rows)]


@law(weight=SMALL, rule=RULES, clock=ss.clocks(), data=st.data())
def test_accumulate_by_element(
    ops: Subject, weight: TernaryWeight, rule: str, clock: dict[str, Any], data: st.DataObject
) -> None:
    """Counts and scores one element at a time: the trit before any flip, the exponent's own dither byte, saturation."""
    votes = data.draw(_votes(weight))
    after = ops.accumulate(weight, votes, exponent_rule=rule, **clock)
    numbers = {name: int(value) for name, value in clock.items()}
    size, groups = weight.group_size, weight.exponents.shape[1]
    rows = zip(
        votes.tolist(),
        _trits(weight),
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


@law(weight=SMALL, rule=RULES, data=st.data())
def test_accumulate_moves_no_weight(
    ops: Subject, weight: TernaryWeight, rule: str, data: st.DataObject
) -> None:
    """Accumulating changes counts only: trits and exponents keep every byte."""
    after = ops.accumulate(weight, data.draw(_votes(weight)), exponent_rule=rule, **CLOCK)
    exact(after.packed, weight.packed)
    exact(after.exponents, weight.exponents)
    if rule == "frozen":
        exact(after.exponent_accum, weight.exponent_accum)


@law(weight=SMALL)
def test_accumulate_saturates(ops: Subject, weight: TernaryWeight) -> None:
    """Two rounds of full votes reach the rail from anywhere, and stay."""
    for vote in (127, -127):
        votes = torch.full(weight.shape, vote, dtype=torch.int8)
        after = weight
        for _ in range(2):
            after = ops.accumulate(after, votes, **CLOCK)
        assert (after.trit_accum == vote).all()
        assert after.exponent_accum.min() >= -127


@law(weight=SMALL)
def test_accumulate_of_no_votes(ops: Subject, weight: TernaryWeight) -> None:
    """Votes of zero change not one byte, under every rule: a score of 0 and a dither below 32 give 0."""
    votes = torch.zeros(weight.shape, dtype=torch.int8)
    for rule in ("score", "sign", "frozen"):
        exact(ops.accumulate(weight, votes, exponent_rule=rule, **CLOCK), weight, rule)


@law(share=0.3, score=st.integers(-40, 40), sign=st.sampled_from((-1, 1)))
def test_accumulate_exponent_is_unbiased(ops: Subject, score: int, sign: int) -> None:
    """Over all dither values of the exponent, a score moves its count by exactly score / 32 on average."""
    trits = torch.full((800, 6), sign, dtype=torch.int8)
    weight = weight_of_trits(trits, torch.zeros(800, 1, dtype=torch.int8), 6)
    votes = torch.zeros(800, 6, dtype=torch.int8)
    votes[:, 5] = score * sign
    dither = ops.dither_bytes(torch.arange(800)[:, None], group_size=6, **CLOCK)[..., 6].reshape(-1) // 8
    one_of_each = [int((dither == value).nonzero()[0]) for value in range(32)]
    moved = ops.accumulate(weight, votes, **CLOCK).exponent_accum[one_of_each].sum(dtype=torch.int64).item()
    assert moved == score, f"32 groups of score {score} moved by {moved}"


@law(weight=SMALL, clock=ss.clocks(), data=st.data())
def test_accumulate_some_rows(
    ops: Subject, weight: TernaryWeight, clock: dict[str, Any], data: st.DataObject
) -> None:
    """Named rows are counted as in the whole weight; every other row keeps every byte; unused slots touch nothing."""
    rows = data.draw(ss.row_choices(weight.shape[0]))
    votes = data.draw(_votes(weight))
    slots = torch.where(rows[:, None] >= 0, votes[rows], 5)
    some = ops.accumulate(weight, slots.to(torch.int8), rows=rows, **clock)
    whole = ops.accumulate(weight, votes, **clock)
    _same_but_for_rows(some, whole, weight, rows)


@law(weight=SMALL, theta=THETAS, theta_e=THETAS, on_flip=ON_FLIP)
def test_apply_step_by_element(
    ops: Subject, weight: TernaryWeight, theta: int, theta_e: int, on_flip: str
) -> None:
    """Every trit and exponent by itself: against its count, one level, held at the rails; then its count."""
    after = ops.apply_step(weight, theta=theta, theta_e=theta_e, on_flip=on_flip)
    for n, (before, count, now, kept) in enumerate(
        zip(_trits(weight), weight.trit_accum.tolist(), _trits(after), after.trit_accum.tolist(), strict=True)
    ):
        want = [oracle.step_trit(t, c, theta, on_flip) for t, c in zip(before, count, strict=True)]
        assert list(zip(now, kept, strict=True)) == want, f"trits of row {n}"
    low, high = level_range(weight.mantissa_bits)
    levels = zip(weight.exponents.flatten().tolist(), weight.exponent_accum.flatten().tolist(), strict=True)
    want = [oracle.step_exponent(level, count, theta_e, low, high) for level, count in levels]
    now = zip(after.exponents.flatten().tolist(), after.exponent_accum.flatten().tolist(), strict=True)
    assert list(now) == want, "exponents"


@law(weight=SMALL, theta=THETAS)
def test_apply_step_is_idle_the_second_time(ops: Subject, weight: TernaryWeight, theta: int) -> None:
    """Under `reset` no trit is left with a full count; exponents above a theta_e of 64 neither."""
    once = ops.apply_step(weight, theta=theta, theta_e=64)
    exact(ops.apply_step(once, theta=theta, theta_e=64), once)


@law(weight=SMALL, theta=THETAS)
def test_apply_step_carries_the_excess(ops: Subject, weight: TernaryWeight, theta: int) -> None:
    """Under `carry` a full count loses theta towards zero, and keeps its remainder for the next step."""
    after = ops.apply_step(weight, theta=theta, on_flip="carry").trit_accum.to(torch.int32)
    count = weight.trit_accum.to(torch.int32)
    exact(after, torch.where(count.abs() >= theta, count - count.sign() * theta, count))


@law(weight=SMALL, theta=THETAS)
def test_apply_step_holds_the_rails(ops: Subject, weight: TernaryWeight, theta: int) -> None:
    """Pushed outwards for good, trits rest at plus and minus one and exponents at their rails."""
    low, high = level_range(weight.mantissa_bits)
    for push in (127, -127):
        after = weight
        for _ in range(3):
            pushed = {
                name: torch.full_like(after.tensors()[name], push)
                for name in ("trit_accum", "exponent_accum")
            }
            after = after.with_tensors(
                **pushed, exponents=torch.full_like(after.exponents, low if push > 0 else high)
            )
            after = ops.apply_step(after, theta=theta, theta_e=theta)
        assert (trits_of(after) == (-1 if push > 0 else 1)).all(), "a trit beyond its rail, or short of it"
        assert (after.exponents == (low if push > 0 else high)).all(), "an exponent beyond its rail"


@law(weight=SMALL, theta=THETAS, on_flip=ON_FLIP, data=st.data())
def test_apply_step_some_rows(
    ops: Subject, weight: TernaryWeight, theta: int, on_flip: str, data: st.DataObject
) -> None:
    rows = data.draw(ss.row_choices(weight.shape[0]))
    some = ops.apply_step(weight, theta=theta, theta_e=theta, on_flip=on_flip, rows=rows)
    whole = ops.apply_step(weight, theta=theta, theta_e=theta, on_flip=on_flip)
    _same_but_for_rows(some, whole, weight, rows)


def _same_but_for_rows(
    some: TernaryWeight, whole: TernaryWeight, before: TernaryWeight, rows: Tensor
) -> None:
    """Fail unless the named rows are those of `whole` and all others those of `before`."""
    named = torch.zeros(before.shape[0], dtype=torch.bool)
    named[rows[rows >= 0]] = True
    for name, state in (
        ("trits", lambda w: trits_of(w)),
        *((n, lambda w, n=n: w.tensors()[n]) for n in _BY_ROW),
    ):
        exact(state(some)[named], state(whole)[named], f"{name} of named rows")
        exact(state(some)[~named], state(before)[~named], f"{name} of untouched rows")


_BY_ROW = ("exponents", "trit_accum", "exponent_accum")


@law(weight=SMALL, data=st.data(), on_flip=ON_FLIP)
def test_update_in_place(ops: Subject, weight: TernaryWeight, data: st.DataObject, on_flip: str) -> None:
    """`out` receives the whole result, whether it is another weight or the weight itself."""
    votes = data.draw(_votes(weight))
    grad = data.draw(ss.gradients(weight.shape))
    rows = data.draw(ss.row_choices(weight.shape[0]))
    calls = (
        ("accumulate", (votes,), CLOCK),
        ("accumulate_gradient", (grad, 1.0), CLOCK),
        ("apply_step", (), {"theta": 2, "theta_e": 3, "on_flip": on_flip}),
        ("apply_step", (), {"theta": 2, "theta_e": 3, "on_flip": on_flip, "rows": rows}),
    )
    for op, args, kwargs in calls:
        want = ops.call(op, weight, *args, **kwargs)
        other = weight.clone().with_tensors(packed=torch.zeros_like(weight.packed))
        exact(ops.call(op, weight, *args, out=other, **kwargs), want, f"{op} into another weight")
        itself = weight.clone()
        exact(ops.call(op, itself, *args, out=itself, **kwargs), want, f"{op} in place")


@law(weight=SMALL, rule=RULES, rate=ss.rates(), clock=ss.clocks(), data=st.data())
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


@law(weight=SMALL, before=st.integers(0, 2**40), data=st.data())
def test_accumulate_gradient_counts_faults(
    ops: Subject, weight: TernaryWeight, before: int, data: st.DataObject
) -> None:
    """`faults` grows by the rows that are not finite; such rows keep every byte."""
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


@law(weight=SMALL, data=st.data())
def test_accumulate_gradient_at_rate_zero(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    exact(ops.accumulate_gradient(weight, data.draw(ss.gradients(weight.shape)), 0.0, **CLOCK), weight)


@law(
    weight=ss.weights(limit=33, levels=(-8, 8)),
    seed=ss.GENERATOR_SEEDS,
    rule=st.sampled_from(("score", "sign")),
)
def test_update_descends(ops: Subject, weight: TernaryWeight, seed: int, rule: str) -> None:
    """From empty counts, every trit and every exponent moves against its gradient: no term of sum g * dW is positive.

    The gradient has one magnitude, so that at rate 127 an element votes its sign at full strength and dither cannot
    turn it; a group's exponent follows the sign of g * W over the group.
    """
    zero = {name: torch.zeros_like(weight.tensors()[name]) for name in ("trit_accum", "exponent_accum")}
    weight = weight.with_tensors(**zero)
    signs = torch.randint(0, 2, weight.shape, generator=ss.generator(seed)) * 2.0 - 1.0
    before = dequantize(weight, dtype=torch.float64)
    frozen = ops.accumulate_gradient(weight, signs, 127.0, exponent_rule="frozen", **CLOCK)
    moved = dequantize(ops.apply_step(frozen), dtype=torch.float64) - before
    assert (signs * moved <= 0).all(), "a trit moved with its gradient"
    assert not moved.any() or (signs * moved).sum() < 0
    can_move = (trits_of(weight) * signs) > -1
    assert (moved != 0)[can_move].all(), "a trit with a full count did not move"
    votes = (signs * 127).to(torch.int8)
    scored = ops.apply_step(ops.accumulate(weight, votes, exponent_rule=rule, **CLOCK), theta_e=1, theta=127)
    size, groups = weight.group_size, weight.exponents.shape[1]
    raised = (scored.exponents.to(torch.int64) - weight.exponents).repeat_interleave(size, dim=1)[
        :, : weight.shape[1]
    ]
    terms = torch.nn.functional.pad(signs * before, (0, groups * size - weight.shape[1])).reshape(
        -1, groups, size
    )
    slope = terms.sum(dim=2).sign().to(torch.int64).repeat_interleave(size, dim=1)[:, : weight.shape[1]]
    assert (raised * slope <= 0).all(), "an exponent moved with its gradient"
    assert (raised == -slope)[:, :1].all() or rule == "score", "an exponent with a full count did not move"


@law(grad=ss.matrix_shapes(60).flatmap(ss.gradients))
def test_count_nonfinite_rows_by_row(ops: Subject, grad: Tensor) -> None:
    want = sum(not all(abs(g) < float("inf") for g in row) for row in grad.tolist())
    exact(ops.count_nonfinite_rows(grad), torch.tensor(want))


@law(weight=SMALL, data=st.data())
def test_count_changed_trits_by_trit(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Counts trits, not bytes; neither exponents nor accumulators matter; symmetric, and 0 for a weight and itself."""
    other = data.draw(ss.weights(weight.shape))
    one, two = torch.tensor(_trits(weight)), torch.tensor(_trits(other))
    want = torch.tensor(
        sum(a != b for a, b in zip(one.flatten().tolist(), two.flatten().tolist(), strict=True))
    )
    exact(ops.count_changed_trits(weight, other), want)
    exact(ops.count_changed_trits(other, weight), want)
    exact(
        ops.count_changed_trits(weight, weight.with_tensors(exponents=weight.exponents + 0)), torch.tensor(0)
    )
