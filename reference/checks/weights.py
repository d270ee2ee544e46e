"""Ternary weights, and rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import integer, tuple_of
from arbitor.reference.checks.tensors import dtype_in, same_device, values_between
from arbitor.reference.constants import ACCUM_MAX, MAX_PACKED_BYTE, VOTED_IN, groups_per_row, level_range


class Weight(Protocol):
    """The properties of a weight that checks read, in canonical form or in any device layout."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, K)."""
        ...

    @property
    def exponents(self) -> Tensor:
        """Exponents, on the weight's device."""
        ...


def group_ids_fit(num_rows: int, num_columns: int, size: int) -> None:
    """Refuse a weight with more groups than the 32-bit dither counter can tell apart."""
    groups = num_rows * groups_per_row(num_columns, size)
    if groups > 2**32:
        raise ValueError(
            f"shape {(num_rows, num_columns)} has {groups} groups, but at most {2**32} can be dithered"
        )


def weight_values(name: str, field: str, value: Tensor, mantissa_bits: int = 0) -> None:
    """Refuse a tensor of a weight with an element that its field, by its name in `TernaryWeight`, never holds."""
    low, high = {
        "packed": (0, MAX_PACKED_BYTE),
        "exponents": level_range(mantissa_bits),
        **dict.fromkeys(VOTED_IN, (-ACCUM_MAX, ACCUM_MAX)),
    }[field]
    values_between(name, value, low, high)


def row_ids(rows: Tensor | None, device: torch.device) -> None:
    """Refuse row ids that are not int64 [R] on the device of the weight or gradient."""
    if rows is None:
        return
    dtype_in("rows", rows, (torch.int64,))
    if rows.ndim != 1:
        raise ValueError(f"rows has shape {tuple(rows.shape)}, but must be one-dimensional")
    if rows.device != device:
        raise ValueError(f"rows is on {rows.device}, but must be on {device}")


def row_values(rows: Tensor | None, num_rows: int) -> None:
    """Refuse row ids outside -1 .. num_rows - 1, or a row named twice. The gradients of a row must be summed before it votes."""
    if rows is None or rows.device.type == "meta":
        return
    values_between("rows", rows, -1, num_rows - 1)
    used = rows[rows >= 0]
    if used.unique().numel() != used.numel():
        raise ValueError("rows names a row more than once, but each must be unique; sum its gradients first")


def first_row(value: int, weight: Weight) -> None:
    """Refuse a place of a weight in a table at which a group of the weight would have no dither of its own."""
    integer("first_row", value, 0, 2**32 // weight.exponents.shape[1] - weight.shape[0])


def one_row(name: str, weight: Weight) -> None:
    """Refuse a weight of more than one row, where a vector of channels is meant."""
    if weight.shape[0] != 1:
        raise ValueError(f"{name} has shape {weight.shape}, but must have one row")


def rows_of(rows: Tensor | None, grad: Tensor) -> None:
    """Refuse row ids that are not int64 with one id for each gradient row, on the gradient's device."""
    row_ids(rows, grad.device)
    if rows is not None and rows.shape[0] != grad.shape[0]:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}, but must be {(grad.shape[0],)}, one id a gradient row"
        )


def out_weight(out: Any, weight: Any) -> None:
    """Refuse what is neither None nor a weight that a result like `weight` can be written into."""
    if out is not None:
        target_weight("out", out, "weight", weight)


def target_weight(name: str, out: Any, updated: str, weight: Any) -> None:
    """Refuse what is no weight to write into, or one that differs from the one updated in shape, format or device."""
    if not _is_weight(out):
        raise TypeError(
            f"{name} is a {type(out).__name__}, but must be a weight, for example a TernaryWeight"
        )
    for field in ("shape", "group_size", "mantissa_bits", "device"):
        if getattr(out, field) != getattr(weight, field):
            raise ValueError(
                f"{name} has {field} {getattr(out, field)}, but must match {updated}, {getattr(weight, field)}"
            )


def _is_weight(value: object) -> bool:
    """Return whether a value is a weight, in canonical form or in any device layout."""
    return all(hasattr(value, field) for field in ("shape", "group_size", "mantissa_bits"))


def several_weights(weights: Any) -> None:
    """Refuse anything but a tuple of one or more weights on one device."""
    if not isinstance(weights, tuple):
        raise TypeError(f"weights is a {type(weights).__name__}, but must be a tuple of weights")
    if not weights:
        raise ValueError("weights is empty, but must have at least one weight")
    for weight in weights:
        if not _is_weight(weight):
            raise TypeError(f"weights holds a {type(weight).__name__}, but must hold weights")
        if weight.device != weights[0].device:
            raise ValueError(
                f"weights holds a weight on {weight.device}, but all must be on {weights[0].device}"
            )


def alike_weights(weights: Any, tensor_ids: Any) -> None:
    """Refuse weights that are not all of one shape and format, or that do not have a tensor id each."""
    several_weights(weights)
    for field in ("shape", "group_size", "mantissa_bits"):
        found = {getattr(weight, field) for weight in weights}
        if len(found) > 1:
            raise ValueError(f"weights holds weights of {field} {sorted(found)}, but all must have one")
    if not isinstance(tensor_ids, tuple) or len(tensor_ids) != len(weights):
        raise ValueError(
            f"tensor_ids is {tensor_ids!r}, but must be a tuple with one for each of the {len(weights)} weights"
        )


def out_weights(out: Any, weights: tuple[Any, ...]) -> None:
    """Refuse weights to write into that are not as many as those updated, or differ from them in shape, format or device.

    A weight to write into that is updated itself must stand at its own place: otherwise it would be overwritten before it is read.
    """
    if out is None:
        return
    tuple_of("out", out, len(weights), f"{len(weights)} weights, as many as weights has")
    if len({id(one) for one in out}) < len(out):
        raise ValueError("out holds a weight twice, but each must be another one")
    places = {id(weight): place for place, weight in enumerate(weights)}
    for place, (one, other) in enumerate(zip(out, weights, strict=True)):
        target_weight(f"out[{place}]", one, f"weights[{place}]", other)
        own = places.get(id(one), place)
        if own != place:
            raise ValueError(
                f"out[{place}] is weights[{own}], but a weight that is updated may be written to at its own place alone"
            )


def stacked_gradient(weights: tuple[Any, ...], grad_NK: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a gradient that does not hold the gradients of weights of one shape, one below the other."""
    dtype_in("grad_NK", grad_NK, allowed)
    num_rows, num_columns = weights[0].shape
    if tuple(grad_NK.shape) != (len(weights) * num_rows, num_columns):
        raise ValueError(
            f"grad_NK has shape {tuple(grad_NK.shape)}, but must be {(len(weights) * num_rows, num_columns)}"
        )
    same_device(weights=weights[0].exponents, grad_NK=grad_NK)
