"""What layers do together: a stream and its norm have one gradient, linears of one input too. Hooks are called in any case."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm, add_norm, fan_out, plain
from arbitor.reference.types import TernaryWeight
from conformance.compare import alike, exact, same_sums
from conformance.graph import models
from conformance.graph.models import quick_context
from conformance.subject import Subject

WIDTH = 24


def stream(dtype: torch.dtype, *, seed: int) -> Tensor:
    """Return a residual stream, a branch or a gradient, [2, 5, D]."""
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_two_steps(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what `add_norm` returns, by a sum and a call of the norm."""
    total = x if branch is None else x + branch
    return total, norm(total)


def learned(
    join: Callable[..., Any], reads: tuple[bool, bool], dtype: torch.dtype, *, frozen: bool, has_branch: bool
) -> tuple[list[Tensor], list[Tensor], TernaryWeight]:
    """Return results, gradients, and the norm's weight after a vote, where some of stream and norm are read by a loss."""
    context = quick_context(dtype=dtype)
    norm = TernaryRMSNorm(context, WIDTH, frozen=frozen)
    x, branch = (stream(dtype, seed=seed).requires_grad_() for seed in (1, 2))
    with context.voting.taking(rate=2.0, step=0):
        results = join(x, branch if has_branch else None, norm)
        read = [result for result, is_read in zip(results, reads, strict=True) if is_read]
        torch.autograd.backward(read, [stream(dtype, seed=3 + place) for place in range(len(read))])
    grads = [each.grad for each in (x, branch) if each.grad is not None]
    return [result.detach() for result in results], grads, norm.ops.to_spec(norm.weight)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize("reads", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stream_and_its_norm_are_those_of_two_steps(
    reads: tuple[bool, bool], dtype: torch.dtype, frozen: bool, has_branch: bool
) -> None:
    """Bit for bit: results, the gradients of stream and branch, and the votes of a norm that learns."""
    want, got = (
        learned(join, reads, dtype, frozen=frozen, has_branch=has_branch) for join in (in_two_steps, add_norm)
    )
    assert len(got[1]) == 1 + has_branch
    for one, other in zip(got, want, strict=True):
        exact(
            tuple(one) if isinstance(one, list) else one, tuple(other) if isinstance(other, list) else other
        )
    assert frozen or not reads[1] or got[2].trit_accum.any()


def test_the_gradient_of_a_stream_is_rounded_once() -> None:
    """In bfloat16 the part of the norm is not rounded before it is added, and what autograd hands over is not written to."""
    dtype = torch.bfloat16
    norm = TernaryRMSNorm(quick_context(dtype=dtype), WIDTH)
    x, branch = (stream(dtype, seed=seed).requires_grad_() for seed in (1, 2))
    g_total, g_normed = (stream(dtype, seed=seed) for seed in (3, 4))
    kept = g_total.clone()
    total, normed = add_norm(x, branch, norm)
    torch.autograd.backward([total, normed], [g_total, g_normed])
    dx = norm.ops.rms_norm_input_grad(g_normed.double(), total.detach().double(), norm.weight)
    want = (g_total.float() + dx.float()).to(dtype)
    exact(x.grad, want)
    exact(branch.grad, want)
    exact(g_total, kept)
    assert not torch.equal(want, g_total + dx.to(dtype)), "two roundings give the same here"


def test_streams_of_a_model_are_added_where_they_are_normed(subject: Subject) -> None:
    """In a layer the sum behind attention, and in turns of the loop the sum that they begin with. No other gradient is a sum."""
    sums: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if name != "rms_norm_input_grad" or kwargs["added"] is not None:
                sums.append(name)
            return subject.raw(name)(*args, **kwargs)

        return noted

    noted_ops = {name: noting(name) for name in ("add_rms_norm", "rms_norm_input_grad")}
    ops = models.with_ops(models.drawn_by_the_reference(subject.ops), noted_ops)
    model = models.nano(ops=ops, device=subject.device, max_moe_iters=2)
    loss = model.loss(models.random_ids(2, 9).to(subject.device))
    # Two layers, and a second turn.
    assert sums == ["add_rms_norm"] * 3
    sums.clear()
    assert model.backward(loss, rate=models.RATE, step=0)
    # The norms before attention, before the experts of each turn, and of the head.
    assert sums == ["rms_norm_input_grad"] * 6


REGISTER = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(module)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(module)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(module)),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(
        lambda *_: seen.append(module)
    ),
    "every module": lambda module, seen: nn.modules.module.register_module_forward_hook(
        lambda called, *_: seen.append(called)
    ),
}
"""Ways to have a hook called, by the names of the hooks."""


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_of_layers_are_called_and_change_no_loss(kind: str) -> None:
    """Also those of layers that a pass does not call one by one: norms of the stream, and linears that read one activation."""
    model, ids_BT = models.nano(), models.random_ids(2, 9)
    unhooked = copy.deepcopy(model)
    layers = [each for each in model.modules() if isinstance(each, (TernaryLinear, TernaryRMSNorm))]
    seen: list[nn.Module] = []
    hooks = [REGISTER[kind](each, seen) for each in (layers[:1] if kind == "every module" else layers)]
    try:
        loss = model.loss(ids_BT)
        assert model.backward(loss, rate=models.RATE, step=0)
    finally:
        for hook in hooks:
            hook.remove()
    assert {id(each) for each in layers} <= {id(each) for each in seen}
    want = unhooked.loss(ids_BT)
    assert unhooked.backward(want, rate=models.RATE, step=0)
    exact(loss.detach(), want.detach())
    for name, weight in unhooked.weights().items():
        exact(model.weights()[name], weight, name)


