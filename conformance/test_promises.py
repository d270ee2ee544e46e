"""What every op promises beside its own rule: the same bits in whatever mode, memory and subclass a user of PyTorch brings.

One table of modes, one test over the op table; then gradients, which both sets give or refuse; then a GPU that is not current.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import ArbModel
from arbitor.reference.op_table import EXACT, OP_TABLE
from arbitor.reference.types import TernaryWeight
from conformance.case import Case, compare, magnitude_of
from conformance.compare import alike, exact, no_worse, tensors_of
from conformance.families import CASES, MAGNITUDES
from conformance.graph.models import RATE, WHOLE, random_ids
from conformance.report import skip
from conformance.subject import MAKERS, Subject, weight_of

OWN = "arbitor.optimized.ops"
"""The implementation whose gradients all are compared here."""

EXAMPLES = 2
"""Calls of each op that are tried in every mode."""


def autocast() -> AbstractContextManager[None]:
    """Return autocast to bfloat16 on every device that ops run on."""

    @contextmanager
    def both() -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16):
            if not torch.cuda.is_available():
                yield
                return
            with torch.autocast("cuda", torch.bfloat16):
                yield

    return both()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floats of a dtype where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch refuse what gives other bits on another run, and fill what is empty."""
    # cuBLAS looks for its variable at each product.
    with mock.patch.dict(os.environ, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": autocast,
    "a default dtype of float64": lambda: default_dtype(torch.float64),
    "a default dtype of bfloat16": lambda: default_dtype(torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
}
"""What a program may have switched on around a call."""


def strided(tensor: Tensor) -> Tensor:
    """Return the same values at every other place of a larger memory, from the second place on."""
    if tensor.ndim == 0:
        return tensor
    room = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
    view = room[..., 1::2]
    view.copy_(tensor)
    return view


def parameter(tensor: Tensor) -> Tensor:
    """Return a tensor as an `nn.Parameter`, frozen."""
    return nn.Parameter(tensor, requires_grad=False)


def asking(tensor: Tensor) -> Tensor:
    """Return a float tensor that asks for a gradient, integers as they are."""
    return tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor


def as_it_is(tensor: Tensor) -> Tensor:
    """Return a tensor."""
    return tensor


def reformed(case: Case, form: Callable[[Tensor], Tensor]) -> Case:
    """Return a call with all tensors in another form. What is one object stays one object."""
    made: dict[int, Any] = {}

    def formed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(formed, value))
        if id(value) not in made:
            if isinstance(value, Tensor):
                made[id(value)] = form(value)
            elif isinstance(value, TernaryWeight):
                parts = {key: form(tensor) for key, tensor in value.tensors().items()}
                made[id(value)] = value.with_tensors(**parts)
            else:
                return value
        return made[id(value)]

    kwargs = {key: formed(value) for key, value in case.kwargs.items()}
    return replace(case, args=tuple(map(formed, case.args)), kwargs=kwargs)


