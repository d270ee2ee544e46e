"""Slots of a log that attention reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import integer, number
from arbitor.reference.checks.tensors import (
    FLOAT_DTYPES,
    dtype_in,
    same_device,
    same_dtype,
)
from arbitor.reference.dtypes import wide_dtype


def decode_slots(
    q_BHK: Tensor,
    keys_BSK: Tensor,
    bias_BS: Tensor,
    places_BS: Tensor | None,
    *,
    value_width: int,
    scale: float,
) -> None:
    """Refuse queries, slots, biases and places that do not fit each other, a value width beyond the slots, or a bad scale."""
    dtype_in("q_BHK", q_BHK, FLOAT_DTYPES)
    if q_BHK.ndim != 3 or q_BHK.shape[2] == 0:
        raise ValueError(
            f"q_BHK has shape {tuple(q_BHK.shape)}, but must be [batch, heads, columns] with at least one column"
        )
    same_dtype("keys_BSK", keys_BSK, "q_BHK", q_BHK)
    batch, _, columns = q_BHK.shape
    if keys_BSK.ndim != 3 or keys_BSK.shape[0] != batch or keys_BSK.shape[2] != columns:
        raise ValueError(
            f"keys_BSK has shape {tuple(keys_BSK.shape)}, but must be [{batch}, slots, {columns}], as q_BHK has it"
        )
    slots = keys_BSK.shape[:2]
    if places_BS is not None:
        dtype_in("places_BS", places_BS, (torch.int64,))
        if places_BS.ndim != 2 or places_BS.shape[0] != batch or (places_BS.numel() and not slots[1]):
            raise ValueError(
                f"places_BS has shape {tuple(places_BS.shape)}, but must be [{batch}, slots], with rows in keys_BSK to name"
            )
        slots = places_BS.shape
        same_device(q_BHK=q_BHK, places_BS=places_BS)
    dtype_in("bias_BS", bias_BS, (wide_dtype(q_BHK),))
    if bias_BS.shape != slots:
        source = "keys_BSK" if places_BS is None else "places_BS"
        raise ValueError(
            f"bias_BS has shape {tuple(bias_BS.shape)}, but must have the slots of {source}, {tuple(slots)}"
        )
    same_device(q_BHK=q_BHK, keys_BSK=keys_BSK, bias_BS=bias_BS)
    integer("value_width", value_width, 1, columns)
    number("scale", scale, 0.0, 2.0**15, open_low=True)


def slot_bias(bias_BS: Tensor) -> None:
    """Refuse a bias that is NaN or +inf; -inf hides its slot."""
    if bias_BS.device.type != "meta" and not bool((bias_BS < math.inf).all()):
        raise ValueError("bias_BS holds NaN or +inf, but its elements must be finite or -inf")


def view_of_past(first_B: Tensor, *, num_queries: int, window: int, block: int, num_summaries: int) -> None:
    """Refuse first positions that are not int64 [B], or sizes of a view that are no whole numbers from 1 on."""
    dtype_in("first_B", first_B, (torch.int64,))
    if first_B.ndim != 1:
        raise ValueError(f"first_B has shape {tuple(first_B.shape)}, but must be [batch]")
    integer("num_queries", num_queries, 1, 2**20)
    integer("window", window, 1, 2**20)
    integer("block", block, 1, 2**20)
    integer("num_summaries", num_summaries, 1, 2**20)
