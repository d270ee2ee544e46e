"""Codebooks and their counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import integer
from arbitor.reference.checks.tensors import (
    FLOAT_DTYPES,
    dtype_in,
    last_dim,
    same_device,
    tensor,
    values_between,
)
from arbitor.reference.constants import MAX_CODE_DIM, MAX_SIGN_BITS


def code_columns(name: str, num_columns: int) -> None:
    """Refuse codes so wide that the sums of a search would round."""
    if num_columns > MAX_CODE_DIM:
        raise ValueError(f"{name} has {num_columns} columns, but a codebook may have at most {MAX_CODE_DIM}")


def codebook(weight: Any) -> None:
    """Refuse a weight whose rows cannot be searched exactly: too wide, or with mantissa bits."""
    code_columns("weight", weight.shape[1])
    if weight.mantissa_bits:
        raise ValueError(f"weight has mantissa_bits {weight.mantissa_bits}, but a codebook must have 0")


def buckets(num_codes: int, num_columns: int, sign_bits: int) -> None:
    """Refuse a number of sign bits for which there are too few columns, or too few codes to put one into each bucket."""
    integer("sign_bits", sign_bits, 0, min(num_columns, MAX_SIGN_BITS))
    if num_codes < 2**sign_bits:
        raise ValueError(
            f"sign_bits is {sign_bits}, but {2**sign_bits} buckets need as many codes, and there are {num_codes}"
        )


def candidate_slots(candidates: Tensor, z: Tensor) -> None:
    """Refuse candidates that are not int64 with one row for each vector."""
    dtype_in("candidates", candidates, (torch.int64,))
    if candidates.ndim != z.ndim or candidates.shape[:-1] != z.shape[:-1]:
        raise ValueError(
            f"candidates has shape {tuple(candidates.shape)}, but must be one row for each vector of z, {tuple(z.shape)}"
        )


def batch_vectors(weight: Any, z_RC: Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse a weight that is no codebook, or vectors of a batch that are not [R, C] of its width."""
    codebook(weight)
    last_dim("z_RC", z_RC, weight.shape[1], allowed)
    if z_RC.ndim != 2:
        raise ValueError(f"z_RC has shape {tuple(z_RC.shape)}, but must be [vectors, columns]")


def usage_of(num_codes: int | None, usage: Tensor, out: Tensor | None) -> None:
    """Refuse counters of use that are not int16 [N], or an `out` that they do not fit."""
    dtype_in("usage", usage, (torch.int16,))
    if usage.ndim != 1 or usage.numel() == 0 or num_codes not in (None, usage.numel()):
        expected = f"({'codes' if num_codes is None else num_codes},)"
        raise ValueError(
            f"usage has shape {tuple(usage.shape)}, but must be {expected} with at least one code"
        )
    if out is not None:
        tensor("out", out, torch.int16, usage.shape)
        same_device(usage=usage, out=out)


def code_window(num_codes: int, first: int | Tensor, window: int, *, values: bool = True) -> None:
    """Refuse a window that is longer than the table, or one whose start is negative.

    If `first` is a tensor, its value is checked unless `values` is False.
    """
    integer("window", window, 0, num_codes)
    if isinstance(first, Tensor):
        tensor("first", first, torch.int64, ())
        if values:
            values_between("first", first, 0, 2**62)
    else:
        integer("first", first, 0, 2**62)


def revivals(num_codes: int, first: int | Tensor, vectors: Tensor, *, values: bool = True) -> None:
    """Refuse the vectors of a window that are not int64 [window], or a window that `code_window` refuses."""
    dtype_in("vectors", vectors, (torch.int64,))
    if vectors.ndim != 1 or vectors.numel() > num_codes:
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}, but must be [window], and a window has at most {num_codes} codes"
        )
    code_window(num_codes, first, vectors.numel(), values=values)
