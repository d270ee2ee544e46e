"""Laws of votes: small integers that estimate the gradient without bias, in units of its row's scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import RESERVED_STEP, SILENT_ROW

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import CLOCK, F16, F32, ids, meta, ones, refusals, refused, scalar
from ..subject import Subject
from .test_dither import STEP_TENSOR_IGNORED

mutant = mutants_of("votes")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("row_exponents")
def row_exponents_calls(draw: st.DrawFn) -> Case:
    return Case((draw(ss.gradients(draw(ss.gradient_shapes()))),))


@calls("stochastic_votes")
def stochastic_votes_calls(draw: st.DrawFn) -> Case:
    shape = draw(ss.gradient_shapes())
    kwargs = {"group_size": draw(ss.GROUPS), **draw(ss.clocks())}
    if draw(st.booleans(), label="rows"):
        rows = torch.randperm(3 * shape[0], generator=ss.generator(draw(ss.GENERATOR_SEEDS)))[: shape[0]]
        kwargs["rows"] = torch.where(rows == 0, -1, rows)
    return Case((draw(ss.gradients(shape)), draw(ss.rates())), kwargs)


@calls("sign_votes")
def sign_votes_calls(draw: st.DrawFn) -> Case:
    step_size = draw(st.one_of(st.sampled_from((1, 127)), st.integers(1, 127)))
    return Case((draw(ss.gradients(draw(ss.gradient_shapes()))), step_size))


@calls("step_from_loss")
def step_from_loss_calls(draw: st.DrawFn) -> Case:
    loss = draw(st.one_of(st.sampled_from((0.0, 1e-9, 5.6937, 1e9)), st.floats(0.0, 12.0)))
    return Case(
        (loss, draw(st.sampled_from((5.545177444479562, 5.693732138802635, 1.0))), draw(st.integers(1, 127)))
    )


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


SMALL = ss.matrix_shapes(40)
GRADIENTS = SMALL.flatmap(ss.gradients)
FINITE = SMALL.flatmap(
    lambda shape: ss.gradients(shape, faults=False, kinds=("normal", "ties", "spikes", "boundary"))
)


EXPONENT_OF_HALF = mutant(
    "exponent_of_half",
    'frexp_exponent.div(2, rounding_mode="floor")',
    'frexp_exponent.div(2, rounding_mode="trunc")',
    compared="row_exponents",
)
VOTES_FOR_NAN = mutant(
    "votes_for_nan",
    "torch.where(votes, frexp_exponent",
    "torch.where(votes | True, frexp_exponent",
    compared="row_exponents",
)


@law(
    grad=GRADIENTS,
    rejects=[
        mutant(
            "rms_over_padded_columns",
            ".square().mean(dim=1)",
            ".square().sum(dim=1) / (-(-grad_NK.shape[1] // 12) * 12)",
            compared=("row_exponents", "stochastic_votes"),
        ),
        mutant("sum_for_mean", ".square().mean(dim=1)", ".square().sum(dim=1)", compared="row_exponents"),
        mutant("largest_for_rms", ".square().mean(dim=1)", ".square().amax(dim=1)", compared="row_exponents"),
        EXPONENT_OF_HALF,
        mutant(
            "float32_squares",
            "grad_NK.to(torch.float64).square()",
            "grad_NK.to(torch.float32).square()",
            compared="row_exponents",
        ),
        mutant("infinite_rows_vote", "votes = mean_square.isfinite() &", "votes =", compared="row_exponents"),
        VOTES_FOR_NAN,
    ],
)
def test_row_exponents_by_fractions(ops: Subject, grad: Tensor) -> None:
    """2**(2V - 1) <= mean square < 2**(2V + 1), in exact fractions. Rows that are zero or not finite are silent."""
    found = [oracle.row_exponent(row) for row in grad.tolist()]
    want = [SILENT_ROW if exponent is None else exponent for exponent in found]
    exact(ops.row_exponents(grad), torch.tensor(want, dtype=torch.int32))


@law(
    grad=FINITE,
    power=st.integers(-40, 40),
    rejects=[
        EXPONENT_OF_HALF,
        mutant(
            "first_column_left_out",
            "grad_NK.to(torch.float64).square()",
            "(grad_NK.to(torch.float64) * (torch.arange(grad_NK.shape[1]) > 0)).square()",
            compared="row_exponents",
        ),
    ],
)
def test_row_exponents_follow_the_scale(ops: Subject, grad: Tensor, power: int) -> None:
    """2 * g raises V by one, and the order of columns does not matter."""
    exponents = ops.row_exponents(grad)
    shifted = torch.where(exponents == SILENT_ROW, SILENT_ROW, exponents + power).to(torch.int32)
    exact(ops.row_exponents(grad * 2.0**power), shifted)
    exact(ops.row_exponents(grad.flip(1)), exponents)


def _vote(ops: Subject, grad: Tensor, rate: float | Tensor, group_size: int, clock: dict[str, Any]) -> Tensor:
    return ops.stochastic_votes(grad, rate, group_size=group_size, **clock)


SIGNED_DITHER = mutant(
    "signed_dither",
    "(quotient + dither_NK)",
    "(quotient + dither_NK.view(torch.int8))",
    compared="stochastic_votes",
)
NO_DITHER = mutant("no_dither", "(quotient + dither_NK)", "(quotient + 128)", compared="stochastic_votes")
LOGICAL_SHIFT = mutant(
    "logical_shift",
    "((quotient + dither_NK) >> 8)",
    "(((quotient + dither_NK).to(torch.int64) & 0xFFFFFFFF) >> 8)",
    compared="stochastic_votes",
)
NO_ROW_SCALE = mutant(
    "no_row_scale",
    "(8 - row_exponent)[:, None]",
    "(8 - 0 * row_exponent)[:, None]",
    compared="stochastic_votes",
)
ASCENT = mutant(
    "ascent", "return votes.to(torch.int8)", "return -votes.to(torch.int8)", compared="stochastic_votes"
)


@law(
    grad=GRADIENTS,
    rate=ss.RATES,
    group_size=ss.GROUPS,
    clock=ss.clocks(),
    rejects=[
        mutant(
            "truncated_quotient",
            ".clamp(-32768.0, 32767.0).round()",
            ".clamp(-32768.0, 32767.0).trunc()",
            compared="stochastic_votes",
        ),
        mutant(
            "floored_quotient",
            ".clamp(-32768.0, 32767.0).round()",
            ".clamp(-32768.0, 32767.0).floor()",
            compared="stochastic_votes",
        ),
        mutant(
            "two_roundings",
            "device=grad_NK.device).to(torch.float64)\n",
            "device=grad_NK.device).to(torch.bfloat16).to(torch.float64)\n",
            compared="stochastic_votes",
        ),
        SIGNED_DITHER,
        NO_DITHER,
        LOGICAL_SHIFT,
        NO_ROW_SCALE,
        ASCENT,
    ],
)
def test_stochastic_votes_by_fractions(
    ops: Subject, grad: Tensor, rate: float, group_size: int, clock: dict[str, Any]
) -> None:
    """q in exact fractions, one rounding to float32, half to even, then the floor of (q + byte) / 256."""
    groups = -(-grad.shape[1] // group_size)
    numbers = {name: int(value) for name, value in clock.items()}
    rate = torch.tensor(rate, dtype=torch.float32).item()
    got = _vote(ops, grad, rate, group_size, clock)
    assert got.dtype == torch.int8
    for index, row in enumerate(grad.tolist()):
        dither: list[int] = []
        for group in range(index * groups, (index + 1) * groups):
            dither += oracle.dither(group, group_size, **numbers)[:group_size]
        want = oracle.votes(row, rate, dither[: len(row)])
        assert got[index].tolist() == want, f"row {index} of {grad.dtype}: {got[index].tolist()}, want {want}"


DITHER_AT_RATE_ZERO = mutant(
    "dither_at_rate_zero", "(quotient + dither_NK)", "(quotient + dither_NK + 1)", compared="stochastic_votes"
)


@law(
    share=0.3,
    q=st.one_of(st.integers(-700, 700), st.sampled_from((-1, 1, 128, -128, 255, 256, -257))),
    seed=ss.SEEDS,
    rejects=[SIGNED_DITHER, NO_DITHER, DITHER_AT_RATE_ZERO, LOGICAL_SHIFT, ASCENT],
)
def test_stochastic_votes_are_unbiased(ops: Subject, q: int, seed: int) -> None:
    """Over all 256 dither bytes, votes for a gradient of q / 256 sum to exactly q."""
    total = _votes_over_all_bytes(ops, math.copysign(1.0, q), abs(q) / 256, seed)
    assert total == q, f"votes for {q} / 256 sum to {total} over all bytes"


@law(
    share=0.3,
    half=st.integers(-300, 300),
    seed=ss.SEEDS,
    rejects=[
        mutant("half_up", ".clamp(-32768.0, 32767.0).round()", ".clamp(-32768.0, 32767.0).add(0.5).floor()"),
    ],
)
def test_stochastic_votes_round_half_to_even(ops: Subject, half: int, seed: int) -> None:
    """A gradient halfway between two values of q takes the even one, of either sign."""
    odd = 2 * half + 1
    total = _votes_over_all_bytes(ops, math.copysign(1.0, odd), abs(odd) / 512, seed)
    assert total == round(odd / 2), f"votes for {odd} / 512 sum to {total} over all bytes"


@law(
    place=st.integers(0, 11),
    size=st.floats(0.75, 1.375),
    clock=ss.clocks(),
    rejects=[mutant("product_not_rounded", "scaled.to(torch.float32).clamp", "scaled.clamp")],
)
def test_stochastic_votes_round_the_product_once(
    ops: Subject, place: int, size: float, clock: dict[str, Any]
) -> None:
    """A product next to a tie is rounded to float32 first, and may be the tie by then. The byte of a place tells the two apart."""
    dither = oracle.dither(0, 12, **{name: int(value) for name, value in clock.items()})[:12]
    g = torch.tensor(size, dtype=torch.float32).item()
    rate = torch.tensor((255.5 - dither[place]) / 256 / g, dtype=torch.float32).item()
    want = torch.tensor([oracle.votes([g] * 12, rate, dither)], dtype=torch.int8)
    exact(
        _vote(ops, torch.full((1, 12), g), rate, 12, clock), want, f"stochastic_votes of {g} at rate {rate}"
    )


def _votes_over_all_bytes(ops: Subject, g: float, rate: float, seed: int) -> int:
    """Return the sum of the votes at 256 places, chosen so that every dither byte occurs once."""
    # The mean square is 1, so V is 0 and q is g * 256 * rate.
    grad = torch.full((128, 60), g)
    clock = {"seed": seed, "step": 5, "tensor_id": 6}
    dither = ops.dither_bytes(torch.arange(128 * 5).reshape(128, 5), group_size=12, **clock)[..., :12]
    places = {byte: place for place, byte in enumerate(dither.reshape(-1).tolist())}
    assert len(places) == 256
    votes = _vote(ops, grad, rate, 12, clock).reshape(-1)
    return votes[torch.tensor(list(places.values()))].sum(dtype=torch.int64).item()


@law(
    grad=FINITE,
    power=st.integers(-30, 30),
    rate=ss.RATES,
    clock=ss.clocks(),
    rejects=[NO_ROW_SCALE],
)
def test_stochastic_votes_ignore_the_scale(
    ops: Subject, grad: Tensor, power: int, rate: float, clock: dict[str, Any]
) -> None:
    """Scaling the gradient by a power of two changes nothing: votes are in units of the row's scale."""
    exact(_vote(ops, grad * 2.0**power, rate, 12, clock), _vote(ops, grad, rate, 12, clock))