def test_a_layer_with_another_forward_is_called() -> None:
    """As libraries give it one that move weights or count calls."""
    context, called = quick_context(), []
    norm, linear = TernaryRMSNorm(context, WIDTH), TernaryLinear(context, WIDTH, 5)
    for module in (norm, linear):
        module.forward = lambda x, module=module: called.append(module) or type(module).forward(module, x)
    x = stream(torch.float32, seed=1)
    _, normed = add_norm(x, None, norm)
    (y,) = fan_out(x, linear)
    assert called == [norm, linear]
    exact(normed, norm.ops.rms_norm(x, norm.weight))
    exact(y, linear.ops.linear(x, linear.weight))


def test_a_forward_that_is_wrapped_for_a_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers wrap it. `functools.wraps` gives the wrapper the name and the module of what it wraps."""
    context, called = quick_context(), []
    norm, linear = TernaryRMSNorm(context, WIDTH), TernaryLinear(context, WIDTH, 5)
    for kind in (TernaryRMSNorm, TernaryLinear):

        @functools.wraps(kind.forward)
        def forward(module: Any, x: Tensor, run: Callable[..., Tensor] = kind.forward) -> Tensor:
            called.append(module)
            return run(module, x)

        monkeypatch.setattr(kind, "forward", forward)
    x = stream(torch.float32, seed=1)
    add_norm(x, None, norm)
    fan_out(x, linear)
    assert called == [norm, linear]
    assert not plain(linear)


class BiasedLinear(TernaryLinear):
    """A linear of somebody else, who has no need to know which ops read the weights of linears."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class HalvedNorm(TernaryRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2.0


def test_a_subclass_with_another_forward_is_called() -> None:
    context = quick_context()
    norm, linear = HalvedNorm(context, WIDTH), BiasedLinear(context, WIDTH, 5)
    x = stream(torch.float32, seed=1)
    _, normed = add_norm(x, None, norm)
    (y,) = fan_out(x, linear)
    exact(normed, norm.ops.rms_norm(x, norm.weight) / 2.0)
    exact(y.detach(), linear.ops.linear(x, linear.weight) + 1.0)
    assert not plain(linear) and plain(TernaryLinear(context, WIDTH, 5))


