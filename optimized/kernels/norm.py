"""RMSNorm kernels. A program reads each of its rows once, if a block holds the row. The weight is unpacked in the kernel.

Legend: M activation rows, K channels, x^ = x / rms(x). All arithmetic in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_weights, level_scales, narrow, widen
from arbitor.optimized.kernels.launch import row_tile, runs_here
from arbitor.optimized.kernels.parts import add_parts, parts_of
from arbitor.optimized.layouts import DeviceWeight

BLOCK_COLUMNS = 8192
"""Columns of a row that a program holds at most; longer rows are read again for each pass."""

SHORT_ROW = 1024
"""Columns of the longest block whose program loads the next row while it computes one. Longer rows have warps enough to wait."""

PROGRAMS, SHORT_PROGRAMS = 2048, 4096
"""Most programs that share the rows, and the most that share short ones, which have a warp or two each."""

BLOCK_SUMS, BLOCK_ROWS = 128, 16
PART_ROWS = 128
"""Fewest rows that are worth a sum of their own in the weight gradient."""

HUGE_TOTAL, TAMING_POWER = tl.constexpr(2.0**96), tl.constexpr(2.0**-80)
"""Sum of squares from which on a row is huge, and the power of two by which a huge row is multiplied before it is squared
(docs/spec/norm.md)."""


@triton.jit
def norm_weight(
    words_ptr, exponents_ptr, columns, num_columns, GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr
):
    """Return the float32 weight of the given channels."""
    mask = columns < num_columns
    words = tl.load(words_ptr + columns // 16, mask=mask, other=0)
    levels = tl.load(exponents_ptr + columns // GROUP_SIZE, mask=mask, other=0)
    return lane_weights(words, columns % 16, level_scales(levels, MANTISSA_BITS))


@triton.jit
def load_row(x_ptr, row, stride, columns, num_columns):
    """Return columns of a row of activations as float32."""
    return widen(tl.load(x_ptr + row * stride + columns, mask=columns < num_columns, other=0.0))


@triton.jit
def store_row(y_ptr, row, columns, num_columns, values):
    """Store float32 values as columns of a row of activations."""
    values = narrow(values, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * num_columns + columns, values, mask=columns < num_columns)


@triton.jit
def store_sum(x, branch_ptr, sum_ptr, row, columns, num_columns):
    """Store float32 columns of a row plus those of a branch, and return the sum as it is stored, widened to float32."""
    total = x + load_row(branch_ptr, row, num_columns, columns, num_columns)
    total = narrow(total, sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * num_columns + columns, total, mask=columns < num_columns)
    return widen(total)


@triton.jit
def inverse_of(rms):
    """Return 1 / rms, rounded once. A plain division is off by more, for which the class of a norm has no room."""
    return tl.div_rn(tl.full([], 1.0, tl.float32), rms)


@triton.jit
def root_of_mean(total, num_columns, eps):
    """Return sqrt(mean + eps) for the sum of a row's squares, float32."""
    return tl.sqrt_rn(tl.div_rn(total, tl.cast(num_columns, tl.float32)) + eps)


@triton.jit
def sum_of_squares(x_ptr, row, stride, power, num_columns, BLOCK: tl.constexpr):
    """Return the sum of the squares of a row times a power of two, float32."""
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        x = load_row(x_ptr, row, stride, start + tl.arange(0, BLOCK), num_columns) * power
        squares += x * x
    return tl.sum(squares, axis=0)


@triton.jit
def taming_power(total):
    """Return the power of two by which a row is multiplied before it is squared, from the sum of its unscaled squares.

    The rule looks at the largest element of a row, and this function at the sum of squares. If only one of the two calls a row
    huge, either power gives the same result: nothing overflows, and a square that underflows does not count beside such a sum.
    """
    return tl.where(total >= HUGE_TOTAL, TAMING_POWER, 1.0)


@triton.jit
def root_mean_square_of(x, num_columns, eps):
    """Return the root mean square of a row times its power of two, and the power, float32; a block holds the row.

    The row itself stays as it is: a row that the branch may change would take registers twice.
    """
    total = tl.sum(x * x, axis=0)
    power = taming_power(total)
    if power < 1.0:
        total = tl.sum((x * power) * (x * power), axis=0)
    return root_of_mean(total, num_columns, eps * power * power), power


@triton.jit
def root_mean_square(x_ptr, row, stride, num_columns, eps, BLOCK: tl.constexpr):
    """Return the root mean square of a row times its power of two, and the power, float32."""
    total = sum_of_squares(x_ptr, row, stride, 1.0, num_columns, BLOCK)
    power = taming_power(total)
    if power < 1.0:
        total = sum_of_squares(x_ptr, row, stride, power, num_columns, BLOCK)
    return root_of_mean(total, num_columns, eps * power * power), power


@triton.jit
def inverse_rms(x_ptr, row, stride, num_columns, eps, BLOCK: tl.constexpr):
    """Return 1 / rms of a row times its power of two, and the power, float32: x^ is x times the inverse, times the power."""
    rms, power = root_mean_square(x_ptr, row, stride, num_columns, eps, BLOCK)
    return inverse_of(rms), power