@law(grad=GRADIENTS, clock=ss.clocks(), rejects=[DITHER_AT_RATE_ZERO])
def test_stochastic_votes_at_rate_zero(ops: Subject, grad: Tensor, clock: dict[str, Any]) -> None:
    votes = _vote(ops, grad, 0.0, 12, clock)
    assert not votes.any(), "rate 0 votes"


@law(grad=GRADIENTS, rate=ss.RATES, clock=ss.clocks(), rejects=[ASCENT])
def test_stochastic_votes_never_oppose(
    ops: Subject, grad: Tensor, rate: float, clock: dict[str, Any]
) -> None:
    """A vote has the sign of its gradient or none: dither lifts a small negative one to 0, never beyond."""
    signs = grad.to(torch.float32).nan_to_num(0.0).sign().to(torch.int8)
    opposed = signs * _vote(ops, grad, rate, 12, clock).clamp(-1, 1) < 0
    assert not opposed.any(), f"a vote against its gradient at {opposed.nonzero()[0].tolist()}"


@law(
    grad=GRADIENTS,
    clock=ss.clocks(),
    rejects=[
        mutant(
            "votes_wrap",
            ".clamp(-ACCUM_MAX, ACCUM_MAX)\n    return votes",
            "\n    return votes",
            compared="stochastic_votes",
        ),
        mutant(
            "a_vote_of_minus_128",
            ".clamp(-ACCUM_MAX, ACCUM_MAX)\n    return votes",
            ".clamp(-ACCUM_MAX - 1, ACCUM_MAX)\n    return votes",
            compared="stochastic_votes",
        ),
    ],
)
def test_stochastic_votes_saturate(ops: Subject, grad: Tensor, clock: dict[str, Any]) -> None:
    """At the highest rate an element above its row's scale votes 127, with its own sign. -128 never occurs."""
    votes = _vote(ops, grad, 127.0, 12, clock).to(torch.int32)
    assert votes.min() >= -127, "a vote of -128"
    exponents = [oracle.row_exponent(row) for row in grad.tolist()]
    for row, exponent in enumerate(exponents):
        if exponent is not None:
            large = (grad[row].to(torch.float64) * 2.0**-exponent).abs() >= 1.1
            assert (votes[row][large] == 127 * grad[row][large].sign()).all(), f"row {row} does not saturate"


