"""Votes by the sign of the gradient, all of one size, and the size that a loss asks for."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import ones, refusals, refused
from ..subject import Subject
from .test_votes import FINITE, GRADIENTS

mutant = mutants_of("votes")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


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


# fmt: off
test_refusals_of_votes_sign = refusals(
    "votes_sign",
    refused("sign_votes", "step 0", ValueError, "step_size", ones(2, 3), 0),
    refused("sign_votes", "step 128", ValueError, "step_size", ones(2, 3), 128),
    refused("sign_votes", "step 1.5", TypeError, "step_size", ones(2, 3), 1.5),
    refused("step_from_loss", "a negative loss", ValueError, "loss", -0.1, 5.5, 8),
    refused("step_from_loss", "a text", TypeError, "loss", "cpu", 5.5, 8),
    refused("step_from_loss", "a NaN loss", ValueError, "loss", float("nan"), 5.5, 8),
    refused("step_from_loss", "reference 0", ValueError, "loss_ref", 1.0, 0.0, 8),
    refused("step_from_loss", "step 0", ValueError, "max_step", 1.0, 5.5, 0),
    rejects=[mutant("step_size_unchecked", 'checks.integer("step_size", step_size, 1, ACCUM_MAX)', "pass")],
)
# fmt: on
