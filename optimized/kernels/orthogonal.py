"""Kernels around the products of `orthogonalize`: a row's sum of squares, division by a norm, and sums of two matrices.

Legend: E matrices of N rows each, stacked, K columns. Rows address in 64 bits, columns within a row in 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import gradient_columns, row_grid, row_tile, runs_here

BLOCK_COLUMNS = 1024
BLOCK = 1024  # elements of a tile where rows do not matter


@triton.jit
def _row_squares_kernel(grad_ptr, squares_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + row * num_columns + columns, mask=columns < num_columns, other=0.0)
        wide = widen(grad).to(tl.float64)
        squares += wide * wide
    tl.store(squares_ptr + row, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["row_blocks"])
def _scale_rows_kernel(grad_ptr, factors_ptr, out_ptr, num_columns, row_blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    factor = tl.load(factors_ptr + row)
    counts = columns < tl.where(factor == 0.0, 0, num_columns)  # a row of factor 0 may hold a NaN
    grad = widen(tl.load(grad_ptr + row * num_columns + columns, mask=counts, other=0.0)).to(tl.float64)
    scaled = (grad * factor).to(tl.float32)
    tl.store(out_ptr + row * num_columns + columns, narrow(scaled, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(x_ptr, y_ptr, out_ptr, a, b, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    x = widen(tl.load(x_ptr + places, mask=mask, other=0.0))
    y = tl.load(y_ptr + places, mask=mask, other=0.0)
    tl.store(out_ptr + places, narrow(a * x + b * y, out_ptr.dtype.element_ty), mask=mask)


def row_squares(grad_NK: Tensor) -> Tensor:
    """Return the sum of squares of each row, float64 [N]; not finite where the row is not."""
    runs_here(grad_NK)
    num_rows, num_columns = grad_NK.shape
    gradient_columns(num_columns)
    squares_N = torch.empty(num_rows, dtype=torch.float64, device=grad_NK.device)
    block, _ = row_tile(num_columns, BLOCK_COLUMNS)
    _row_squares_kernel[row_grid(num_rows, 1)](grad_NK, squares_N, num_columns, BLOCK=block)
    return squares_N


def scale_rows(grad_NK: Tensor, factors_N: Tensor) -> Tensor:
    """Return each row times its float64 factor, rounded to float32 and then to its dtype; zeros where the factor is 0."""
    num_rows, num_columns = grad_NK.shape
    out_NK = torch.empty_like(grad_NK)
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    _scale_rows_kernel[row_grid(num_rows, row_blocks)](
        grad_NK, factors_N, out_NK, num_columns, row_blocks, BLOCK=block
    )
    return out_NK


def weighted_sum(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """Return a x + b y in the dtype of x, rounded once; y is float32, of the shape of x."""
    out = torch.empty_like(x)
    _sum_kernel[row_grid(triton.cdiv(x.numel(), BLOCK), 1)](x, y, out, a, b, x.numel(), BLOCK=BLOCK)
    return out