@law(
    grad=GRADIENTS,
    rate=ss.RATES,
    clock=ss.clocks(),
    rejects=[
        mutant(
            "a_bad_row_silences_all",
            "votes = mean_square.isfinite() &",
            "votes = mean_square.isfinite().all() &",
            compared="stochastic_votes",
        ),
        VOTES_FOR_NAN,
    ],
)
def test_stochastic_votes_of_silent_rows(
    ops: Subject, grad: Tensor, rate: float, clock: dict[str, Any]
) -> None:
    """A row of zeros, or one with an infinity or a NaN, casts no votes, and takes no other row with it."""
    grad = grad.clone()
    grad[0, -1] = float("nan")
    votes = _vote(ops, grad, rate, 12, clock)
    assert not votes[0].any(), "a row with a NaN votes"
    if grad.shape[0] > 1:
        grad[0] = 1.0
        exact(_vote(ops, grad, rate, 12, clock)[1:], votes[1:], "rows beside it")


@law(
    grad=FINITE,
    rate=ss.RATES,
    clock=ss.clocks(),
    data=st.data(),
    rejects=[
        mutant(
            "rows_by_slot",
            "rows.clamp(min=0)[:, None] * groups",
            "torch.arange(num_rows)[:, None] * groups",
            compared="stochastic_votes",
        ),
        mutant(
            "unused_slots_vote",
            "(row_exponent != SILENT_ROW) & (rows >= 0)",
            "(row_exponent != SILENT_ROW)",
            compared="stochastic_votes",
        ),
    ],
)
def test_stochastic_votes_of_some_rows(
    ops: Subject, grad: Tensor, rate: float, clock: dict[str, Any], data: st.DataObject
) -> None:
    """Rows keep the dither of their true place in the weight. Unused slots vote nothing."""
    rows = data.draw(ss.row_choices(grad.shape[0]))
    some = ops.stochastic_votes(grad[rows], rate, group_size=12, rows=rows, **clock)
    exact(some, torch.where(rows[:, None] >= 0, _vote(ops, grad, rate, 12, clock)[rows], 0).to(torch.int8))


