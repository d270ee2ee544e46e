"""What layers do together: linears of one input have one gradient. Hooks are called in any case."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm, fan_out
from conformance.compare import alike, exact, same_sums
from conformance.graph import models
from conformance.graph.models import quick_context

WIDTH = 24


def stream(dtype: torch.dtype, *, seed: int) -> Tensor:
    """Return activations, [2, 5, D]."""
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    """Also those of linears that read one activation, which a pass does not call one by one."""
    model, ids_BT = models.nano(), models.random_ids(2, 9)
    plain = copy.deepcopy(model)
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
    want = plain.loss(ids_BT)
    assert plain.backward(want, rate=models.RATE, step=0)
    exact(loss.detach(), want.detach())
    for name, weight in plain.weights().items():
        exact(model.weights()[name], weight, name)


def test_a_layer_with_another_forward_is_called() -> None:
    """As libraries give it one that move weights or count calls."""
    called: list[nn.Module] = []
    linear = TernaryLinear(quick_context(), WIDTH, 5)
    linear.forward = lambda x: called.append(linear) or TernaryLinear.forward(linear, x)
    x = stream(torch.float32, seed=1)
    (y,) = fan_out(x, linear)
    assert called == [linear]
    exact(y, linear.ops.linear(x, linear.weight))


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
