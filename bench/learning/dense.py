"""An op set of float weights: dense products, float32 masters. The graph asks it for everything it does with a weight.

So the rules that are compared train the very graph that ours train. What a user would run instead is in `bench/peers/twin.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import ops as reference_ops
from arbitor.reference.constants import HANDICAP_STEPS
from arbitor.reference.ops.scale import dequantize
from bench.peers.experts import by_expert

# The default of the ops.
EPS = 1e-6

ALIGNED = 8
"""Columns that a row of a grouped product is a multiple of: 16 bytes of bfloat16."""


@dataclass(frozen=True)
class DenseWeight:
    """A float weight: the copy that is computed with, and the float32 master that AdamW moves."""

    value: Tensor
    master: torch.nn.Parameter

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def with_tensors(self, **tensors: Tensor) -> DenseWeight:
        return replace(self, **tensors)


WITHOUT_WEIGHT = frozenset(
    ("balance_experts", "decode_attention", "gated", "head_keys", "rotate", "visible_slots", "weigh_ranks")
)
"""Ops that the trunk of a graph asks for, and that take no weight."""


class DenseOps:
    """An op set of float weights: the names that the graph asks for, no others."""

    initial_weight = staticmethod(reference_ops.initial_weight)
    constant_weight = staticmethod(reference_ops.constant_weight)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights: list[DenseWeight] = []

    def from_spec(self, weight: Any) -> DenseWeight:
        dense = self.floats_of(weight)
        self.weights.append(DenseWeight(dense.to(self.dtype, copy=True), torch.nn.Parameter(dense)))
        return self.weights[-1]

    def floats_of(self, weight: Any) -> Tensor:
        """Return a weight in the making as a float32 matrix."""
        return dequantize(weight, dtype=torch.float32)

    def __getattr__(self, name: str) -> Any:
        """Return an op that takes no weight: what a float model of the library would run is no slower than ours."""
        if name not in WITHOUT_WEIGHT:
            raise AttributeError(f"float weights have no op {name!r}")
        if not torch.cuda.is_available():
            return getattr(reference_ops, name)
        from arbitor.optimized import ops as optimized_ops

        return getattr(optimized_ops, name)

    def linear(self, x: Tensor, weight: DenseWeight, *, num_groups: int = 1) -> Tensor:
        return F.linear(x, _side_by_side(weight.value.to(x.dtype), num_groups))

    def linear_input_grad(
        self, grad: Tensor, weight: DenseWeight, *, num_groups: int = 1, out: Tensor | None = None
    ) -> Tensor:
        w = _side_by_side(weight.value.to(grad.dtype), num_groups)
        if out is None:
            return grad @ w
        # As ours: the sum is within the product, and rounded once.
        out.view(-1, out.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), w)
        return out

    def linear_weight_grad(
        self, grad: Tensor, x: Tensor, *, num_groups: int = 1, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        grad_MN, x_MK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if grad.device.type == "cuda" and grad.dtype is not dtype is torch.float32:
            made = torch.mm(grad_MN.T, x_MK, out_dtype=dtype)
        else:
            made = torch.mm(grad_MN.T, x_MK).to(dtype)
        return made.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(0, 1)

    def choose_experts(
        self, x: Tensor, weight: DenseWeight, *, top_k: int, handicap_E: Tensor | None = None
    ) -> Tensor:
        """Choose by the product of the activations' dtype less the handicaps: float weights have no rule of ties."""
        logits = self.linear(x, weight)
        if handicap_E is not None:
            logits = logits.to(torch.float32) - handicap_E / HANDICAP_STEPS
        return logits.topk(top_k, dim=-1).indices.sort(dim=-1).values

    def grouped_linear(self, x: Tensor, weight: DenseWeight, experts: Tensor, *, num_groups: int) -> Tensor:
        w_ENK = weight.value.to(x.dtype).unflatten(0, (num_groups, -1))
        return self._grouped(x, experts, w_ENK.transpose(1, 2))

    def grouped_linear_input_grad(
        self, grad: Tensor, weight: DenseWeight, experts: Tensor, *, num_groups: int
    ) -> Tensor:
        return self._grouped(grad, experts, weight.value.to(grad.dtype).unflatten(0, (num_groups, -1)))

    def grouped_linear_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        experts: Tensor,
        *,
        num_groups: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Sum by expert, in the dtype of the activations, which is all that the library's product writes."""
        order, ends = by_expert(experts.flatten(), num_groups)
        grad_MN, x_MK = (each.flatten(0, -2)[order] for each in (grad, x))
        sums_ENK = F.grouped_mm(_aligned(grad_MN).T, _aligned(x_MK), offs=ends)
        return sums_ENK[:, : grad.shape[-1], : x.shape[-1]].flatten(0, 1).to(dtype)

    def _grouped(self, x: Tensor, experts: Tensor, w: Tensor) -> Tensor:
        """Return each slot times the matrix [K, N] of its expert; every slot has one here."""
        order, ends = by_expert(experts.flatten(), len(w))
        x_MK, rows = x.flatten(0, -2)[order], -w.shape[1] % ALIGNED
        y = F.grouped_mm(
            _aligned(x_MK), F.pad(_aligned(w), (0, 0, 0, rows)) if rows else _aligned(w), offs=ends
        )
        y = y[:, : w.shape[2]]
        return torch.empty_like(y).index_copy_(0, order, y).unflatten(0, experts.shape)

    def expert_load(self, experts: Tensor, *, num_groups: int) -> Tensor:
        """Return how often each expert is named: the reference would wait for the device to look at the ids."""
        # -1 names none.
        places = experts.flatten() + 1
        counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=places.device)
        return counts.index_add_(0, places, torch.ones_like(places))[1:]

    def rms_norm(self, x: Tensor, weight: DenseWeight) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.value[0].to(x.dtype), EPS)

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: DenseWeight) -> tuple[Tensor, Tensor]:
        total = x + y
        return total, self.rms_norm(total, weight)

    def rms_norm_input_grad(
        self, grad: Tensor, x: Tensor, weight: DenseWeight, *, added: Tensor | None = None
    ) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(self.rms_norm(x, weight), x, grad)
        return dx if added is None else added + dx

    def embedding(self, ids: Tensor, weight: DenseWeight, *, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, weight.value.to(dtype))

    def embedding_row_grads(self, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return ids.reshape(-1), grad.reshape(-1, grad.shape[-1])

    def accumulate_gradient(
        self, weight: DenseWeight, grad: Tensor, rate: float, *, rows: Tensor | None, **clock: Any
    ) -> None:
        if rows is not None:
            grad = torch.zeros_like(weight.master).index_add_(0, rows, grad.float())
        weight.master.grad = grad if weight.master.grad is None else weight.master.grad + grad

    def apply_step(self, weight: DenseWeight, **rule: Any) -> None:
        """Leave the step to AdamW, which takes all weights at once."""

    def apply_steps(self, weights: tuple[DenseWeight, ...], **rule: Any) -> None:
        """See `apply_step`."""


def _side_by_side(w: Tensor, num_groups: int) -> Tensor:
    """Return the matrices of a stack, one below the other, side by side: [E N, K] as [N, E K]."""
    return w if num_groups == 1 else w.unflatten(0, (num_groups, -1)).transpose(0, 1).flatten(1)


def _aligned(x: Tensor) -> Tensor:
    """Return a tensor with zeros added to its last dimension up to what the library's grouped product asks for."""
    missing = -x.shape[-1] % ALIGNED
    return F.pad(x, (0, missing)) if missing else x