@law(
    grad=FINITE,
    rate=ss.RATES,
    clock=ss.clocks(),
    rejects=[
        STEP_TENSOR_IGNORED,
        mutant(
            "rate_tensor_ignored",
            "torch.as_tensor(rate, dtype=torch.float32, device=grad_NK.device)",
            "torch.as_tensor(1.0 if isinstance(rate, torch.Tensor) else rate, dtype=torch.float32)",
            compared="stochastic_votes",
        ),
    ],
)
def test_stochastic_votes_take_device_scalars(
    ops: Subject, grad: Tensor, rate: float, clock: dict[str, Any]
) -> None:
    """A rate and a step that live on the device count like numbers."""
    step = int(clock["step"])
    numbers = _vote(ops, grad, rate, 12, {**clock, "step": step})
    exact(_vote(ops, grad, torch.tensor(rate), 12, {**clock, "step": torch.tensor(step)}), numbers)


@law(clock=ss.clocks(), rejects=[NO_DITHER])
def test_stochastic_votes_differ_between_steps(ops: Subject, clock: dict[str, Any]) -> None:
    """The next step rolls other dice: over 128 elements near half a vote, equal votes by chance are 2**-128."""
    half = torch.ones(4, 32)
    step = int(clock["step"])
    assume(step < 2**32 - 2)
    one, other = (_vote(ops, half, 0.5, 12, {**clock, "step": s}) for s in (step, step + 1))
    assert not torch.equal(one, other)


