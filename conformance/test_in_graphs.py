"""Ops in graphs of torch.compile: what the compiler is told of a result is so, and results and gradients are those of any call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from arbitor.optimized import ops as optimized_ops
from arbitor.reference import ops as reference_ops
from arbitor.reference.in_graphs import ARGUMENTS, RESULTS, own_memory
from arbitor.reference.op_table import OP_TABLE
from conformance.case import Case
from conformance.compare import exact
from conformance.families import CASES
from conformance.subject import Subject

REGISTERED = [name for name, row in OP_TABLE.items() if row.like is not None]
SETS = [pytest.param(reference_ops, id="reference"), pytest.param(optimized_ops, id="optimized")]


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def form(result: Any) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.dtype, tensor.stride(), tensor.device.type) for tensor in listed(result)]


def on_device(ops: ModuleType, subject: Subject, case: Case) -> Case:
    """Return a call of the reference as it is, or one with tensors where the other op set runs, and weights in its layout."""
    if ops is reference_ops:
        return case
    moved: dict[int, Any] = {}
    kwargs = {name: subject.to_device(value, True, moved) for name, value in case.kwargs.items()}
    return Case(tuple(subject.to_device(value, True, moved) for value in case.args), kwargs)


def fits(ops: ModuleType, case: Case) -> bool:
    """Return whether the op set computes in the dtypes of a call."""
    values = (*case.args, *case.kwargs.values())
    return ops is reference_ops or not any(
        isinstance(value, Tensor) and value.dtype is torch.float64 for value in values
    )


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("name", REGISTERED)
def test_the_compiler_is_told_what_results_are_like(subject: Subject, ops: ModuleType, name: str) -> None:
    """Shapes, dtypes and strides of the fake are those of the result, which has the bits of a plain call."""
    op = getattr(ops, name)
    within = op.in_graphs
    overload = getattr(getattr(torch.ops, within.namespace), within.register()).default

    @settings(max_examples=3 if ops is reference_ops else 1)
    @given(case=CASES[name])
    def run(case: Case) -> None:
        if not fits(ops, case) or case.kwargs.get("out") is not None:
            return
        case = on_device(ops, subject, case)
        flat = within.taken_apart(
            within.arguments(case.args, {k: v for k, v in case.kwargs.items() if k != "out"})
        )
        want, got = op(*case.args, **case.kwargs), overload(*flat)
        for one, other in zip(listed(got), listed(want), strict=True):
            exact(one.cpu(), other.cpu(), name)
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in flat]
        with mode:
            assert form(overload(*fakes)) == form(got)

    run()


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("name", REGISTERED)
def test_gradients_are_those_of_a_plain_call(subject: Subject, ops: ModuleType, name: str) -> None:
    op = getattr(ops, name)
    within = op.in_graphs
    if not within.learnt:
        assert within.detached or within.returned != "Tensor" or ops is optimized_ops
        return
    within.register()
    names = within.names

    @settings(max_examples=2 if ops is reference_ops else 1)
    @given(case=CASES[name])
    def run(case: Case) -> None:
        if not fits(ops, case) or case.kwargs.get("out") is not None:
            return
        case = on_device(ops, subject, case)
        grads = []
        for call in (lambda given: op(**given), lambda given: within.call((), given)):
            arguments = {**dict(zip(names, case.args, strict=False)), **case.kwargs}
            keys = [
                key
                for key in within.learnt
                if isinstance(arguments.get(key), Tensor) and arguments[key].is_floating_point()
            ]
            leaves = [arguments[key].detach().clone().requires_grad_() for key in keys]
            result = call({**arguments, **dict(zip(keys, leaves, strict=True))})
            up = torch.linspace(-1, 1, result.numel(), device=result.device, dtype=result.dtype)
            found = [torch.zeros_like(leaf) for leaf in leaves]
            # Of no slots a result may have no gradient.
            if result.requires_grad:
                found = list(
                    torch.autograd.grad(result, leaves, up.view(result.shape), materialize_grads=True)
                )
            grads.append([grad.cpu() for grad in found])
        for one, other in zip(*grads, strict=True):
            exact(one, other, name)

    run()


def test_torch_checks_the_registration() -> None:
    """By torch's own test of one op with a weight and one with several results, also as the compiler differentiates them."""
    weight = reference_ops.initial_weight((12, 24), std=0.3, seed=1, tensor_id=0)
    x = torch.randn(2, 5, 24).transpose(0, 1).requires_grad_()
    for name, args in (("linear", (x, weight)), ("weigh_ranks_grads", _ranks())):
        within = getattr(reference_ops, name).in_graphs
        overload = getattr(torch.ops.arbitor_reference, within.register()).default
        torch.library.opcheck(overload, tuple(within.taken_apart(within.arguments(args, {}))))


