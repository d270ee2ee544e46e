"""What every op promises of gradients: both sets give the same ones or refuse, and none is lost without a word."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import EXACT, OP_TABLE
from conformance.case import Case, magnitude_of
from conformance.compare import alike, no_worse, tensors_of
from conformance.families import CASES, MAGNITUDES
from conformance.subject import OURS, Subject, weight_of
from conformance.test_promises import EXAMPLES, asking, prepared

GRADIENTS: dict[str, dict[str, tuple[str, Callable[..., Case]]]] = {
    "linear": {
        "x": (
            "linear_input_grad",
            lambda grad, a: Case((grad, a["weight"]), {"num_groups": a["num_groups"]}),
        )
    },
    "rms_norm": {
        "x": (
            "rms_norm_input_grad",
            lambda grad, a: Case((grad, a["x"], a["weight"]), {"eps": a["eps"]}),
        )
    },
    "conv1d": {
        "x_BCL": (
            "conv1d_input_grad",
            lambda grad, a: Case(
                (grad, a["weight"]),
                {"length": a["x_BCL"].shape[2]}
                | {key: a[key] for key in ("kernel_size", "stride", "padding")},
            ),
        )
    },
    "grouped_linear": {
        "x_MK": (
            "grouped_linear_input_grad",
            lambda grad, a: Case((grad, a["weight"], a["experts_M"]), {"num_groups": a["num_groups"]}),
        )
    },
    "weigh_ranks": dict.fromkeys(
        ("ranks", "logits"),
        (
            "weigh_ranks_grads",
            lambda grad, a: Case(
                (grad, a["ranks"], a["logits"], a["experts"]), {"chosen_only": a["chosen_only"]}
            ),
        ),
    ),
    "edge_sum": {
        "h_ND": (
            "edge_sum_input_grad",
            lambda grad, a: Case(
                (grad, a["neighbours_RJ"], a["signs_RJ"]), {"num_nodes": a["h_ND"].shape[0]}
            ),
        ),
        "signs_RJ": (
            "edge_sum_sign_grad",
            lambda grad, a: Case((grad, a["h_ND"], a["neighbours_RJ"])),
        ),
    },
    "denoise_step": {
        "latent": ("denoise_step_backward", lambda grad, a: Case((grad,), {"alpha": a["alpha"]})),
        "pred": ("denoise_step_backward", lambda grad, a: Case((grad,), {"alpha": a["alpha"]})),
    },
    "gated": dict.fromkeys(
        ("gate", "up", "terms"),
        ("gated_grads", lambda grad, a: Case((grad, a["gate"], a["up"], a["terms"]))),
    ),
    "head_keys": dict.fromkeys(
        ("shared", "own"),
        ("head_keys_grads", lambda grad, a: Case((grad,), {"num_shared": a["shared"].shape[-1]})),
    ),
    "rotate": {"x": ("rotate", lambda grad, a: Case((grad, a["cosine"], -a["sine"])))},
}
"""The ops with gradient ops: for each differentiable argument, the op and its call for the gradient of a result."""


def gradients_of(
    subject: Subject, name: str, case: Case, to: torch.dtype | None = None
) -> tuple[dict[str, Any], Tensor, dict[str, Tensor]]:
    """Return the arguments of a call, a gradient of its result, and what autograd makes of that for the float arguments."""
    convert = lambda value: value if to is None or not value.is_floating_point() else value.to(to)  # noqa: E731
    args, kwargs = prepared(subject, name, case)
    bound = inspect.signature(subject.raw(name)).bind(*args, **kwargs)
    for key, value in bound.arguments.items():
        if isinstance(value, Tensor):
            bound.arguments[key] = asking(convert(value)) if key in GRADIENTS[name] else convert(value)
    # By name, as a keyword may ask for a gradient too.
    result = subject.raw(name)(**bound.arguments)
    bound.apply_defaults()
    rng = torch.Generator().manual_seed(result.numel())
    dtype = next(value.dtype for value in case.args if isinstance(value, Tensor))
    grad = torch.randn(result.shape, generator=rng).to(dtype).to(subject.device, result.dtype)
    inputs = {
        key: value for key, value in bound.arguments.items() if key in GRADIENTS[name] and value is not None
    }
    if not result.requires_grad:
        # No expert is used, or there is no slot: the reference's result is zeros of its own.
        return bound.arguments, grad, {key: torch.zeros_like(value) for key, value in inputs.items()}
    made = torch.autograd.grad(result, list(inputs.values()), grad)
    return bound.arguments, grad, dict(zip(inputs, made, strict=True))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_reference(subject: Subject, name: str) -> None:
    """An op with gradient ops is differentiable, and errs no more than autograd through the reference."""
    plain = Subject(reference_ops, "reference", str(subject.device))
    parameters = inspect.signature(getattr(reference_ops, name)).parameters.values()
    num_needed = sum(
        each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty for each in parameters
    )

    @settings(max_examples=2 * EXAMPLES, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        check(case)
        if len(case.args) > num_needed:
            check(replace(case, args=case.args[:num_needed]))

    def check(case: Case) -> None:
        _, _, got = gradients_of(subject, name, case)
        _, _, twin = gradients_of(plain, name, case)
        arguments, grad, wide = gradients_of(
            Subject(reference_ops, "reference"), name, case, to=torch.float64
        )
        arguments = {key: v.detach() if isinstance(v, Tensor) else v for key, v in arguments.items()}
        for index, argument in enumerate(got):
            grad_op, call = GRADIENTS[name][argument]
            terms = MAGNITUDES.get(grad_op, magnitude_of)(
                getattr(reference_ops, grad_op), call(grad, arguments)
            )
            magnitude = terms[index] if isinstance(terms, tuple) else terms
            # All terms of a gate have one gradient, which the gradient op returns once.
            magnitude = magnitude if magnitude.ndim == wide[argument].ndim else magnitude.unsqueeze(-2)
            no_worse(
                got[argument].cpu(),
                twin=twin[argument].cpu(),
                wide=wide[argument],
                magnitude=magnitude.abs().expand_as(wide[argument]),
                k=OP_TABLE[grad_op].output.k if OP_TABLE[grad_op].output is not EXACT else 2.0,
                what=f"the gradient of {name} with respect to {argument}",
            )

    run()


@pytest.mark.parametrize("name", OP_TABLE)
@pytest.mark.parametrize("ops", ["subject", "reference"])
def test_no_gradient_is_lost_without_a_word(request: pytest.FixtureRequest, ops: str, name: str) -> None:
    """Inputs that ask for a gradient get one, or a sentence that names one of them. Integers are detached in both sets."""
    subject: Subject = request.getfixturevalue(ops)
    compared = set(GRADIENTS.get(name, ()))

    @settings(max_examples=EXAMPLES, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        args, kwargs = prepared(subject, name, case)
        args = tuple(asking(value) if isinstance(value, Tensor) else value for value in args)
        bound = inspect.signature(subject.raw(name)).bind(*args, **kwargs).arguments
        asked = {key for key, value in bound.items() if isinstance(value, Tensor) and value.requires_grad}
        try:
            result = subject.raw(name)(*args, **kwargs)
        except RuntimeError as error:
            assert OP_TABLE[name].output is not EXACT, error
            assert any(str(error).startswith(f"{key} requires a gradient") for key in asked - compared), error
            assert "torch.no_grad()" in str(error) and f"arbitor.reference.ops.{name}" in str(error)
            with torch.no_grad():
                subject.raw(name)(*args, **kwargs)
            return
        tensors = tensors_of(result).values()
        if OP_TABLE[name].output is EXACT:
            assert not any(tensor.requires_grad for tensor in tensors), f"{name} has a gradient"
        elif asked:
            # Zeros where no expert is used depend on no input.
            floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.any()]
            assert all(tensor.requires_grad for tensor in floats), f"{name} has no gradient"
            assert asked <= compared or subject.name != OURS, f"GRADIENTS lacks {asked - compared} of {name}"

    run()


def test_a_gradient_of_a_weight_that_has_changed_is_no_gradient_of_the_new_one(subject: Subject) -> None:
    """Between a pass and its gradient a weight may step in place: the gradient is the old weight's, or torch refuses it."""
    spec = reference_ops.initial_weight((7, 20), std=0.5, seed=1, tensor_id=2)
    spec = spec.with_tensors(trit_accum=torch.full((7, 20), 127, dtype=torch.int8))
    for weight in (
        spec.clone().to(subject.device),
        subject.raw("from_spec")(spec.clone().to(subject.device)),
    ):
        x = torch.randn(3, 20, device=subject.device, requires_grad=True)
        y = subject.raw("linear")(x, weight)
        want = subject.raw("linear_input_grad")(torch.ones_like(y), weight)
        subject.raw("apply_step")(weight, theta=1, out=weight)
        changed = subject.raw("linear_input_grad")(torch.ones_like(y), weight)
        assert not torch.equal(want, changed)
        try:
            (got,) = torch.autograd.grad(y.sum(), x)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            alike(got, want)


def test_votes_between_a_pass_and_its_gradient_are_no_change_of_the_weight(subject: Subject) -> None:
    weight = weight_of(subject, 7, 20)
    x = torch.randn(3, 20, device=subject.device, requires_grad=True)
    y = subject.raw("linear")(x, weight)
    clock = {"seed": 1, "step": 2, "tensor_id": 3}
    subject.raw("accumulate_gradient")(
        weight, torch.randn(7, 20, device=subject.device), 1.0, **clock, out=weight
    )
    (got,) = torch.autograd.grad(y.sum(), x)
    assert got.isfinite().all()


def test_second_derivatives_are_right_or_refused(subject: Subject) -> None:
    weight, x = reference_ops.constant_weight((1, 6), trit=1, exponent=0), torch.linspace(-1.0, 2.0, 6)

    def second(ops: Any, device: torch.device) -> Tensor:
        leaf = x.to(device).requires_grad_()
        (first,) = torch.autograd.grad(ops.rms_norm(leaf, weight.to(device))[0], leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0].cpu()

    try:
        got = second(subject.ops, subject.device)
    except RuntimeError as error:
        assert "differentiated twice" in str(error)
    else:
        alike(got, second(reference_ops, torch.device("cpu")))