def prepared(
    subject: Subject, name: str, case: Case, form: Callable[[Tensor], Tensor] = as_it_is
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call on the device under test, on memory of their own, their tensors in a form."""
    fresh, moved = case.copy(), {}
    args = tuple(subject.to_device(value, False, moved) for value in fresh.args)
    kwargs = {key: subject.to_device(value, False, moved) for key, value in fresh.kwargs.items()}
    if name in MAKERS:
        kwargs["device"] = subject.device
    call = reformed(Case(args, kwargs), form)
    return call.args, call.kwargs


def outcome(
    subject: Subject,
    name: str,
    case: Case,
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
    form: Callable[[Tensor], Tensor] = as_it_is,
) -> tuple[Any, ...]:
    """Return the result of a call on the CPU, and its count of faults, from within a mode."""
    args, kwargs = prepared(subject, name, case, form)
    with mode():
        result = subject.raw(name)(*args, **kwargs)
    return subject.to_cpu(result), subject.to_cpu(kwargs.get("faults"))


def kept_promises(subject: Subject, name: str, examples: int = EXAMPLES) -> None:
    """Fail unless an op has the same bits in every mode and of parameters, and agrees with the reference on strided memory."""

    @settings(max_examples=examples, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        want = outcome(subject, name, case)
        for what, mode in MODES.items():
            exact(outcome(subject, name, case, mode=mode), want, f"{name} under {what}")
        exact(outcome(subject, name, case, form=parameter), want, f"{name} of an nn.Parameter")
        # Sums of floats may run in another order there, so it is the class of the op that decides.
        compare(subject, name, reformed(case, strided))

    run()


@pytest.mark.parametrize("name", OP_TABLE)
def test_no_mode_and_no_memory_changes_a_bit(subject: Subject, name: str) -> None:
    kept_promises(subject, name)


@pytest.mark.parametrize("name", ["linear", "linear_weight_grad"])
def test_an_op_without_its_decorator_is_noticed(name: str) -> None:
    """The planted fault: what `@op` wraps, by itself."""
    bare = SimpleNamespace(**{**vars(reference_ops), name: getattr(reference_ops, name).__wrapped__})
    with pytest.raises(AssertionError, match="under autocast"):
        kept_promises(Subject(bare, f"{name} without its decorator"), name, examples=40)


def pending_sign(tensor: Tensor) -> Tensor:
    """Return the values of a float32 tensor as a view of their negatives, whose sign torch flips when it reads them."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


@pytest.mark.parametrize("form", [pending_sign, Tensor.to_sparse], ids=["a pending sign", "sparse"])
@pytest.mark.parametrize("place", [0, 1])
def test_memory_that_does_not_read_as_it_lies_is_refused(
    subject: Subject, form: Callable[[Tensor], Tensor], place: int
) -> None:
    """A kernel reads memory as it lies: of such a view, with the wrong sign."""
    tensors = [torch.ones(1, 1, device=subject.device), torch.ones(1, 1, device=subject.device)]
    tensors[place] = form(tensors[place])
    with pytest.raises((TypeError, ValueError), match=("latent", "pred")[place]):
        subject.raw("denoise_step")(*tensors, alpha=0.5)


WITHOUT_KERNELS = ("conv1d_weight_grad", "expert_load", "linear_weight_grad", "step_from_loss", "to_spec")
"""Ops that torch computes wherever their arguments lie; `to_spec` of a weight in canonical form returns it."""


@pytest.mark.parametrize("name", OP_TABLE)
def test_no_kernel_is_launched_on_memory_out_of_reach(subject: Subject, name: str) -> None:
    """Kernels reach a GPU, or anything where Triton interprets them. Every other call says what would help, before a launch."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    here = Subject(subject.ops, subject.name, "cpu")
    launched = AssertionError(f"{name} launches a kernel on memory that it cannot reach")
    refused: list[Case] = []

    @settings(max_examples=4, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        args, kwargs = prepared(here, name, case)
        with triton.knobs.runtime.scope(), mock.patch.object(GridExecutor, "__call__", side_effect=launched):
            triton.knobs.runtime.interpret = False
            try:
                here.raw(name)(*args, **kwargs)
            except RuntimeError as error:
                assert "but Triton kernels run on CUDA" in str(error)
                refused.append(case)

    run()
    assert refused or name in WITHOUT_KERNELS or subject.ops is reference_ops, (
        f"no call of {name} was refused"
    )


def test_codes_are_found_under_autocast(subject: Subject) -> None:
    """Scores of a search need all bits of float32: rounded to bfloat16 they tie, and other codes are found."""
    table = reference_ops.initial_codebook((300, 16), sign_bits=0, seed=1, tensor_id=2)
    z = 4.0 * torch.randn(200, 16, generator=torch.Generator().manual_seed(3))
    want = reference_ops.nearest_codes(z, table)
    with autocast():
        exact(subject.nearest_codes(z, table), want)
        assert not torch.equal(reference_ops.nearest_codes.__wrapped__(z, table), want), "no code is at stake"


@pytest.mark.parametrize("name", OP_TABLE)
def test_ops_of_the_reference_are_decorated(name: str) -> None:
    assert hasattr(getattr(reference_ops, name), "__wrapped__"), f"{name} of the reference lacks its @op"


@pytest.mark.parametrize("name", OP_TABLE)
def test_op_stays_what_it_was_defined_as(subject: Subject, name: str) -> None:
    """The decorator hides neither the name nor the module of an op, and an op can be pickled, as spawned workers ask."""
    op = subject.raw(name)
    assert op.__name__ == op.__qualname__ == name
    assert inspect.getmodule(op).__name__ == op.__module__ == inspect.unwrap(op).__module__
    assert pickle.loads(pickle.dumps(op)) is op


GRADIENTS: dict[str, dict[str, tuple[str, Callable[..., Case]]]] = {
    "linear": {"x": ("linear_input_grad", lambda grad, a: Case((grad, a["weight"])))},
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
def test_no_gradient_is_lost_without_a_word(subject: Subject, name: str) -> None:
    """Inputs that ask for a gradient get one, or a sentence that names one of them. Integers are detached in both sets."""
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
            assert asked <= compared or subject.name != OWN, f"GRADIENTS lacks {asked - compared} of {name}"

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


def on_each_gpu(subject: Subject, what: str) -> tuple[Subject, Subject]:
    """Return the ops on the first and on the second GPU. Skip a test without two GPUs."""
    if subject.device.type != "cuda" or torch.cuda.device_count() < 2:
        skip(
            what,
            f"needs two GPUs; this run is on {subject.device}, and torch sees {torch.cuda.device_count()}",
        )
    return Subject(subject.ops, subject.name, "cuda:0"), Subject(subject.ops, subject.name, "cuda:1")


@pytest.mark.parametrize("name", OP_TABLE)
def test_op_runs_where_its_tensors_are(subject: Subject, name: str) -> None:
    """On a GPU that is not the current one, an op has the bits that it has on the current one."""
    first, second = on_each_gpu(subject, "ops on a GPU that is not current")

    @settings(max_examples=5 * EXAMPLES, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        with torch.cuda.device(0):
            want = first.call(name, *case.copy().args, **case.copy().kwargs)
            exact(second.call(name, *case.copy().args, **case.copy().kwargs), want, f"{name} on cuda:1")
            assert torch.cuda.current_device() == 0

    run()


@pytest.mark.parametrize("name", OP_TABLE)
def test_reference_op_runs_where_its_tensors_are(subject: Subject, reference: Subject, name: str) -> None:
    """On a GPU that is not the current one, an op of the reference has the bits that it has on the current one."""
    on_each_gpu(subject, "ops of the reference on a GPU that is not current")
    first, second = (Subject(reference.ops, reference.name, device) for device in ("cuda:0", "cuda:1"))

    @settings(max_examples=EXAMPLES, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        with torch.cuda.device(0):
            want = first.call(name, *case.copy().args, **case.copy().kwargs)
            exact(second.call(name, *case.copy().args, **case.copy().kwargs), want, f"{name} on cuda:1")

    run()


def test_model_runs_where_its_weights_are(subject: Subject) -> None:
    """A whole model on a GPU that is not the current one: pass, votes, step, and a pass after that."""
    on_each_gpu(subject, "a model on a GPU that is not current")
    seen = []
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            model = ArbModel(WHOLE, ops=subject.ops, device=device, seed=3)
            ids = random_ids(3, 24).to(device)
            for step in range(2):
                model.backward(model.losses(ids), rate=RATE, step=step)
                model.step()
            losses = tuple(value.detach().cpu() for value in model.losses(ids).values())
            seen.append((losses, tuple(weight.to("cpu") for weight in model.weights().values())))
            assert torch.cuda.current_device() == 0
    exact(seen[1], seen[0], "the model on cuda:1")