def _ranks() -> tuple[Tensor, ...]:
    ranks, logits = torch.randn(3, 8), torch.randn(3, 4)
    return torch.ones_like(ranks), ranks, logits, torch.tensor([[0, 2], [1, 3], [0, 1]])


def test_a_function_of_several_ops_is_one_graph(subject: Subject) -> None:
    """With weights, gradients, integers and sizes that change, and no second graph for another weight of the shape."""
    ops, device = optimized_ops, subject.device

    def weight(shape: tuple[int, int], seed: int) -> Any:
        made = reference_ops.initial_weight(shape, std=0.3, seed=seed, tensor_id=0)
        return ops.from_spec(made.to(device))

    def net(x: Tensor, up: Any, down: Any, norm: Any) -> tuple[Tensor, Tensor]:
        h = ops.gated(ops.linear(x, up), ops.linear(x, up).neg())
        y = ops.linear(h, down) + h @ ops.dequantize(down).T
        return ops.rms_norm(y, norm), ops.choose_experts(y, up, top_k=2)

    norm = ops.from_spec(reference_ops.constant_weight((1, 24), trit=1, exponent=0).to(device))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, rows in ((1, 7), (2, 11)):
            args = weight((30, 24), seed), weight((24, 30), seed + 7), norm
            results = []
            for call in (net, compiled):
                x = torch.linspace(-2, 2, rows * 24, device=device).view(rows, 24).requires_grad_()
                y, experts = call(x, *args)
                y.square().sum().backward()
                results.append((y.detach(), experts, x.grad))
            for one, other in zip(*results, strict=True):
                exact(one.cpu(), other.cpu())


def test_what_stands_in_no_graph_says_so() -> None:
    torch._dynamo.reset()
    weight, x = reference_ops.initial_weight((12, 24), std=0.3, seed=1, tensor_id=0), torch.ones(2, 12)
    for call in (
        lambda x: reference_ops.count_nonfinite_rows(x),
        lambda x: reference_ops.linear_input_grad(x, weight, out=torch.zeros(2, 24)),
    ):
        with pytest.raises(Exception, match="stands in no graph of"):
            torch.compile(call, backend="eager", fullgraph=True)(x)
        exact(torch.compile(call, backend="eager")(x), call(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, weight: reference_ops.linear(x, x), "weight is a Tensor, but must be a weight"),
        (lambda x, weight: reference_ops.linear(x, weight, 1), "takes 2 positional arguments but 3"),
        (lambda x, weight: reference_ops.linear(x, weight, x=x), "multiple values for argument 'x'"),
        (lambda x, weight: reference_ops.linear(x, weight, groups=1), "unexpected keyword argument"),  # type: ignore[call-arg]
    ],
)
def test_a_wrong_call_is_refused_in_the_words_of_the_op(call: Callable[..., Tensor], words: str) -> None:
    weight, x = reference_ops.initial_weight((24, 24), std=0.3, seed=1, tensor_id=0), torch.ones(2, 24)
    for tried in (call, torch.compile(call, backend="eager")):
        with pytest.raises(TypeError, match=words):
            tried(x, weight)


def test_every_row_that_says_so_can_be_registered() -> None:
    """Types of arguments and results are among those that a schema is made of."""
    for ops in (reference_ops, optimized_ops):
        for name in REGISTERED:
            within = getattr(ops, name).in_graphs
            others = {kind for key, kind in within.kinds.items() if key not in within.weights}
            assert others <= ARGUMENTS.keys() and within.returned in RESULTS, name


def test_results_have_memory_of_their_own() -> None:
    x = torch.arange(6).view(2, 3)
    same, turned, part = own_memory((x, x.T, x[1]), (x,))
    assert len({tensor.data_ptr() for tensor in (x, same, turned, part)}) == 4
    assert turned.is_contiguous() and torch.equal(turned, x.T) and torch.equal(part, x[1])
