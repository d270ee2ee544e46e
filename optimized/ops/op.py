"""The ops of this set keep what every op promises (`arbitor.reference.promises`). `@op()` stands above each definition.

Their gradients are computed by hand. `op(x=...)` names the function that computes the gradient of the argument `x`. If an op has
no gradient, a call that asks for one raises. An op that is compared EXACT returns integers, or floats made of integers. They have
no gradient, so its results are detached, as the results of the reference are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.reference.in_graphs import Layout
from arbitor.reference.op_table import EXACT, OP_TABLE
from arbitor.reference.promises import differentiable_once, promised
from arbitor.reference.types import TernaryWeight

P = ParamSpec("P")
R = TypeVar("R")

Gradient = Callable[..., Tensor | Mapping[str, Tensor]]
"""A function `gradient(grad, **arguments)` that returns the gradient of one argument, or the gradients of several by their names.
`grad` is the gradient of the result, and `arguments` are all arguments of the call."""


def op(**gradients: Gradient) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a function an op of this set; signature, docstring and module stay its own.

    Args:
        gradients: for each argument that is differentiable, the gradient of the loss with respect to it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name, signature = function.__name__, inspect.signature(function)
        # A function without a row in the table is no op yet, and counts as one that returns floats.
        differentiable = name not in OP_TABLE or OP_TABLE[name].output is not EXACT

        def compute(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.is_grad_enabled() or not asks_for_gradient(args, kwargs):
                return function(*args, **kwargs)
            if not differentiable:
                with torch.no_grad():
                    return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            asked = {key: value for key, value in bound.arguments.items() if requires_grad(value)}
            for key in asked:
                if key not in gradients:
                    raise RuntimeError(
                        f"{key} requires a gradient, but {name} has none here: call it under torch.no_grad(), "
                        f"or use arbitor.reference.ops.{name}"
                    )
            return _WithGradients.apply(function, gradients, bound.arguments, *asked.values())

        return promised(function, compute, "arbitor", LAYOUT, made_by(gradients), tuple(gradients))

    return decorate


def requires_grad(value: object) -> bool:
    """Return whether an argument asks for a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


def asks_for_gradient(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an argument of a call asks for a gradient."""
    # Loops, because a generator would cost more than the rest of the call's wrapping.
    for value in args:
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    for value in kwargs.values():  # noqa: SIM110
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


class _WithGradients(torch.autograd.Function):
    """A call of an op, with the gradients of those arguments that ask for one."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], gradients: Mapping[str, Gradient],
        arguments: Mapping[str, Any], *asked: Tensor,
    ) -> Tensor:  # fmt: skip
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        weights = [value for value in arguments.values() if isinstance(value, (DeviceWeight, TernaryWeight))]
        # Trits and scales are saved beside the tensors so that torch refuses a gradient of a weight that has changed since.
        ctx.save_for_backward(*tensors.values(), *(part for weight in weights for part in worth_of(weight)))
        ctx.names = tuple(tensors)
        ctx.others = {name: value for name, value in arguments.items() if name not in tensors}
        ctx.gradients = {name: gradients[name] for name, value in tensors.items() if requires_grad(value)}
        return function(**arguments)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The tensors of the weights come last. Only torch reads them, to see whether they changed.
        arguments = {**ctx.others, **dict(zip(ctx.names, ctx.saved_tensors, strict=False))}
        return None, None, None, *made_by(ctx.gradients)(tuple(ctx.gradients), grad, arguments)


def made_by(
    gradients: Mapping[str, Gradient],
) -> Callable[[Sequence[str], Tensor, Mapping[str, Any]], list[Tensor]]:
    """Return a function of names, the gradient of the result and all arguments, which returns the gradients of those arguments."""

    def grads(names: Sequence[str], grad: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        made: dict[Gradient, Tensor | Mapping[str, Tensor]] = {}
        for name in names:
            # One call serves all arguments whose gradients it makes together.
            if gradients[name] not in made:
                made[gradients[name]] = gradients[name](grad, **arguments)
        results = ((name, made[gradients[name]]) for name in names)
        return [found if isinstance(found, Tensor) else found[name] for name, found in results]

    return grads


def weight_of(codes: Tensor, *others: Any, **form: Any) -> AnyWeight:
    """Return the weight of codes in canonical form or in device layout, which differ in their dtype."""
    return (TernaryWeight if codes.dtype is torch.uint8 else DeviceWeight)(codes, *others, **form)


LAYOUT = Layout(lambda weight: weight.words if isinstance(weight, DeviceWeight) else weight.packed, weight_of)
"""Weights of this op set."""


def worth_of(weight: DeviceWeight | TernaryWeight) -> list[Tensor]:
    """Return the tensors that the value of a weight depends on, without tensors of inference mode, which torch does not watch."""
    return [tensor for tensor in (LAYOUT.codes(weight), weight.exponents) if not tensor.is_inference()]