SIGN_OF_ZERO = mutant(
    "sign_of_zero",
    "torch.sign(grad_NK) * step_size",
    "(2.0 * (grad_NK > 0) - 1) * step_size",
    compared="sign_votes",
)


@law(
    grad=GRADIENTS,
    step_size=st.integers(1, 127),
    rejects=[
        SIGN_OF_ZERO,
        mutant(
            "sign_votes_for_nan",
            "finite = grad_NK.isfinite().all(dim=1, keepdim=True)",
            "finite = grad_NK.isfinite()",
            compared="sign_votes",
        ),
    ],
)
def test_sign_votes_by_sign(ops: Subject, grad: Tensor, step_size: int) -> None:
    want = [
        [step_size * ((g > 0) - (g < 0)) if all(map(math.isfinite, row)) else 0 for g in row]
        for row in grad.tolist()
    ]
    exact(ops.sign_votes(grad, step_size), torch.tensor(want, dtype=torch.int8))


@law(grad=FINITE, step_size=st.integers(1, 127), rejects=[SIGN_OF_ZERO])
def test_sign_votes_negation(ops: Subject, grad: Tensor, step_size: int) -> None:
    exact(ops.sign_votes(-grad, step_size), -ops.sign_votes(grad, step_size))


@law(
    loss=st.floats(0.0, 20.0),
    more=st.floats(0.0, 20.0),
    most=st.integers(1, 127),
    rejects=[
        mutant("step_floor", "math.ceil(min(", "math.floor(min(", compared="step_from_loss"),
    ],
)
def test_step_from_loss_by_ceiling(ops: Subject, loss: float, more: float, most: int) -> None:
    """The size is the smallest s with s >= s_max * loss / ln 256, within 1 .. s_max. It never decreases with the loss."""
    reference = math.log(256)
    step = ops.step_from_loss(loss, reference, most)
    assert isinstance(step, int) and 1 <= step <= most
    assert step == most or step >= most * loss / reference
    assert step == 1 or step - 1 < most * loss / reference
    assert ops.step_from_loss(loss + more, reference, most) >= step
    assert ops.step_from_loss(reference, reference, most) == most


@law(
    loss_ref=st.floats(1.0, 12.0),
    most=st.integers(2, 127),
    data=st.data(),
    rejects=[
        mutant("ratio_first", "min(max_step * loss / loss_ref", "min(max_step * (loss / loss_ref)"),
    ],
)
def test_step_from_loss_multiplies_first(
    ops: Subject, loss_ref: float, most: int, data: st.DataObject
) -> None:
    """At the edge between two sizes the order of the two float64 roundings decides: the product, then the quotient."""
    part = data.draw(st.integers(1, most - 1))
    loss = loss_ref * part / most
    want = max(1, min(math.ceil(most * loss / loss_ref), most))
    exact(ops.step_from_loss(loss, loss_ref, most), want, f"step_from_loss({loss!r}, {loss_ref!r}, {most})")


# --- what is refused -------------------------------------------------------------------------------------------------


_VOTES = {"group_size": 12, **CLOCK}


RATE_UNCHECKED = mutant("rate_unchecked", "checks.vote_rate(rate)", "pass")


