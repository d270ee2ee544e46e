"""Ternary weights, and rows of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference.checks.tensors import dtype_in, values_between
from arbitor.reference.constants import ACCUM_MAX, MAX_PACKED_BYTE, groups_per_row, level_range


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
        "trit_accum": (-ACCUM_MAX, ACCUM_MAX),
        "exponent_accum": (-ACCUM_MAX, ACCUM_MAX),
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
    """Refuse a weight to write into that differs from the one updated in shape, format or device."""
    if out is None:
        return
    for field in ("shape", "group_size", "mantissa_bits", "device"):
        if getattr(out, field) != getattr(weight, field):
            raise ValueError(
                f"out has {field} {getattr(out, field)}, but must match weight, {getattr(weight, field)}"
            )
