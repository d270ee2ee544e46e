"""The module that owns a stack of matrices, one for each expert. As in layers.py, its backward pass votes at once.

Legend: E experts, N outputs of an expert, K inputs, M slots (rows of activations), in one dimension or several.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.constants import MIN_ORTHOGONAL_RANK
from arbitor.reference.graph.averages import average_of
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import Multiplier, row_ranges
from arbitor.reference.graph.spread import Slots
from arbitor.reference.promises import differentiable_once
from arbitor.reference.types import TernaryWeight


class TernaryGroupedLinear(Multiplier):
    """y = x W_e^T, e the expert of each slot. The matrices of `num_groups` linears are stacked in one weight of E N rows.

    Shapes:  x [M, K], experts int64 [M] in -1 .. E - 1 -> [M, N]; zeros where the expert is -1
    All:     every expert may take every input instead: as one linear of E N outputs (`layers.fan_out`), or with the matrices
             side by side, which adds up what experts make of inputs of their own (`side_by_side`). An expert whose inputs, or
             gradients, are all 0 casts no votes
    Ranks:   where ranks keep experts for each other, each has some of them, `num_groups` in all. A slot is taken to the rank of its
             expert and back, and so are gradients. An expert votes with the slots of all ranks, those of rank 0 first
    Start:   standard deviation gain * K^-1/2, as a linear
    """

    def __init__(
        self, context: GraphContext, num_groups: int, num_inputs: int, num_outputs: int, *, gain: float = 1.0
    ) -> None:
        shape, std = (num_groups * num_outputs, num_inputs), gain / math.sqrt(num_inputs)
        spread = context.spread_of_experts(num_groups, num_outputs)

        def start(tensor_id: int) -> TernaryWeight:
            whole = context.random_weight(shape, std=std, tensor_id=tensor_id)
            return whole if spread is None else spread.part(whole)

        super().__init__(context, start)
        self.spread = spread
        self.num_groups = self.weight.shape[0] // num_outputs
        self.orthogonal = min(num_inputs, num_outputs) >= MIN_ORTHOGONAL_RANK
        self.average = average_of(context, shape, orthogonal=self.orthogonal)

    def forward(self, x_MK: Tensor, experts_M: Tensor) -> Tensor:
        """Return `ops.grouped_linear` of x, in the dtype of x, and the change of the adapter if there is one."""
        if self.spread is not None:
            y = self.run(_SpreadLinearFunction, x_MK.reshape(-1, x_MK.shape[-1]), experts_M.flatten())
            return y.unflatten(0, experts_M.shape)
        return self.adapted(self.run(_GroupedLinearFunction, x_MK, experts_M), x_MK, experts_M)

    def side_by_side(self, x: Tensor) -> Tensor:
        """Return the sum of what all experts make of their parts of x: [..., E K] -> [..., N]. An adapter is not asked."""
        return self.run(_SideBySideFunction, x)

    def vote_of(self, grad: Tensor, x: Tensor) -> None:
        """See `Multiplier`: the outputs of all experts, one expert after the other."""
        grad_EN = grad.unflatten(-1, (self.num_groups, -1))

        def made(outputs: range) -> Tensor:
            return self.ops.linear_weight_grad(grad_EN[..., outputs.start : outputs.stop].flatten(-2), x)

        self.vote_in_parts(made)

    def vote_in_parts(
        self, made: Callable[[range], Tensor], used_E: Tensor | None = None, *, num_used: int | None = None
    ) -> None:
        """Vote with the gradients that `made` returns for some outputs of each expert, float [E, outputs, K] in rows.

        Parts follow from the weight alone, because the votes of an expert must not depend on the number of slots.
        With `used_E` there are `num_used` gradients, of the experts that it names.
        """
        num_outputs = self.weight.shape[0] // self.num_groups
        num_groups = self.num_groups if num_used is None else num_used
        num_matrices, chosen = num_groups if self.orthogonal else 0, used_E is not None
        for outputs in row_ranges(num_outputs, self.num_groups * self.weight.shape[1]):
            grad = made(outputs)
            if used_E is None and len(outputs) == num_outputs:
                self.vote(grad, num_matrices=num_matrices)
                continue
            of_E = torch.arange(num_groups, device=self.device) if used_E is None else used_E
            offsets = torch.arange(outputs.start, outputs.stop, device=self.device)
            rows_EN = torch.where(of_E[:, None] < 0, -1, of_E[:, None] * num_outputs + offsets)
            self.vote(grad, rows_EN.flatten(), num_matrices=num_matrices, chosen=chosen)


class _GroupedLinearFunction(torch.autograd.Function):
    """`ops.grouped_linear` with a backward pass that votes."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, experts_M: Tensor, anchor: Tensor | None, module: TernaryGroupedLinear
    ) -> Tensor:
        ctx.save_for_backward(x_MK, experts_M)
        weight = module.forward_weight(ctx)
        return module.ops.grouped_linear(x_MK, weight, experts_M, num_groups=module.num_groups)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x_MK, experts_M), module = ctx.saved_tensors, ctx.module
        weight = module.backward_weight(ctx)
        ops, num_groups, grad_x = module.ops, module.num_groups, None
        if ctx.needs_input_grad[0]:
            grad_x = ops.grouped_linear_input_grad(grad_MN, weight, experts_M, num_groups=num_groups)
        if module.moves:
            _vote_by_expert(module, grad_MN, x_MK, experts_M)
        return grad_x, None, None, None


