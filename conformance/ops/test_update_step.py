"""The step of the update: full counts move one level, against the gradient, and nothing else moves. Changed trits are counted."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from arbitor.reference.constants import level_range
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import CLOCK, ids, refusals, refused, weight
from ..subject import Subject
from .test_update import (
    SCORE_WITHOUT_TRITS,
    SMALL,
    TINY,
    same_but_for_rows,
    trit_rows,
    votes_for,
)
from .test_votes import ASCENT

mutant = mutants_of("update")

THETAS = st.one_of(st.sampled_from((1, 2, 16, 127)), st.integers(1, 127))


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("apply_step")
def apply_step_calls(draw: st.DrawFn) -> Case:
    theta = draw(st.one_of(st.sampled_from((1, 16, 127)), st.integers(1, 127)), label="theta")
    theta_e = draw(st.one_of(st.sampled_from((1, 4, 127)), st.integers(1, 127)), label="theta_e")
    weight = draw(ss.weights(theta=theta))
    kwargs = {"theta": theta, "theta_e": theta_e, "on_flip": draw(st.sampled_from(("reset", "carry")))}
    if draw(st.booleans(), label="some rows"):
        kwargs["rows"] = draw(ss.row_choices(weight.shape[0]))
    ss.with_out(draw, weight, kwargs)
    return Case((weight,), kwargs)


@calls("count_changed_trits")
def count_changed_trits_calls(draw: st.DrawFn) -> Case:
    shape = draw(ss.matrix_shapes())
    return Case((draw(ss.weights(shape)), draw(ss.weights(shape))))


@calls("count_state")
def count_state_calls(draw: st.DrawFn) -> Case:
    theta = draw(THETAS, label="theta")
    return Case((draw(ss.weights(theta=theta)),), {"theta": theta})


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


ON_FLIP = st.sampled_from(("reset", "carry"))


EXPONENTS_ASCEND = mutant(
    "exponents_ascend",
    "exponents[rows].to(torch.int16) - full",
    "exponents[rows].to(torch.int16) + full",
    compared="apply_step",
)
TRITS_ASCEND = mutant("trits_ascend", "(trits[rows] - full)", "(trits[rows] + full)", compared="apply_step")
THETA_STRICT = mutant(
    "theta_strict",
    "full = (count >= theta).to(torch.int16) - (count <= -theta)",
    "full = (count > theta).to(torch.int16) - (count < -theta)",
    compared="apply_step",
)
TRITS_WRAP = mutant(
    "trits_wrap",
    "(trits[rows] - full).clamp(-1, 1)",
    "((trits[rows] - full + 4) % 3 - 1)",
    compared="apply_step",
)
EXPONENT_RAIL_OF_INT8 = mutant(
    "exponent_rail_of_int8", ".clamp(low, high)", ".clamp(-128, 127)", compared="apply_step"
)
RAIL_WITHOUT_MANTISSA = mutant(
    "rail_without_mantissa", "level_range(weight.mantissa_bits)", "level_range(0)", compared="apply_step"
)
RESET_CARRIES = mutant(
    "reset_carries",
    'torch.zeros_like(count) if on_flip == "reset" else count - full * theta',
    "count - full * theta",
    compared="apply_step",
)


@law(
    weight=SMALL,
    theta=THETAS,
    theta_e=THETAS,
    on_flip=ON_FLIP,
    rejects=[
        EXPONENTS_ASCEND,
        TRITS_ASCEND,
        THETA_STRICT,
        mutant(
            "two_levels",
            "(trits[rows] - full).clamp(-1, 1)",
            "(trits[rows] - 2 * full).clamp(-1, 1)",
            compared="apply_step",
        ),
        TRITS_WRAP,
        EXPONENT_RAIL_OF_INT8,
        RAIL_WITHOUT_MANTISSA,
        RESET_CARRIES,
        mutant(
            "exponents_reset",
            "(count - full * theta_e)",
            "torch.where(full != 0, 0, count)",
            compared="apply_step",
        ),
        mutant(
            "step_clears_all_counts", "torch.where(full != 0, kept, count)", "kept", compared="apply_step"
        ),
    ],
)
def test_apply_step_by_element(
    ops: Subject, weight: TernaryWeight, theta: int, theta_e: int, on_flip: str
) -> None:
    """Every trit and exponent moves against its own count, one level, held at the rails. Then its count follows the rule."""
    after = ops.apply_step(weight, theta=theta, theta_e=theta_e, on_flip=on_flip)
    for n, (before, count, now, kept) in enumerate(
        zip(
            trit_rows(weight),
            weight.trit_accum.tolist(),
            trit_rows(after),
            after.trit_accum.tolist(),
            strict=True,
        )
    ):
        want = [oracle.step_trit(t, c, theta, on_flip) for t, c in zip(before, count, strict=True)]
        assert list(zip(now, kept, strict=True)) == want, f"trits of row {n}"
    low, high = level_range(weight.mantissa_bits)
    levels = zip(weight.exponents.flatten().tolist(), weight.exponent_accum.flatten().tolist(), strict=True)
    want = [oracle.step_exponent(level, count, theta_e, low, high) for level, count in levels]
    now = zip(after.exponents.flatten().tolist(), after.exponent_accum.flatten().tolist(), strict=True)
    assert list(now) == want, "exponents"


@law(
    weight=SMALL,
    theta=THETAS,
    rejects=[
        RESET_CARRIES,
        mutant("exponent_count_kept", "(count - full * theta_e)", "count", compared="apply_step"),
    ],
)
def test_apply_step_is_idle_the_second_time(ops: Subject, weight: TernaryWeight, theta: int) -> None:
    """Under `reset` no trit is left with a full count. Above a theta_e of 64 no exponent is either."""
    once = ops.apply_step(weight, theta=theta, theta_e=64)
    exact(ops.apply_step(once, theta=theta, theta_e=64), once)


@law(
    weight=SMALL,
    theta=THETAS,
    rejects=[
        THETA_STRICT,
        mutant(
            "missing_carry",
            "else count - full * theta\n",
            "else torch.zeros_like(count)\n",
            compared="apply_step",
        ),
    ],
)
def test_apply_step_carries_the_excess(ops: Subject, weight: TernaryWeight, theta: int) -> None:
    """Under `carry` a full count loses theta towards zero, and keeps its remainder for the next step."""
    after = ops.apply_step(weight, theta=theta, on_flip="carry").trit_accum.to(torch.int32)
    count = weight.trit_accum.to(torch.int32)
    exact(after, torch.where(count.abs() >= theta, count - count.sign() * theta, count))


@law(weight=TINY, theta=THETAS, rejects=[TRITS_WRAP, EXPONENT_RAIL_OF_INT8, RAIL_WITHOUT_MANTISSA])
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


STEP_MOVES_EVERY_ROW = mutant(
    "step_moves_every_row",
    "    (rows,) = _used_rows(weight, rows)",
    "    (rows,) = _used_rows(weight, None)",
    compared="apply_step",
)


@law(weight=SMALL, theta=THETAS, on_flip=ON_FLIP, data=st.data(), rejects=[STEP_MOVES_EVERY_ROW])
def test_apply_step_some_rows(
    ops: Subject, weight: TernaryWeight, theta: int, on_flip: str, data: st.DataObject
) -> None:
    rows = data.draw(ss.row_choices(weight.shape[0]))
    some = ops.apply_step(weight, theta=theta, theta_e=theta, on_flip=on_flip, rows=rows)
    whole = ops.apply_step(weight, theta=theta, theta_e=theta, on_flip=on_flip)
    same_but_for_rows(some, whole, weight, rows)


@law(
    weight=TINY,
    data=st.data(),
    on_flip=ON_FLIP,
    rejects=[
        mutant(
            "out_keeps_its_trits",
            "    return stepped.into(out)",
            "    return stepped.with_tensors(packed=(weight if out is None else out).packed).into(out)",
            compared="apply_step",
        ),
        mutant(
            "out_is_ignored",
            "    return stepped.into(out)",
            "    return stepped",
            compared="apply_step",
        ),
    ],
)
def test_update_in_place(ops: Subject, weight: TernaryWeight, data: st.DataObject, on_flip: str) -> None:
    """`out` receives the whole result, whether it is another weight or the weight itself."""
    votes = data.draw(votes_for(weight))
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


@law(
    weight=ss.weights(limit=33, levels=(-8, 8)),
    seed=ss.GENERATOR_SEEDS,
    rule=st.sampled_from(("score", "sign")),
    rejects=[ASCENT, SCORE_WITHOUT_TRITS, EXPONENTS_ASCEND, TRITS_ASCEND],
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


@law(
    weight=SMALL,
    data=st.data(),
    rejects=[
        mutant(
            "changed_bytes_for_trits",
            "(unpack_trits(before.packed, before.shape) != unpack_trits(after.packed, after.shape)).sum()",
            "(before.packed != after.packed).sum()",
            compared="count_changed_trits",
        ),
    ],
)
def test_count_changed_trits_by_trit(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """The op counts trits, not bytes. Exponents and accumulators do not matter. It is symmetric, and 0 for a weight and itself."""
    other = data.draw(ss.weights(weight.shape))
    one, two = torch.tensor(trit_rows(weight)), torch.tensor(trit_rows(other))
    want = torch.tensor(
        sum(a != b for a, b in zip(one.flatten().tolist(), two.flatten().tolist(), strict=True))
    )
    exact(ops.count_changed_trits(weight, other), want)
    exact(ops.count_changed_trits(other, weight), want)
    exact(
        ops.count_changed_trits(weight, weight.with_tensors(exponents=weight.exponents + 0)), torch.tensor(0)
    )


@law(
    weight=SMALL,
    theta=THETAS,
    rejects=[
        mutant("rail_beyond", "<= -theta).sum()", "< -theta).sum()", compared="count_state"),
        mutant("rail_of_the_other_side", "2 * trits * count", "-2 * trits * count", compared="count_state"),
        mutant("full_below", "count.abs() == ACCUM_MAX", "count == ACCUM_MAX", compared="count_state"),
        mutant(
            "exponents_of_the_next",
            "exponents - EXPONENT_MIN,",
            "(exponents - EXPONENT_MIN - 1).clamp(min=0),",
            compared="count_state",
        ),
    ],
)
def test_count_state_by_trit(ops: Subject, weight: TernaryWeight, theta: int) -> None:
    """Trit by trit and group by group. Counts of exponents have no part in it."""
    pairs = [
        (trit, count)
        for trits, counts in zip(trit_rows(weight), weight.trit_accum.tolist(), strict=True)
        for trit, count in zip(trits, counts, strict=True)
    ]
    exponents = [level // 2**weight.mantissa_bits for level in weight.exponents.flatten().tolist()]
    want = [
        sum(trit == 0 for trit, _ in pairs),
        sum(
            (trit == 1 and 2 * count <= -theta) or (trit == -1 and 2 * count >= theta)
            for trit, count in pairs
        ),
        sum(count in (-127, 127) for _, count in pairs),
        *(exponents.count(exponent) for exponent in range(-32, 16)),
    ]
    exact(ops.count_state(weight, theta=theta), torch.tensor(want))


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_update_step = refusals(
    "update_step",
    refused("apply_step", "theta 0", ValueError, "theta", weight, theta=0),
    refused("apply_step", "theta 128", ValueError, "theta", weight, theta=128),
    refused("apply_step", "theta 1.0", TypeError, "theta", weight, theta=1.0),
    refused("apply_step", "theta_e 0", ValueError, "theta_e", weight, theta_e=0),
    refused("apply_step", "theta_e 128", ValueError, "theta_e", weight, theta_e=128),
    refused("apply_step", "an unknown on_flip", ValueError, "on_flip", weight, on_flip="keep"),
    refused("apply_step", "row N", ValueError, "rows", weight, rows=ids(3)),
    refused("apply_step", "a row named twice", ValueError, "rows", weight, rows=ids(0, 2, 0)),
    refused("apply_step", "a list of rows", TypeError, "rows", weight, rows=[0, 1]),
    refused("apply_step", "an out elsewhere", ValueError, "out", weight, out=lambda: weight().to("meta")),
    refused("apply_step", "another out", ValueError, "out", weight, out=lambda: weight(4)),
    refused("count_changed_trits", "another shape", ValueError, "after", weight, lambda: weight(3, 13)),
    refused("count_state", "theta 0", ValueError, "theta", weight, theta=0),
    refused("count_state", "theta 128", ValueError, "theta", weight, theta=128),
    refused("count_state", "theta 1.0", TypeError, "theta", weight, theta=1.0),
    rejects=[
        mutant("theta_unchecked", 'checks.threshold("theta", theta)', "pass", times=3),
    ],
)
# fmt: on
