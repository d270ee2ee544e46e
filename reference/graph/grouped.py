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
from arbitor.reference.graph.rule import Rule
from arbitor.reference.graph.spread import Slots
from arbitor.reference.promises import differentiable_once
from arbitor.reference.types import LaidOutWeight, TernaryWeight
from arbitor.reference.unordered import in_any_order


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
        self.average = average_of(self, orthogonal=self.orthogonal)

    def forward(self, x_MK: Tensor, experts_M: Tensor) -> Tensor:
        """Return `ops.grouped_linear` of x, in the dtype of x, and the change of the adapter if there is one."""
        if self.spread is not None:
            slots = Slots(experts_M.flatten(), self.spread, self.voting.ranks)
            x = _Dealt.apply(x_MK.reshape(-1, x_MK.shape[-1]), slots.there, slots.back)
            y: Tensor = _Dealt.apply(self.run(_GROUPED, x, slots.experts), slots.back, slots.there)
            return y.unflatten(0, experts_M.shape)
        return self.adapted(self.run(_GROUPED, x_MK, experts_M), x_MK, experts_M)

    def side_by_side(self, x: Tensor) -> Tensor:
        """Return the sum of what all experts make of their parts of x: [..., E K] -> [..., N]. An adapter is not asked."""
        return self.run(_SIDE_BY_SIDE, x)

    def vote_of(self, grad: Tensor, x: Tensor) -> None:
        """See `Multiplier`: the outputs of all experts, one expert after the other."""
        grad_EN = grad.unflatten(-1, (self.num_groups, -1))

        def made(outputs: range, dtype: torch.dtype) -> Tensor:
            part = grad_EN[..., outputs.start : outputs.stop].flatten(-2)
            return self.ops.linear_weight_grad(part, x, dtype=dtype)

        self.vote_in_parts(made)

    def vote_in_parts(
        self,
        made: Callable[[range, torch.dtype], Tensor],
        used_E: Tensor | None = None,
        *,
        num_used: int | None = None,
    ) -> None:
        """Vote with the gradients that `made` returns for some outputs of each expert in some dtype, [E, outputs, K] in rows.

        Parts follow from the weight alone, because the votes of an expert must not depend on the number of slots.
        With `used_E` there are `num_used` gradients, of the experts that it names.
        """
        num_outputs = self.weight.shape[0] // self.num_groups
        num_groups = self.num_groups if num_used is None else num_used
        num_matrices, chosen = num_groups if self.orthogonal else 0, used_E is not None
        dtype = self.voting.dtype_of(num_matrices)
        for outputs in row_ranges(num_outputs, self.num_groups * self.weight.shape[1]):
            grad = made(outputs, dtype)
            if used_E is None and len(outputs) == num_outputs:
                self.vote(grad, num_matrices=num_matrices)
                continue
            of_E = torch.arange(num_groups, device=self.device) if used_E is None else used_E
            offsets = torch.arange(outputs.start, outputs.stop, device=self.device)
            rows_EN = torch.where(of_E[:, None] < 0, -1, of_E[:, None] * num_outputs + offsets)
            rows = rows_EN.flatten()
            self.vote(grad, rows, num_matrices=num_matrices, chosen=chosen, part=outputs.start)


def _multiplied(
    module: TernaryGroupedLinear, weight: LaidOutWeight, x_MK: Tensor, experts_M: Tensor
) -> Tensor:
    return module.ops.grouped_linear(x_MK, weight, experts_M, num_groups=module.num_groups)


def _learns(
    module: TernaryGroupedLinear,
    weight: LaidOutWeight,
    grad_MN: Tensor,
    x_MK: Tensor,
    experts_M: Tensor,
    *,
    asked: bool,
) -> Tensor | None:
    grad_x, num_groups = None, module.num_groups
    if asked:
        grad_x = module.ops.grouped_linear_input_grad(grad_MN, weight, experts_M, num_groups=num_groups)
    if module.moves:
        _vote_by_expert(module, grad_MN, x_MK, experts_M)
    return grad_x


class _Dealt(torch.autograd.Function):
    """What slots are given, sent to where they are computed or back home. Gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, send: Callable[[Tensor], Tensor], send_back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.send_back = send_back
        return send(values)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.send_back(grad), None, None


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

    def made(outputs: range, dtype: torch.dtype) -> Tensor:
        part = grad_MN[..., outputs.start : outputs.stop]
        return module.ops.grouped_linear_weight_grad(part, x_MK, groups_M, num_groups=num_groups, dtype=dtype)

    module.vote_in_parts(made, used_E, num_used=num_groups)


def _side_by_side(module: TernaryGroupedLinear, weight: LaidOutWeight, x: Tensor) -> Tensor:
    return module.ops.linear(x, weight, num_groups=module.num_groups)


def _side_by_side_learns(
    module: TernaryGroupedLinear, weight: LaidOutWeight, grad: Tensor, x: Tensor, *, asked: bool
) -> Tensor | None:
    ops, num_groups = module.ops, module.num_groups
    grad_x = ops.linear_input_grad(grad, weight, num_groups=num_groups) if asked else None
    if module.moves:
        module.vote_in_parts(
            lambda outputs, dtype: ops.linear_weight_grad(
                grad[..., outputs.start : outputs.stop], x, num_groups=num_groups, dtype=dtype
            )
        )
    return grad_x


_GROUPED = Rule(_multiplied, _learns)
_SIDE_BY_SIDE = Rule(_side_by_side, _side_by_side_learns)


def numbered(experts_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots' experts numbered anew from 0, -1 for unused slots, and the expert that each number stands for.

    There are as many numbers as slots, so that shapes stay fixed. Numbers that are left over stand for -1.
    """
    sorted_M, order = experts_M.sort(stable=True)
    starts = sorted_M >= 0
    starts[1:] &= sorted_M[1:] != sorted_M[:-1]
    # The number is -1 before the first used slot.
    numbers = starts.cumsum(0) - 1
    places = torch.where(starts, numbers, len(numbers))
    used = torch.full((len(numbers) + 1,), -1, dtype=experts_M.dtype, device=experts_M.device)
    # Equal places are the last one, which gets -1 each time.
    with in_any_order():
        groups_M = torch.empty_like(experts_M).scatter_(0, order, numbers)
        used.scatter_(0, places, torch.where(starts, sorted_M, -1))
    return groups_M, used[:-1]
