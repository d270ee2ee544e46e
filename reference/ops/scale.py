"""Scale: the scale of an exponent, a weight as floats, and the weights that training starts from.

Legend: N rows, K columns, G columns a group, KG groups a row, R selected rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    DEFAULT_GROUP_SIZE,
    EXPONENT_MAX,
    EXPONENT_MIN,
    INIT_HIGH_BYTE,
    INIT_LOW_BYTE,
    INIT_NONZERO,
    RESERVED_STEP,
    groups_per_row,
    level_range,
)
from arbitor.reference.ops.dither import dither_bytes
from arbitor.reference.ops.packing import digits_at, digits_of, weight_of_trits, weight_without_values
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["constant_weight", "dequantize", "group_scales", "initial_weight"]


@op
def group_scales(exponents: Tensor, *, mantissa_bits: int = 0) -> Tensor:
    """Return the scale of each group.

    Math:    S = 2**E; with b mantissa bits the stored level is E * 2**b + m and S = 2**E * (1 + m / 2**b)
    Shapes:  exponents int8 [...], levels from -32 * 2**b to 16 * 2**b - 1
    Returns: float32, same shape, exact
    Raises:  TypeError for another dtype; ValueError for mantissa bits or a level that is not allowed
    Laws:    one level up multiplies by 2 (b = 0), or by at most 1 + 2**-b; S grows with the level
    Source:  docs/spec/scale.md; the mantissa answers REFACTOR7's wish for scales such as 99.9
    """
    checks.dtype_in("exponents", exponents, (torch.int8,))
    checks.mantissa_bits(mantissa_bits)
    checks.values_between("exponents", exponents, *level_range(mantissa_bits))
    level = exponents.to(torch.int32)
    exponent = level >> mantissa_bits
    mantissa = level - (exponent << mantissa_bits)
    return torch.ldexp(1.0 + mantissa.to(torch.float32) / 2**mantissa_bits, exponent)


@op
def dequantize(
    weight: TernaryWeight, *, dtype: torch.dtype = torch.float32, rows: Tensor | None = None
) -> Tensor:
    """Return the weight, or some of its rows, as floats.

    Math:    W[n, k] = T[n, k] * S[n, k // G]
    Shapes:  rows int64 [R] in 0 .. N - 1, may repeat; all rows when None
    Returns: `dtype` [N, K] or [R, K], exact in float64, float32 and bfloat16
    Raises:  TypeError for another dtype; ValueError for a row that does not exist
    Source:  docs/spec/scale.md
    """
    checks.float_dtype("dtype", dtype)
    num_rows, num_columns = weight.shape
    if rows is None:
        trits, exponents = digits_of(weight.packed, weight.shape), weight.exponents
    else:
        checks.row_ids(rows, weight.device)
        checks.values_between("rows", rows, 0, num_rows - 1)
        columns = torch.arange(num_columns, device=weight.device)
        trits = digits_at(weight.packed, rows[:, None] * num_columns + columns)
        exponents = weight.exponents[rows]
    scales = group_scales(exponents, mantissa_bits=weight.mantissa_bits)
    of_column = scales.repeat_interleave(weight.group_size, dim=1)[:, :num_columns]
    return (trits * of_column).to(dtype)


@op
def initial_weight(
    shape: Sequence[int],
    *,
    std: float,
    seed: int,
    tensor_id: int,
    group_size: int = DEFAULT_GROUP_SIZE,
    device: torch.device | str = "cpu",
) -> TernaryWeight:
    """Return the random weight that training starts from.

    Math:    T = sign(z) where |z| > 0.5, else 0, for z ~ N(0, 1). A dither byte draws it: T = -1 below 79, +1 from 177 on,
             0 between (the same probabilities to 1 in 2000). E = clamp(rint(log2(std / sqrt(0.617))), -32, 15) in all groups
    Shapes:  shape (N, K), with at most 2**32 groups
    Range:   std above 0, finite; seed and tensor_id as `dither_bytes`
    Returns: weight with empty accumulators
    Raises:  ValueError for a std that is not positive and finite, or a shape, group size, seed or id out of range
    Laws:    the same on every device; where E is not clamped, W has standard deviation std to within half a power of two
    Source:  docs/spec/scale.md. Philox replaces a normal sampler, so that a device can start a table in packed form
    """
    num_rows, num_columns = checks.matrix_shape("shape", shape)
    checks.number("std", std, 0.0, math.inf, open_low=True)
    checks.group_size(group_size)
    checks.group_ids_fit(num_rows, num_columns, group_size)
    checks.vote_clock(seed, RESERVED_STEP, tensor_id, last_step=RESERVED_STEP)
    groups = groups_per_row(num_columns, group_size)
    exponent = min(max(round(math.log2(std / math.sqrt(INIT_NONZERO))), EXPONENT_MIN), EXPONENT_MAX)
    if checks.device(device).type == "meta":
        return weight_without_values((num_rows, num_columns), group_size)
    exponents = torch.full((num_rows, groups), exponent, dtype=torch.int8, device=device)
    ids = torch.arange(num_rows * groups, device=device).reshape(num_rows, groups)
    dither = dither_bytes(ids, group_size=group_size, seed=seed, step=RESERVED_STEP, tensor_id=tensor_id)
    places = dither[..., :group_size].reshape(num_rows, -1)[:, :num_columns]
    trits = (places >= INIT_HIGH_BYTE).to(torch.int8) - (places < INIT_LOW_BYTE).to(torch.int8)
    return weight_of_trits(trits, exponents, group_size)


@op
def constant_weight(
    shape: Sequence[int],
    *,
    trit: int,
    exponent: int,
    group_size: int = DEFAULT_GROUP_SIZE,
    device: torch.device | str = "cpu",
) -> TernaryWeight:
    """Return a weight that is trit * 2**exponent everywhere, such as the ones of a norm.

    Shapes:  shape (N, K)
    Returns: weight with empty accumulators
    Raises:  ValueError for a trit outside {-1, 0, 1}, an exponent outside [-32, 15], or a bad shape or group size
    Source:  docs/spec/scale.md
    """
    num_rows, num_columns = checks.matrix_shape("shape", shape)
    checks.integer("trit", trit, -1, 1)
    checks.integer("exponent", exponent, EXPONENT_MIN, EXPONENT_MAX)
    checks.group_size(group_size)
    if checks.device(device).type == "meta":
        return weight_without_values((num_rows, num_columns), group_size)
    trits = torch.full((num_rows, num_columns), trit, dtype=torch.int8, device=device)
    groups = groups_per_row(num_columns, group_size)
    exponents = torch.full((num_rows, groups), exponent, dtype=torch.int8, device=device)
    return weight_of_trits(trits, exponents, group_size)