class Steered(nn.Module):
    """What takes the stream and the nodes, and calls the module that it wraps with 1 added to the stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, e_BPD: Tensor, nodes_BPD: Tensor | None = None) -> Tensor:
        return self.inner(e_BPD + 1.0, nodes_BPD)


def steered_by_a_hook(layer: Any) -> None:
    layer.moe_graph.register_forward_pre_hook(lambda _, given: (given[0] + 1.0, *given[1:]))


def steered_by_a_wrapper(layer: Any) -> None:
    layer.moe_graph = Steered(layer.moe_graph)


@pytest.mark.parametrize("place", [0, 1], ids=["first layer", "last layer"])
@pytest.mark.parametrize("has_nodes", [False, True])
@pytest.mark.parametrize("steer", [steered_by_a_hook, steered_by_a_wrapper])
def test_what_changes_the_stream_before_the_experts_changes_what_they_read(
    steer: Callable[[Any], None], has_nodes: bool, place: int
) -> None:
    """As somebody does who steers a model, or who puts a module of his own around that of the experts."""
    layer = models.nano(max_moe_iters=2).layers[place]
    h, nodes = stream(torch.float32, seed=1), stream(torch.float32, seed=2) if has_nodes else None
    unsteered = layer(h, nodes).detach()
    e = h + layer.attention(layer.attention_norm(h))
    exact(layer.moe_graph(e, nodes).detach(), unsteered, "modules that are called one by one")
    want = layer.moe_graph(e + 1.0, nodes).detach()
    steer(layer)
    exact(layer(h, nodes).detach(), want)
    assert not torch.equal(want, unsteered)


def test_a_float_norm_takes_the_place_of_a_ternary_one() -> None:
    norm = nn.RMSNorm(WIDTH, eps=1e-6)
    x, branch = (stream(torch.float32, seed=seed) for seed in (1, 2))
    total, normed = add_norm(x, branch, norm)
    exact(total, x + branch)
    exact(normed.detach(), norm(x + branch).detach())


@pytest.mark.parametrize("is_wider", [True, False])
def test_a_branch_of_another_dtype_or_shape_is_added_as_torch_adds(is_wider: bool) -> None:
    """A module of another library may hand one over."""
    norm = TernaryRMSNorm(quick_context(dtype=torch.bfloat16), WIDTH)
    x = stream(torch.bfloat16, seed=1)
    branch = stream(torch.float32, seed=2) if is_wider else stream(torch.bfloat16, seed=2)[:1]
    total, normed = add_norm(x, branch, norm)
    exact(total, x + branch)
    exact(normed, norm.ops.rms_norm(x + branch, norm.weight))


def test_linears_of_one_input_are_called_apart_where_they_must_be() -> None:
    """A float module among them takes its own way, and the others go together."""
    context = quick_context()
    first, last = (TernaryLinear(context, WIDTH, count) for count in (5, 7))
    floats = nn.Linear(WIDTH, 3, bias=False)
    x = stream(torch.float32, seed=1).requires_grad_()
    outputs = fan_out(x, first, floats, last)
    for output, module in zip(outputs, (first, floats, last), strict=True):
        same_sums(output.detach(), module(x).detach())
    sum(output.sum() for output in outputs).backward()
    got, x.grad = x.grad, None
    sum(module(x).sum() for module in (first, floats, last)).backward()
    alike(got, x.grad)


def test_a_linear_that_no_loss_reads_takes_no_part() -> None:
    """Of linears of one input: it has no gradient, and casts no vote."""
    context = quick_context()
    read, unread = (TernaryLinear(context, WIDTH, count) for count in (5, 7))
    unread.vote_of = lambda *_: pytest.fail("it votes")  # type: ignore[method-assign]
    x = stream(torch.float32, seed=1).requires_grad_()
    grad = torch.ones(2, 5, 5)
    with context.voting.taking(rate=2.0, step=0):
        y, _ = fan_out(x, read, unread)
        y.backward(grad)
    exact(x.grad, read.ops.linear_input_grad(grad, read.weight))
    assert read.weight.trit_accum.any()