class _SpreadLinearFunction(torch.autograd.Function):
    """`ops.grouped_linear` of slots at the ranks that keep their experts, with a backward pass that votes there."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, experts_M: Tensor, anchor: Tensor | None, module: TernaryGroupedLinear
    ) -> Tensor:
        assert module.spread is not None
        ctx.slots = Slots(experts_M, module.spread, module.voting.ranks)
        x = ctx.slots.there(x_MK)
        ctx.save_for_backward(x)
        weight = module.forward_weight(ctx)
        made = module.ops.grouped_linear(x, weight, ctx.slots.experts, num_groups=module.num_groups)
        return ctx.slots.back(made)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), module, slots = ctx.saved_tensors, ctx.module, ctx.slots
        weight = module.backward_weight(ctx)
        grad, num_groups, grad_x = slots.there(grad_MN), module.num_groups, None
        if ctx.needs_input_grad[0]:
            grad_x = slots.back(
                module.ops.grouped_linear_input_grad(grad, weight, slots.experts, num_groups=num_groups)
            )
        if module.moves:
            _vote_by_expert(module, grad, x, slots.experts)
        return grad_x, None, None, None


def _vote_by_expert(module: TernaryGroupedLinear, grad_MN: Tensor, x_MK: Tensor, experts_M: Tensor) -> None:
    """Let the experts that slots use vote, with some of the outputs of each at a time.

    Fewer slots than experts cannot use all experts. Then there are only as many gradients as slots. The host never learns which
    experts these are, and rows that are left over are named -1.
    """
    num_slots = experts_M.numel()
    groups_M, used_E = experts_M, None
    if num_slots < module.num_groups:
        groups_M, used_E = numbered(experts_M.flatten())
        groups_M = groups_M.view_as(experts_M)
    num_groups = module.num_groups if used_E is None else num_slots
    if num_groups == 0:
        return

    def made(outputs: range) -> Tensor:
        part = grad_MN[..., outputs.start : outputs.stop]
        return module.ops.grouped_linear_weight_grad(part, x_MK, groups_M, num_groups=num_groups)

    module.vote_in_parts(made, used_E, num_used=num_groups)


class _SideBySideFunction(torch.autograd.Function):
    """`ops.linear` of a stack whose matrices stand side by side, with a backward pass that votes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, module: TernaryGroupedLinear) -> Tensor:
        ctx.save_for_backward(x)
        weight = module.forward_weight(ctx)
        return module.ops.linear(x, weight, num_groups=module.num_groups)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), module = ctx.saved_tensors, ctx.module
        weight = module.backward_weight(ctx)
        ops, num_groups, grad_x = module.ops, module.num_groups, None
        if ctx.needs_input_grad[0]:
            grad_x = ops.linear_input_grad(grad, weight, num_groups=num_groups)
        if module.moves:
            module.vote_in_parts(
                lambda outputs: ops.linear_weight_grad(
                    grad[..., outputs.start : outputs.stop], x, num_groups=num_groups
                )
            )
        return grad_x, None, None


def numbered(experts_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots' experts numbered anew from 0, -1 for unused slots, and the expert that each number stands for.

    There are as many numbers as slots, so that shapes stay fixed. Numbers that are left over stand for -1.
    """
    sorted_M, order = experts_M.sort(stable=True)
    starts = sorted_M >= 0
    starts[1:] &= sorted_M[1:] != sorted_M[:-1]
    # The number is -1 before the first used slot.
    numbers = starts.cumsum(0) - 1
    groups_M = torch.empty_like(experts_M).scatter_(0, order, numbers)
    places = torch.where(starts, numbers, len(numbers))
    used = torch.full((len(numbers) + 1,), -1, dtype=experts_M.dtype, device=experts_M.device)
    return groups_M, used.scatter_(0, places, torch.where(starts, sorted_M, -1))[:-1]
