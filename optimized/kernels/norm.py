"""RMSNorm kernels: one program a row; the weight is unpacked in the kernel.

Legend: M activation rows, K channels, x^ = x / rms(x). All arithmetic in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_weights, level_scales, narrow, widen
from arbitor.optimized.kernels.launch import runs_here
from arbitor.optimized.layouts import DeviceWeight

BLOCK_COLUMNS = 1024
BLOCK_ROWS = 32


@triton.jit
def norm_weight(
    words_ptr, exponents_ptr, columns, mask, GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr
):
    """Return the float32 weight of the given channels."""
    words = tl.load(words_ptr + columns // 16, mask=mask, other=0)
    levels = tl.load(exponents_ptr + columns // GROUP_SIZE, mask=mask, other=0)
    return lane_weights(words, columns % 16, level_scales(levels, MANTISSA_BITS))


@triton.jit
def load_row(x_ptr, row, columns, num_columns, mask):
    """Return columns of a row of activations as float32."""
    return widen(tl.load(x_ptr + row * num_columns + columns, mask=mask, other=0.0))


@triton.jit
def root_mean_square(x_ptr, row, num_columns, eps, BLOCK: tl.constexpr):
    """Return sqrt(mean(x**2) + eps) of a row, float32."""
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = load_row(x_ptr, row, columns, num_columns, columns < num_columns)
        squares += x * x
    return tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), tl.cast(num_columns, tl.float32)) + eps)


@triton.jit
def inverse_rms(x_ptr, row, num_columns, eps, BLOCK: tl.constexpr):
    """Return 1 / sqrt(mean(x**2) + eps) of a row, float32."""
    return 1.0 / root_mean_square(x_ptr, row, num_columns, eps, BLOCK)


@triton.jit
def _rms_norm_kernel(
    x_ptr, words_ptr, exponents_ptr, y_ptr, num_columns, eps,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse = inverse_rms(x_ptr, row, num_columns, eps, BLOCK)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        x = load_row(x_ptr, row, columns, num_columns, mask)
        w = norm_weight(words_ptr, exponents_ptr, columns, mask, GROUP_SIZE, MANTISSA_BITS)
        tl.store(
            y_ptr + row * num_columns + columns, narrow(x * inverse * w, y_ptr.dtype.element_ty), mask=mask
        )


@triton.jit
def _rms_norm_input_grad_kernel(
    grad_ptr, x_ptr, words_ptr, exponents_ptr, out_ptr, num_columns, eps,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rms = root_mean_square(x_ptr, row, num_columns, eps, BLOCK)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        grad = load_row(grad_ptr, row, columns, num_columns, mask)
        x = load_row(x_ptr, row, columns, num_columns, mask)
        w = norm_weight(words_ptr, exponents_ptr, columns, mask, GROUP_SIZE, MANTISSA_BITS)
        # Divided, not multiplied by an inverse: where the two terms below cancel, a rounding more is all that is left.
        products += tl.div_rn(x, rms) * (grad * w)
    mean = tl.div_rn(tl.sum(products, axis=0), tl.cast(num_columns, tl.float32))
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        grad = load_row(grad_ptr, row, columns, num_columns, mask)
        x = load_row(x_ptr, row, columns, num_columns, mask)
        w = norm_weight(words_ptr, exponents_ptr, columns, mask, GROUP_SIZE, MANTISSA_BITS)
        result = (grad * w - tl.div_rn(x, rms) * mean) / rms
        tl.store(out_ptr + row * num_columns + columns, narrow(result, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_rms_kernel(x_ptr, inverse_ptr, num_columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(inverse_ptr + row, inverse_rms(x_ptr, row, num_columns, eps, BLOCK))


@triton.jit(do_not_specialize=["num_m"])
def _rms_norm_weight_grad_kernel(
    grad_ptr, x_ptr, inverse_ptr, out_ptr, num_m, num_columns,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_m, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < num_m)[:, None] & (columns < num_columns)[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        grad = widen(tl.load(grad_ptr + offsets, mask=mask, other=0.0))
        x = widen(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        inverse = tl.load(inverse_ptr + rows, mask=rows < num_m, other=0.0)
        sums += tl.sum(grad * (x * inverse[:, None]), axis=0)
    tl.store(out_ptr + columns, sums, mask=columns < num_columns)


def _block(num_columns: int) -> int:
    return min(BLOCK_COLUMNS, triton.next_power_of_2(num_columns))


def normalize(x_MK: Tensor, weight: DeviceWeight, eps: float) -> Tensor:
    """Launch `rms_norm` on x [M, K] contiguous."""
    runs_here(x_MK)
    num_m, num_columns = x_MK.shape
    y = torch.empty(num_m, num_columns, dtype=x_MK.dtype, device=x_MK.device)
    if num_m:
        _rms_norm_kernel[(num_m,)](
            x_MK, weight.words, weight.exponents, y, num_columns, eps,
            GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK=_block(num_columns),
        )  # fmt: skip
    return y


def normalize_input_grad(grad_MK: Tensor, x_MK: Tensor, weight: DeviceWeight, eps: float) -> Tensor:
    """Launch `rms_norm_input_grad` on tensors [M, K] contiguous."""
    runs_here(x_MK)
    num_m, num_columns = x_MK.shape
    out = torch.empty(num_m, num_columns, dtype=x_MK.dtype, device=x_MK.device)
    if num_m:
        _rms_norm_input_grad_kernel[(num_m,)](
            grad_MK, x_MK, weight.words, weight.exponents, out, num_columns, eps,
            GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK=_block(num_columns),
        )  # fmt: skip
    return out


def normalize_weight_grad(grad_MK: Tensor, x_MK: Tensor, eps: float) -> Tensor:
    """Launch `rms_norm_weight_grad` on tensors [M, K] contiguous; returns float32 [1, K]."""
    runs_here(x_MK)
    num_m, num_columns = x_MK.shape
    out = torch.empty(1, num_columns, dtype=torch.float32, device=x_MK.device)
    inverse = torch.empty(num_m, dtype=torch.float32, device=x_MK.device)
    if num_m:
        _inverse_rms_kernel[(num_m,)](x_MK, inverse, num_columns, eps, BLOCK=_block(num_columns))
    block = min(64, triton.next_power_of_2(num_columns))
    _rms_norm_weight_grad_kernel[(triton.cdiv(num_columns, block),)](
        grad_MK, x_MK, inverse, out, num_m, num_columns,
        BLOCK_M=BLOCK_ROWS, BLOCK=block,
    )  # fmt: skip
    return out
