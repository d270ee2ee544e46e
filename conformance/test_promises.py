"""What every op promises beside its own rule: the same bits in whatever mode, memory and subclass a user of PyTorch brings.

One table of modes, one test over the op table; then a GPU that is not current. What ops promise of gradients has a file of its
own, `test_promises_gradients.py`.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from arbitor.optimized.ops.op import op as optimized_op
from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import ArbModel
from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.promises import op as reference_op
from conformance.case import Case, compare
from conformance.compare import exact
from conformance.families import CASES
from conformance.graph.models import RATE, WHOLE, random_ids
from conformance.report import skip
from conformance.subject import MAKERS, Subject

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


def prepared(
    subject: Subject,
    name: str,
    case: Case,
    form: Callable[[Tensor], Tensor] = as_it_is,
    *,
    device_layout: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call on the device under test, on memory of their own, their tensors in a form."""
    fresh, moved = case.copy(), {}
    args = tuple(subject.to_device(value, device_layout, moved) for value in fresh.args)
    kwargs = {key: subject.to_device(value, device_layout, moved) for key, value in fresh.kwargs.items()}
    if name in MAKERS:
        kwargs["device"] = subject.device
    call = Case(args, kwargs).reformed(form)
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
        compare(subject, name, case.reformed(strided))

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


@pytest.mark.parametrize("device_layout", [False, True])
@pytest.mark.parametrize("name", OP_TABLE)
def test_no_kernel_is_launched_on_memory_out_of_reach(
    subject: Subject, name: str, device_layout: bool
) -> None:
    """Kernels reach a GPU, or anything where Triton interprets them. Every other call says what would help, before a launch.

    A weight in canonical form is refused where it is laid out, so that a call with one laid out before is refused elsewhere.
    """
    import triton
    from triton.runtime.interpreter import GridExecutor

    launched = AssertionError(f"{name} launches a kernel on memory that it cannot reach")
    refused: list[Case] = []

    @settings(max_examples=4, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        # A weight is laid out where kernels run.
        call = Case(*prepared(subject, name, case, device_layout=device_layout)).reformed(Tensor.cpu)
        if name in MAKERS:
            call.kwargs["device"] = "cpu"
        with triton.knobs.runtime.scope(), mock.patch.object(GridExecutor, "__call__", side_effect=launched):
            triton.knobs.runtime.interpret = False
            try:
                subject.raw(name)(*call.args, **call.kwargs)
            except RuntimeError as error:
                assert "but Triton kernels run on CUDA" in str(error)
                refused.append(case)

    run()
    # A weight that is laid out stays as it is.
    does_nothing = name in WITHOUT_KERNELS or (device_layout and name == "from_spec")
    assert refused or does_nothing or subject.ops is reference_ops, f"no call of {name} was refused"


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
    op = getattr(subject.ops, name)
    assert op.__name__ == op.__qualname__ == name
    assert inspect.getmodule(op).__name__ == op.__module__ == inspect.unwrap(op).__module__
    assert pickle.loads(pickle.dumps(op)) is op


def on_each_gpu(subject: Subject, what: str) -> tuple[Subject, Subject]:
    """Return the ops on the first and on the second GPU. Skip a test without two GPUs."""
    if subject.device.type != "cuda" or torch.cuda.device_count() < 2:
        skip(
            what,
            f"needs two GPUs; this run is on {subject.device}, and torch sees {torch.cuda.device_count()}",
        )
    return Subject(subject.ops, subject.name, "cuda:0"), Subject(subject.ops, subject.name, "cuda:1")


def test_the_device_of_the_first_argument_is_current_inside_of_an_op() -> None:
    """Whether it is given by its place or by its name, and also a device that an op is told."""
    current, seen = [0], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    def of_tensor(x: Tensor) -> None:
        seen.append(current[0])

    def told(shape: tuple[int, int], *, device: str) -> None:
        seen.append(current[0])

    pretended = mock.patch.multiple(torch.cuda, current_device=lambda: current[0], device=device)
    x = torch.zeros(2)
    with pretended, mock.patch.object(Tensor, "get_device", return_value=1):
        for sets_op in (reference_op, optimized_op()):
            sets_op(of_tensor)(x)
            sets_op(of_tensor)(x=x)
            sets_op(told)((2, 2), device="cuda:1")
            sets_op(told)((2, 2), device="cuda:0")
            sets_op(told)((2, 2), device="cpu")
    assert seen == 2 * [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", OP_TABLE)
def test_the_first_argument_says_where_an_op_runs(name: str) -> None:
    """It is a tensor, a weight or several weights, unless the op is told a device. One op has neither: it computes a number."""
    parameters = inspect.signature(getattr(reference_ops, name)).parameters
    first = next(iter(parameters.values())).annotation
    has_place = first in ("Tensor", "TernaryWeight", "tuple[TernaryWeight, ...]")
    assert has_place or "device" in parameters or name == "step_from_loss"


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