@triton.jit(do_not_specialize=["num_m", "part_rows"])
def _rms_norm_kernel(
    x_ptr, branch_ptr, sum_ptr, words_ptr, exponents_ptr, y_ptr, num_m, part_rows, num_columns, x_stride, eps,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * part_rows
    end = tl.minimum(begin + part_rows, num_m)
    if ONE_BLOCK:
        columns = tl.arange(0, BLOCK)
        # All rows of the program share the weight, because to unpack it takes more instructions than to use it.
        w = norm_weight(words_ptr, exponents_ptr, columns, num_columns, GROUP_SIZE, MANTISSA_BITS)
        for row in tl.range(begin, end, num_stages=STAGES):
            x = load_row(x_ptr, row, x_stride, columns, num_columns)
            if branch_ptr is not None:
                # The norm is that of the sum as it is stored.
                x = store_sum(x, branch_ptr, sum_ptr, row, columns, num_columns)
            rms, power = root_mean_square_of(x, num_columns, eps)
            inverse = inverse_of(rms)
            store_row(y_ptr, row, columns, num_columns, x * inverse * power * w)
    else:
        if branch_ptr is not None:
            for row in range(begin, end):
                for start in range(0, num_columns, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    x = load_row(x_ptr, row, x_stride, columns, num_columns)
                    store_sum(x, branch_ptr, sum_ptr, row, columns, num_columns)
            # Other threads may read what a thread has stored.
            tl.debug_barrier()
            x_ptr, x_stride = sum_ptr, num_columns
        for row in range(begin, end):
            inverse, power = inverse_rms(x_ptr, row, x_stride, num_columns, eps, BLOCK)
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                w = norm_weight(words_ptr, exponents_ptr, columns, num_columns, GROUP_SIZE, MANTISSA_BITS)
                x = load_row(x_ptr, row, x_stride, columns, num_columns)
                store_row(y_ptr, row, columns, num_columns, x * inverse * power * w)


@triton.jit
def unit_row(x, rms, power):
    """Return x^, from the root mean square of a row times its power.

    By a division, since an inverse would round once more, and where the terms of dx cancel, only roundings are left. The gradient
    itself may be multiplied by an inverse: both terms of dx then have the same rounding as a factor.
    """
    return tl.div_rn(x, rms) * power


@triton.jit(do_not_specialize=["num_m", "part_rows"])
def _rms_norm_input_grad_kernel(
    grad_ptr, x_ptr, words_ptr, exponents_ptr, added_ptr, out_ptr, num_m, part_rows, num_columns, x_stride, eps,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * part_rows
    end = tl.minimum(begin + part_rows, num_m)
    width = tl.cast(num_columns, tl.float32)
    if ONE_BLOCK:
        columns = tl.arange(0, BLOCK)
        w = norm_weight(words_ptr, exponents_ptr, columns, num_columns, GROUP_SIZE, MANTISSA_BITS)
        for row in tl.range(begin, end, num_stages=STAGES):
            x = load_row(x_ptr, row, x_stride, columns, num_columns)
            rms, power = root_mean_square_of(x, num_columns, eps)
            inverse = inverse_of(rms)
            unit = unit_row(x, rms, power)
            # Loaded last, since a branch keeps all that was loaded before it in registers, as a product before `unit` would.
            scaled = load_row(grad_ptr, row, num_columns, columns, num_columns) * w * inverse
            mean = tl.div_rn(tl.sum(unit * scaled, axis=0), width)
            dx = (scaled - unit * mean) * power
            if added_ptr is not None:
                dx += load_row(added_ptr, row, num_columns, columns, num_columns)
            store_row(out_ptr, row, columns, num_columns, dx)
    else:
        for row in range(begin, end):
            rms, power = root_mean_square(x_ptr, row, x_stride, num_columns, eps, BLOCK)
            inverse = inverse_of(rms)
            products = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                w = norm_weight(words_ptr, exponents_ptr, columns, num_columns, GROUP_SIZE, MANTISSA_BITS)
                scaled = load_row(grad_ptr, row, num_columns, columns, num_columns) * w * inverse
                products += (
                    unit_row(load_row(x_ptr, row, x_stride, columns, num_columns), rms, power) * scaled
                )
            mean = tl.div_rn(tl.sum(products, axis=0), width)
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                w = norm_weight(words_ptr, exponents_ptr, columns, num_columns, GROUP_SIZE, MANTISSA_BITS)
                scaled = load_row(grad_ptr, row, num_columns, columns, num_columns) * w * inverse
                unit = unit_row(load_row(x_ptr, row, x_stride, columns, num_columns), rms, power)
                dx = (scaled - unit * mean) * power
                if added_ptr is not None:
                    dx += load_row(added_ptr, row, num_columns, columns, num_columns)
                store_row(out_ptr, row, columns, num_columns, dx)


@triton.jit
def _inverse_rms_kernel(x_ptr, inverse_ptr, powers_ptr, num_columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    inverse, power = inverse_rms(x_ptr, row, num_columns, num_columns, eps, BLOCK)
    tl.store(inverse_ptr + row, inverse)
    tl.store(powers_ptr + row, power)


@triton.jit(do_not_specialize=["num_m", "part_rows"])
def _rms_norm_weight_grad_kernel(
    grad_ptr, x_ptr, inverse_ptr, powers_ptr, parts_ptr, num_m, part_rows, num_columns,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1).to(tl.int64)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, num_m)
    # The rows of a tile are added up once, at the end.
    sums = tl.zeros([BLOCK_M, BLOCK], dtype=tl.float32)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & (columns < num_columns)[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        grad = widen(tl.load(grad_ptr + offsets, mask=mask, other=0.0))
        x = widen(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        inverse = tl.load(inverse_ptr + rows, mask=rows < end, other=0.0)
        # The factors stay apart, because their product may be too small for float32.
        power = tl.load(powers_ptr + rows, mask=rows < end, other=0.0)
        sums += grad * (x * inverse[:, None] * power[:, None])
    parts = parts_ptr + part * num_columns + columns
    tl.store(parts, tl.sum(sums, axis=0), mask=columns < num_columns)


def _tile(num_columns: int) -> dict[str, int]:
    """Return the block of a kernel that gives each row a program, and the warps that share it."""
    block, _ = row_tile(num_columns, BLOCK_COLUMNS)
    return {
        "BLOCK": block,
        "num_warps": 1 if block <= 512 else 2 if block <= 1024 else 4 if block <= 4096 else 8,
    }


def _shared_rows(num_m: int, num_columns: int) -> tuple[int, int, dict[str, Any]]:
    """Return how many rows a program has, how many programs share them, and the block and stages of these programs."""
    tile = _tile(num_columns)
    is_short = tile["BLOCK"] <= SHORT_ROW
    part_rows, num_parts = parts_of(num_m, SHORT_PROGRAMS if is_short else PROGRAMS, 1)
    return (
        part_rows,
        num_parts,
        {**tile, "ONE_BLOCK": num_columns <= BLOCK_COLUMNS, "STAGES": 2 if is_short else 1},
    )


def normalize(
    x_MK: Tensor,
    weight: DeviceWeight,
    eps: float,
    branch_MK: Tensor | None = None,
    sum_MK: Tensor | None = None,
) -> Tensor:
    """Launch `rms_norm` on x [M, K], whose rows may lie apart in memory; or `add_rms_norm`, which writes its sum with a branch."""
    runs_here(x_MK)
    num_m, num_columns = x_MK.shape
    y = torch.empty(num_m, num_columns, dtype=x_MK.dtype, device=x_MK.device)
    if num_m:
        part_rows, num_parts, shape = _shared_rows(num_m, num_columns)
        _rms_norm_kernel[(num_parts,)](
            x_MK, branch_MK, sum_MK, weight.words, weight.exponents, y,
            num_m, part_rows, num_columns, x_MK.stride(0), eps,
            GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, **shape,
        )  # fmt: skip
    return y


def normalize_input_grad(
    grad_MK: Tensor, x_MK: Tensor, weight: DeviceWeight, eps: float, added_MK: Tensor | None
) -> Tensor:
    """Launch `rms_norm_input_grad` on tensors [M, K]. The rows of x may lie apart in memory."""
    runs_here(x_MK)
    num_m, num_columns = x_MK.shape
    out = torch.empty(num_m, num_columns, dtype=x_MK.dtype, device=x_MK.device)
    if num_m:
        part_rows, num_parts, shape = _shared_rows(num_m, num_columns)
        _rms_norm_input_grad_kernel[(num_parts,)](
            grad_MK, x_MK, weight.words, weight.exponents, added_MK, out,
            num_m, part_rows, num_columns, x_MK.stride(0), eps,
            GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, **shape,
        )  # fmt: skip
    return out


def normalize_weight_grad(grad_MK: Tensor, x_MK: Tensor, eps: float) -> Tensor:
    """Launch `rms_norm_weight_grad` on tensors [M, K] contiguous; returns float32 [1, K]."""
    runs_here(x_MK)
    num_m, num_columns = x_MK.shape
    inverse, powers = (torch.empty(num_m, dtype=torch.float32, device=x_MK.device) for _ in range(2))
    if num_m:
        _inverse_rms_kernel[(num_m,)](x_MK, inverse, powers, num_columns, eps, **_tile(num_columns))
    block, row_blocks = row_tile(num_columns, BLOCK_SUMS)
    part_rows, num_parts = parts_of(num_m, triton.cdiv(PROGRAMS, row_blocks), PART_ROWS)
    parts = torch.empty(num_parts, num_columns, dtype=torch.float32, device=x_MK.device)
    _rms_norm_weight_grad_kernel[(row_blocks, num_parts)](
        grad_MK, x_MK, inverse, powers, parts, num_m, part_rows, num_columns, BLOCK_M=BLOCK_ROWS, BLOCK=block
    )
    return parts if num_parts == 1 else add_parts(parts, torch.empty_like(parts[:1]))
