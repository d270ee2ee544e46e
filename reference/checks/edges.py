"""Nodes, and the tables of their neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import tuple_of
from arbitor.reference.checks.tensors import (
    FLOAT_DTYPES,
    dtype_in,
    matrix,
    same_device,
    same_dtype,
    same_shape,
    tensor,
)
from arbitor.reference.checks.weights import target_weight
from arbitor.reference.constants import MAX_NEIGHBOURS


def node_matrix(name: str, value: Tensor) -> None:
    """Refuse vectors of nodes that are not float [N, D] with at least one of each."""
    matrix(name, value, FLOAT_DTYPES)


def edge_slots(neighbours_RJ: Tensor, **beside: Tensor) -> None:
    """Refuse neighbours that are not int32 or int64 [R, J] with at least one slot, on the device of the tensors `beside` them."""
    dtype_in("neighbours_RJ", neighbours_RJ, (torch.int32, torch.int64))
    if neighbours_RJ.ndim != 2 or neighbours_RJ.shape[1] == 0:
        raise ValueError(
            f"neighbours_RJ has shape {tuple(neighbours_RJ.shape)}, but must be [rows, slots] with at least one slot"
        )
    same_device(**beside, neighbours_RJ=neighbours_RJ)


def edge_signs(signs_RJ: Tensor, neighbours_RJ: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse signs that are not one for each slot, in the dtype and on the device of the vectors that they multiply."""
    same_dtype("signs_RJ", signs_RJ, other_name, other)
    same_shape("signs_RJ", signs_RJ, "neighbours_RJ", neighbours_RJ)
    same_device(**{other_name: other}, signs_RJ=signs_RJ)


def edge_gradient(name: str, grad_RD: Tensor, neighbours_RJ: Tensor) -> None:
    """Refuse a gradient of gathered rows that is not float [R, D], one row for each row of neighbours."""
    dtype_in(name, grad_RD, FLOAT_DTYPES)
    edge_slots(neighbours_RJ, **{name: grad_RD})
    if grad_RD.ndim != 2 or grad_RD.shape[1] == 0 or grad_RD.shape[0] != neighbours_RJ.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(grad_RD.shape)}, but must be [{neighbours_RJ.shape[0]}, width], "
            "one row for each row of neighbours_RJ"
        )


def neighbour_tables(
    neighbours_NJ: Tensor, scores_NJ: Tensor, signs: Any, out: tuple[Tensor, Tensor, Any] | None
) -> None:
    """Refuse tables of neighbours, scores and signs that do not fit each other, or an `out` that they do not fit."""
    matrix("neighbours_NJ", neighbours_NJ, (torch.int32,))
    num_slots = neighbours_NJ.shape[1]
    if num_slots > MAX_NEIGHBOURS:
        raise ValueError(f"neighbours_NJ has {num_slots} slots a row, but may have at most {MAX_NEIGHBOURS}")
    tensor("scores_NJ", scores_NJ, torch.int8, neighbours_NJ.shape)
    same_shape("signs", signs, "neighbours_NJ", neighbours_NJ)
    same_device(neighbours_NJ=neighbours_NJ, scores_NJ=scores_NJ, signs=signs.exponents)
    if out is None:
        return
    tuple_of("out", out, 3, "neighbours, scores and signs")
    tensor("out[0]", out[0], torch.int32, neighbours_NJ.shape)
    tensor("out[1]", out[1], torch.int8, neighbours_NJ.shape)
    same_device(neighbours_NJ=neighbours_NJ, **{"out[0]": out[0], "out[1]": out[1]})
    target_weight("out[2]", out[2], "signs", signs)


def edge_pairs(sources_M: Tensor, targets_M: Tensor, neighbours_NJ: Tensor) -> None:
    """Refuse pairs that are not two int64 vectors of one length, on the device of the table."""
    for name, value in (("sources_M", sources_M), ("targets_M", targets_M)):
        dtype_in(name, value, (torch.int64,))
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be one-dimensional")
    same_shape("targets_M", targets_M, "sources_M", sources_M)
    same_device(neighbours_NJ=neighbours_NJ, sources_M=sources_M, targets_M=targets_M)
