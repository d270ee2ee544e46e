"""What a module makes of its weight and how the weight learns, said once for eager calls and for graphs of torch.compile.

A graph of the compiler holds tensors and calls of registered ops, and no modules. So a rule that may stand in such a graph is
registered with torch as two ops: `arbitor::<name>_layer` computes, and `arbitor::<name>_layer_backward` lets the weight vote. Both
are given the module's ticket, a number by which they find it, and the tensors in which the weight's value lies. The compiler sees
neither kernels nor votes, so that both are those of an eager call.

No tensor of the op that casts votes holds them when it returns: a gradient may wait for others of its shape until the pass ends
(`Voting`). So `mutates_args` would be a false promise. The op is registered as one with effects in order instead. No such op is
dropped, merged with its equal or moved past another one.

Legend: N rows and K columns of the weight.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.in_graphs import define, differentiate, own_memory
from arbitor.reference.promises import differentiable_once

Shaped = Callable[[Tensor, Sequence[int], torch.dtype], Tensor]
"""Returns an empty tensor like the result for an input, (N, K) and the dtype of activations."""

TICKET_BITS = 62
"""Bits of a ticket. They are random, so that a graph that was saved finds no module in another process."""

with torch.inference_mode(False):
    ANCHOR = torch.empty(0, device="cpu", requires_grad=True)
"""An input of graphs that makes autograd come by where no other input has a gradient, as an anchor does in an eager call."""

_HOLDERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The modules by their tickets."""


@dataclass(frozen=True)
class Rule:
    """What a module with a weight computes, and what its backward pass does.

    Fields:
        compute:  compute(module, weight, *inputs) returns the result, a tensor.
        learn:    learn(module, weight, grad, *inputs, asked=...) lets the weight vote if the module moves, and returns the
                  gradient of the first input if it is asked for, else None.
        in_graph: the registered op that stands for the rule in graphs of torch.compile. It is given the first input, an anchor or
                  None, the ticket, codes, exponents and shape of the weight, and the dtype of activations. None: the rule runs
                  outside.
    """

    compute: Callable[..., Tensor]
    learn: Callable[..., Tensor | None]
    in_graph: Callable[..., Tensor] | None = None


class RuleFunction(torch.autograd.Function):
    """A rule applied to inputs and to the weight of a module, with a backward pass that votes."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, module: Any, anchor: Tensor | None, *inputs: Tensor) -> Tensor:
        """Return the result. The anchor lets autograd come by although no input has a gradient."""
        ctx.rule = rule
        ctx.save_for_backward(*inputs)
        return rule.compute(module, module.forward_weight(ctx), *inputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the first input, if it asks for one."""
        module, inputs, asked = ctx.module, ctx.saved_tensors, ctx.needs_input_grad[3]
        found = ctx.rule.learn(module, module.backward_weight(ctx), grad, *inputs, asked=asked)
        return None, None, None, found, *(None for _ in inputs[1:])


def new_ticket(module: Any) -> Tensor:
    """Return a ticket for a module, an int64 scalar on the CPU.

    A number would be a constant of a graph. The graph of one layer would not serve another one of its shape.
    """
    number = secrets.randbits(TICKET_BITS)
    _HOLDERS[number] = module
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def holder_of(ticket: Tensor) -> Any:
    """Return the module that a ticket was made for; raise RuntimeError if it is no more, or was of another process."""
    module = _HOLDERS.get(int(ticket))
    if module is None:
        raise RuntimeError(
            "a graph names a ternary layer that is not here, but must run in the process that compiled it, while its model is there"
        )
    return module


def is_recorded(tensor: Tensor) -> bool:
    """Return whether work on the device of a tensor is being recorded as a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def registered(
    name: str, compute: Callable[..., Tensor], learn: Callable[..., Tensor | None], like: Shaped
) -> Rule:
    """Return a rule of one input with its ops for graphs of torch.compile.

    Args:
        name:           of the ops: `arbitor::<name>_layer` and `arbitor::<name>_layer_backward`.
        compute, learn: as the fields of `Rule`.
        like:           an empty tensor like the result, from shapes and dtypes alone.
    """

    def forward(
        x: Tensor,
        anchor: Tensor | None,
        ticket: Tensor,
        codes: Tensor,
        exponents: Tensor,
        shape: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        module = holder_of(ticket)
        return own_memory((compute(module, module.weight_worth(codes, exponents), x),), (x,))[0]

    def backward(
        grad: Tensor, x: Tensor, ticket: Tensor, codes: Tensor, exponents: Tensor, asked: bool
    ) -> tuple[Tensor, Tensor]:
        module = holder_of(ticket)
        taken = module.voting.current
        if is_recorded(grad) and not (taken and taken.recorded):
            raise RuntimeError(
                "a backward pass of ternary layers is being recorded as a CUDA graph, which would repeat its kernels without its "
                "votes, but must run anew each time: compile without mode='reduce-overhead' and 'max-autotune'"
            )
        weight = module.weight_worth(codes, exponents)
        module.arrive(weight)
        found = learn(module, weight, grad, x, asked=asked)
        made = x.new_empty(0) if found is None else own_memory((found,), (grad, x))[0]
        return made, torch.empty(0)

    def backward_like(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *_, asked = others
        return x.new_empty(x.shape if asked else 0), torch.empty(0)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ticket, codes, exponents, *_ = inputs
        ctx.save_for_backward(x, ticket, codes, exponents)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asked, anchored, *_ = ctx.needs_input_grad
        found, of_anchor = votes(grad, *ctx.saved_tensors, asked)
        return found if asked else None, of_anchor if anchored else None, *[None] * 5

    qualified, weight = f"arbitor::{name}_layer", "Tensor ticket, Tensor codes, Tensor exponents"
    op = define(
        qualified,
        f"(Tensor x, Tensor? anchor, {weight}, int[] shape, ScalarType dtype) -> Tensor",
        forward,
        lambda x, anchor, ticket, codes, exponents, shape, dtype: like(x, shape, dtype),
    )
    votes = define(
        f"{qualified}_backward",
        f"(Tensor grad, Tensor x, {weight}, bool asked) -> (Tensor, Tensor)",
        backward,
        backward_like,
        in_order=True,
    )
    differentiate(qualified, gradients, keep)
    return Rule(compute, learn, op)