# fmt: off
test_refusals_of_votes = refusals(
    "votes",
    refused("row_exponents", "float16", TypeError, "grad_NK", ones(2, 3, dtype=F16)),
    refused("row_exponents", "one dimension", ValueError, "grad_NK", ones(3)),
    refused("row_exponents", "no columns", ValueError, "grad_NK", ones(3, 0)),
    refused("stochastic_votes", "group 0", ValueError, "group_size", ones(2, 3), 1.0, **{**_VOTES, "group_size": 0}),
    refused("stochastic_votes", "rate -1", ValueError, "rate", ones(2, 3), -1.0, **_VOTES),
    refused("stochastic_votes", "rate 128", ValueError, "rate", ones(2, 3), 128.0, **_VOTES),
    refused("stochastic_votes", "rate NaN", ValueError, "rate", ones(2, 3), float("nan"), **_VOTES),
    refused("stochastic_votes", "float64 rate", TypeError, "rate", ones(2, 3), ones(dtype=torch.float64), **_VOTES),
    refused("stochastic_votes", "rate of shape [1]", ValueError, "rate", ones(2, 3), ones(1), **_VOTES),
    refused("stochastic_votes", "rate tensor -1", ValueError, "rate", ones(2, 3), scalar(-1.0, F32), **_VOTES),
    refused("stochastic_votes", "rate tensor 128", ValueError, "rate", ones(2, 3), scalar(128.0, F32), **_VOTES),
    refused("stochastic_votes", "rate tensor NaN", ValueError, "rate", ones(2, 3), scalar(float("nan"), F32), **_VOTES),
    refused("stochastic_votes", "step tensor 2**32 + 5", ValueError,
            "step", ones(2, 3), 1.0, **{**_VOTES, "step": scalar(2**32 + 5)}),
    refused("stochastic_votes", "step tensor -1", ValueError, "step", ones(2, 3), 1.0, **{**_VOTES, "step": scalar(-1)}),
    refused("stochastic_votes", "the reserved step", ValueError, "step", ones(2, 3), 1.0, **{**_VOTES, "step": RESERVED_STEP}),
    refused("stochastic_votes", "a tensor of the reserved step", ValueError,
            "step", ones(2, 3), 1.0, **{**_VOTES, "step": scalar(RESERVED_STEP)}),
    refused("stochastic_votes", "a list of rows", TypeError, "rows", ones(2, 3), 1.0, rows=[0, 1], **_VOTES),
    refused("stochastic_votes", "rows elsewhere", ValueError,
            "rows", ones(2, 3), 1.0, rows=meta(2, dtype=torch.int64), **_VOTES),
    refused("stochastic_votes", "group size 10", ValueError, "group_size", ones(2, 3), 1.0, group_size=10, **CLOCK),
    refused("stochastic_votes", "float16", TypeError, "grad_NK", ones(2, 3, dtype=F16), 1.0, **_VOTES),
    refused("stochastic_votes", "int32 rows", TypeError, "rows", ones(2, 3), 1.0, rows=ones(2, dtype=torch.int32), **_VOTES),
    refused("stochastic_votes", "a row too few", ValueError, "rows", ones(2, 3), 1.0, rows=ids(1), **_VOTES),
    refused("sign_votes", "step 0", ValueError, "step_size", ones(2, 3), 0),
    refused("sign_votes", "step 128", ValueError, "step_size", ones(2, 3), 128),
    refused("sign_votes", "step 1.5", TypeError, "step_size", ones(2, 3), 1.5),
    refused("step_from_loss", "a negative loss", ValueError, "loss", -0.1, 5.5, 8),
    refused("step_from_loss", "a text", TypeError, "loss", "cpu", 5.5, 8),
    refused("step_from_loss", "a NaN loss", ValueError, "loss", float("nan"), 5.5, 8),
    refused("step_from_loss", "reference 0", ValueError, "loss_ref", 1.0, 0.0, 8),
    refused("step_from_loss", "step 0", ValueError, "max_step", 1.0, 5.5, 0),
    rejects=[
        RATE_UNCHECKED,
        mutant("reserved_step_votes", "checks.vote_clock(seed, step, tensor_id)", "pass"),
    ],
)
# fmt: on
