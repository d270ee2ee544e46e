"""Scale. See `arbitor.reference.ops.scale`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.optimized.kernels import scale
from arbitor.optimized.kernels.launch import values_between
from arbitor.optimized.layouts import TRITS_PER_WORD, AnyWeight, DeviceWeight, words_per_row
from arbitor.optimized.ops.layout import canonical, on_device
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import (
    DEFAULT_GROUP_SIZE,
    EXPONENT_MAX,
    EXPONENT_MIN,
    INIT_NONZERO,
    RESERVED_STEP,
    groups_per_row,
    level_range,
)
from arbitor.reference.types import TernaryWeight

__all__ = ["constant_weight", "dequantize", "group_scales", "initial_weight"]

DTYPES = (torch.float32, torch.bfloat16)
"""Activation dtypes of the kernels. What is exact in float64 is offered in float64 too; sums in float64 are for the reference."""


@op()
def group_scales(exponents: Tensor, *, mantissa_bits: int = 0) -> Tensor:
    """See reference."""
    checks.dtype_in("exponents", exponents, (torch.int8,))
    checks.mantissa_bits(mantissa_bits)
    values_between("exponents", exponents, *level_range(mantissa_bits))
    return scale.scales_of(exponents, mantissa_bits)


@op()
def dequantize(
    weight: AnyWeight, *, dtype: torch.dtype = torch.float32, rows: Tensor | None = None
) -> Tensor:
    """See reference."""
    checks.float_dtype("dtype", dtype)
    if rows is not None:
        checks.row_ids(rows, weight.device)
        values_between("rows", rows, 0, weight.shape[0] - 1)
    return scale.dense_rows(on_device(weight), dtype, rows)


@op()
def initial_weight(
    shape: Sequence[int],
    *,
    std: float,
    seed: int,
    tensor_id: int,
    group_size: int = DEFAULT_GROUP_SIZE,
    device: torch.device | str = "cpu",
) -> TernaryWeight:
    """See reference."""
    num_rows, num_columns = checks.matrix_shape("shape", shape)
    checks.number("std", std, 0.0, math.inf, open_low=True)
    checks.group_size(group_size)
    checks.group_ids_fit(num_rows, num_columns, group_size)
    checks.vote_clock(seed, RESERVED_STEP, tensor_id, last_step=RESERVED_STEP)
    device = checks.device(device)
    exponent = min(max(round(math.log2(std / math.sqrt(INIT_NONZERO))), EXPONENT_MIN), EXPONENT_MAX)
    groups = groups_per_row(num_columns, group_size)
    words = scale.initial_words((num_rows, num_columns), groups, group_size, seed, tensor_id, device)
    return _untrained(words, (num_rows, num_columns), exponent, group_size)


@op()
def constant_weight(
    shape: Sequence[int],
    *,
    trit: int,
    exponent: int,
    group_size: int = DEFAULT_GROUP_SIZE,
    device: torch.device | str = "cpu",
) -> TernaryWeight:
    """See reference."""
    num_rows, num_columns = checks.matrix_shape("shape", shape)
    checks.integer("trit", trit, -1, 1)
    checks.integer("exponent", exponent, EXPONENT_MIN, EXPONENT_MAX)
    checks.group_size(group_size)
    device = checks.device(device)
    lanes = torch.arange(words_per_row(num_columns) * TRITS_PER_WORD, device=device).reshape(
        -1, TRITS_PER_WORD
    )
    codes = torch.where(lanes < num_columns, trit & 3, 0) << (2 * (lanes % TRITS_PER_WORD))
    words = codes.sum(dim=1).to(torch.int32).repeat(num_rows, 1)
    return _untrained(words, (num_rows, num_columns), exponent, group_size)


def _untrained(words: Tensor, shape: tuple[int, int], exponent: int, group_size: int) -> TernaryWeight:
    """Return words as a canonical weight with one exponent everywhere and empty accumulators."""
    groups = groups_per_row(shape[1], group_size)
    exponents = torch.full((shape[0], groups), exponent, dtype=torch.int8, device=words.device)
    trit_accum = torch.zeros(shape, dtype=torch.int8, device=words.device)
    return canonical(
        DeviceWeight(words, exponents, trit_accum, torch.zeros_like(exponents), shape, group_size)
    )
