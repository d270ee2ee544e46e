"""Linear kernels for few rows of activations: trits go from memory to the tensor cores without a dense copy.

Legend: M activation rows, N weight rows, K columns, KW words a row, KG groups a row.
With many rows the product is bound by arithmetic, and unpacking the weight once for the library's matrix product costs a
few percent (`optimized/ops/linear.py` draws the line); with few rows it is bound by reading the weight, and these kernels
read a quarter byte and a scale where a dense one reads two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_trits, level_scales
from arbitor.optimized.kernels.launch import dot_dtype, runs_here
from arbitor.optimized.layouts import DeviceWeight

BLOCK_M = 64  # one tile holds every row of activations, so that a weight is unpacked once
BLOCK_N = 32
BLOCK_K = 128


@triton.jit
def weight_tile(
    words_ptr, exponents_ptr, rows, columns, num_rows, num_columns, row_words, row_groups,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return W[rows, columns] as DTYPE; 0 outside the weight. `rows` are int64, `columns` int32."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    words = tl.load(words_ptr + rows[:, None] * row_words + (columns // 16)[None, :], mask=mask, other=0)
    levels = tl.load(
        exponents_ptr + rows[:, None] * row_groups + (columns // GROUP_SIZE)[None, :], mask=mask, other=0
    )
    trits = lane_trits(words, (columns % 16)[None, :])
    return (trits.to(tl.float32) * level_scales(levels, MANTISSA_BITS)).to(DTYPE)


@triton.jit(do_not_specialize=["num_m"])
def _linear_kernel(
    x_ptr, words_ptr, exponents_ptr, y_ptr, num_m, num_rows, num_columns, row_words, row_groups, stride_m, stride_k,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_mask = (m < num_m)[:, None] & (columns < num_columns)[None, :]
        x = tl.load(
            x_ptr + m[:, None] * stride_m + columns.to(tl.int64)[None, :] * stride_k, mask=x_mask, other=0.0
        )
        w = weight_tile(
            words_ptr, exponents_ptr, rows, columns, num_rows, num_columns, row_words, row_groups,
            GROUP_SIZE, MANTISSA_BITS, DOT_DTYPE,
        )  # fmt: skip
        sums = tl.dot(x.to(DOT_DTYPE), tl.trans(w), sums, input_precision="ieee")
    y_mask = (m < num_m)[:, None] & (rows < num_rows)[None, :]
    tl.store(y_ptr + m[:, None] * num_rows + rows[None, :], sums.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["num_m"])
def _linear_input_grad_kernel(
    grad_ptr, words_ptr, exponents_ptr, out_ptr, num_m, num_rows, num_columns, row_words, row_groups, stride_m, stride_n,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, num_rows, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K).to(tl.int64)
        grad_mask = (m < num_m)[:, None] & (rows < num_rows)[None, :]
        grad = tl.load(grad_ptr + m[:, None] * stride_m + rows[None, :] * stride_n, mask=grad_mask, other=0.0)
        w = weight_tile(
            words_ptr, exponents_ptr, rows, columns, num_rows, num_columns, row_words, row_groups,
            GROUP_SIZE, MANTISSA_BITS, DOT_DTYPE,
        )  # fmt: skip
        sums = tl.dot(grad.to(DOT_DTYPE), w, sums, input_precision="ieee")
    out_mask = (m < num_m)[:, None] & (columns < num_columns)[None, :]
    tl.store(
        out_ptr + m[:, None] * num_columns + columns[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=out_mask,
    )


def product(x_MK: Tensor, weight: DeviceWeight, *, transposed: bool) -> Tensor:
    """Launch x W^T (or x W, `transposed`) for float32 or bfloat16 x of any strides; returns the dtype of x."""
    runs_here(x_MK)
    num_rows, num_columns = weight.shape
    num_out = num_columns if transposed else num_rows
    out = torch.empty(x_MK.shape[0], num_out, dtype=x_MK.dtype, device=x_MK.device)
    if out.numel():
        kernel = _linear_input_grad_kernel if transposed else _linear_kernel
        kernel[(triton.cdiv(num_out, BLOCK_N), triton.cdiv(x_MK.shape[0], BLOCK_M))](
            x_MK, weight.words, weight.exponents, out, x_MK.shape[0], num_rows, num_columns,
            weight.words.shape[1], weight.exponents.shape[1], *x_MK.stride(),
            GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, DOT_DTYPE=dot_dtype(x_MK),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    return out
