"""Experts and the slots that use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import flag, integer, tuple_of
from arbitor.reference.checks.tensors import FLOAT_DTYPES, dtype_in, last_dim, same_device, same_dtype, tensor
from arbitor.reference.checks.weights import Weight
from arbitor.reference.constants import MAX_ROUTER_COLUMNS


def expert_matrix(name: str, value: Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse activations that are not [..., slots, columns] of an allowed dtype; there may be no slots."""
    dtype_in(name, value, allowed)
    if value.ndim < 2 or value.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [..., slots, columns] with at least one column"
        )


def expert_pair(grad_MN: Tensor, x_MK: Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse the gradient of an output and its input, unless both have one dtype and the same number of slots."""
    expert_matrix("grad_MN", grad_MN, allowed)
    expert_matrix("x_MK", x_MK, allowed)
    same_dtype("x_MK", x_MK, "grad_MN", grad_MN)
    if x_MK.shape[:-1] != grad_MN.shape[:-1]:
        raise ValueError(
            f"x_MK has shape {tuple(x_MK.shape)}, but must have the slots of grad_MN, {tuple(grad_MN.shape)}"
        )


def router(
    x: Tensor,
    weight: Weight,
    top_k: int,
    handicap_E: Tensor | None,
    packed: Tensor,
    allowed: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """Refuse vectors or handicaps that do not fit the weight of a router, or more experts than the weight has rows.

    `packed` is a tensor of the weight. The others must be on its device.
    """
    if weight.shape[1] > MAX_ROUTER_COLUMNS:
        raise ValueError(
            f"weight has shape {weight.shape}, but a router must have at most {MAX_ROUTER_COLUMNS} columns"
        )
    last_dim("x", x, weight.shape[1], allowed)
    same_device(weight=packed, x=x)
    integer("top_k", top_k, 1, weight.shape[0])
    if handicap_E is not None:
        tensor("handicap_E", handicap_E, torch.int16, weight.shape[:1])
        same_device(weight=packed, handicap_E=handicap_E)


def expert_slots(experts_M: Tensor, slots: torch.Size, **beside: Tensor) -> None:
    """Refuse expert ids that are not int64 with one entry for each slot, on the device of the tensors `beside` them."""
    dtype_in("experts_M", experts_M, (torch.int64,))
    if experts_M.shape != slots:
        raise ValueError(
            f"experts_M has shape {tuple(experts_M.shape)}, but must be {tuple(slots)}, one expert a slot"
        )
    same_device(**beside, experts_M=experts_M)


def stacked_rows(name: str, num_rows: int, num_groups: int) -> int:
    """Return the rows of one matrix of a stack; refuse a stack whose rows are not a whole number for each."""
    integer("num_groups", num_groups, 1, 2**31 - 1)
    if num_rows % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, but must divide the rows of {name}, which has {num_rows}"
        )
    return num_rows // num_groups


def expert_rows(weight: Weight, num_groups: int) -> int:
    """Return the rows of one expert; refuse a stacked weight whose rows are not a whole number for each."""
    return stacked_rows("weight", weight.shape[0], num_groups)


def side_by_side(name: str, num_columns: int, num_groups: int) -> int:
    """Return the columns of one of several matrices side by side; refuse columns that are not a whole number for each."""
    integer("num_groups", num_groups, 1, 2**31 - 1)
    if num_columns % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, but must divide the columns of {name}, which has {num_columns}"
        )
    return num_columns // num_groups


def weighed_ranks(
    ranks: Tensor,
    logits: Tensor,
    experts: Tensor,
    chosen_only: bool,
    allowed: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """Refuse ranks of all experts or of those chosen, logits of a router and chosen experts that do not fit each other."""
    flag("chosen_only", chosen_only)
    dtype_in("logits", logits, allowed)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, but must be [..., experts]")
    lead, num_experts = logits.shape[:-1], logits.shape[-1]
    dtype_in("experts", experts, (torch.int64,))
    if experts.ndim == 0 or experts.shape[:-1] != lead or not 1 <= experts.shape[-1] <= num_experts:
        raise ValueError(
            f"experts has shape {tuple(experts.shape)}, but must have the leading dimensions of logits, {tuple(lead)}, "
            f"then 1 to {num_experts} experts"
        )
    same_dtype("ranks", ranks, "logits", logits)
    parts = experts.shape[-1] if chosen_only else num_experts
    if ranks.ndim == 0 or ranks.shape[:-1] != lead or ranks.shape[-1] == 0 or ranks.shape[-1] % parts:
        raise ValueError(
            f"ranks has shape {tuple(ranks.shape)}, but must have the leading dimensions of logits, {tuple(lead)}, "
            f"then a multiple of {parts}, the number of experts"
        )
    same_device(logits=logits, ranks=ranks, experts=experts)


def balance(chosen: Tensor, load_E: Tensor, handicap_E: Tensor, out: tuple[Tensor, Tensor] | None) -> None:
    """Refuse choices and tables of experts that do not fit each other, or tables to write into that differ from them."""
    dtype_in("chosen", chosen, (torch.int64,))
    dtype_in("load_E", load_E, (torch.int64,))
    if load_E.ndim != 1 or load_E.numel() == 0:
        raise ValueError(f"load_E has shape {tuple(load_E.shape)}, but must be [experts]")
    tensor("handicap_E", handicap_E, torch.int16, load_E.shape)
    same_device(chosen=chosen, load_E=load_E, handicap_E=handicap_E)
    if out is None:
        return
    tuple_of("out", out, 2, "a load and handicaps")
    for value, like in zip(out, (load_E, handicap_E), strict=True):
        tensor("out", value, like.dtype, like.shape)
        same_device(load_E=load_E, out=value)
