"""Kernels around the products of `orthogonalize`: the average before them, a norm, the division by it, and rows to leave out.

Legend: E matrices of N rows each, stacked, K columns. Rows address in 64 bits, columns within a row in 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import known_columns, narrow, widen
from arbitor.optimized.kernels.launch import column_step, gradient_columns, row_grid, row_tile, runs_here
from arbitor.optimized.kernels.votes import rate_argument
from arbitor.reference.constants import AVERAGE_EXPONENT_MIN

BLOCK_COLUMNS = 1024
BLOCK = 1024
"""Elements of a tile that may cross rows."""

MARKED_ROWS, MARKED_COLUMNS = 128, 32
"""Rows that a program looks at, and columns that it writes at a time if one of them is faulty."""


@triton.jit
def _wide_power_of_two(exponents):
    """Return float64 2**exponents for int32 exponents in [-1022, 1023]."""
    return ((exponents.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["rate"])
def _average_kernel(
    grad_ptr, mean_ptr, exponents_ptr, led_ptr, new_mean_ptr, new_exponents_ptr, rate, num_columns,
    RATE_ON_DEVICE: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if RATE_ON_DEVICE:
        rate = tl.load(rate)
    exponent = tl.load(exponents_ptr + row).to(tl.int32)
    kept = _wide_power_of_two(exponent)
    largest = tl.zeros([BLOCK], dtype=tl.float64)
    faulty = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        place, mask = row * num_columns + columns, columns < num_columns
        grad = widen(tl.load(grad_ptr + place, mask=mask, other=0.0))
        q = tl.load(mean_ptr + place, mask=mask, other=0)
        # Neither an infinity nor a NaN is below infinity.
        finite = tl.abs(grad) < float("inf")
        faulty |= tl.where(finite, 0, 1)
        m = (q.to(tl.float64) * kept * (PARTS - 1) + tl.where(finite, grad, 0.0).to(tl.float64)) * (
            1.0 / PARTS
        )
        largest = tl.maximum(largest, tl.abs(m))
    moves = (rate != 0) & (tl.max(faulty, axis=0) == 0)
    # A number above 0 is normal in float64, so its exponent can be read off its bits.
    bits = tl.max(largest, axis=0).to(tl.int64, bitcast=True)
    above = ((bits >> 52) & 0x7FF).to(tl.int32) - 1022
    new_exponent = tl.where(bits != 0, tl.maximum(above - 7, LEAST), 0)
    step = _wide_power_of_two(-new_exponent)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        place, mask = row * num_columns + columns, columns < num_columns
        given = tl.load(grad_ptr + place, mask=mask, other=0.0)
        q = tl.load(mean_ptr + place, mask=mask, other=0)
        grad = tl.where(moves, widen(given), 0.0).to(tl.float64)
        m = (q.to(tl.float64) * kept * (PARTS - 1) + grad) * (1.0 / PARTS)
        # A product with PARTS is exact, fused or not.
        led = narrow(((m * PARTS - m + grad) * (1.0 / PARTS)).to(tl.float32), led_ptr.dtype.element_ty)
        # Adding and taking away 1.5 * 2**52 leaves no bits for a fraction: half to even.
        rounded = (m * step + 6755399441055744.0) - 6755399441055744.0
        new_q = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
        tl.store(led_ptr + place, tl.where(moves, led, given), mask=mask)
        tl.store(new_mean_ptr + place, tl.where(moves, new_q, q), mask=mask)
    tl.store(new_exponents_ptr + row, tl.where(moves, new_exponent, exponent).to(tl.int8))


@triton.jit
def _row_squares_kernel(grad_ptr, squares_ptr, num_columns, BLOCK: tl.constexpr, COLUMN_STEP: tl.constexpr):
    num_columns = known_columns(num_columns, COLUMN_STEP)
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + row * num_columns + columns, mask=columns < num_columns, other=0.0)
        wide = widen(grad).to(tl.float64)
        squares += wide * wide
    tl.store(squares_ptr + row, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["num_rows"])
def _row_factors_kernel(squares_ptr, factors_ptr, num_rows, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * num_rows
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        squares = tl.load(squares_ptr + first + rows, mask=rows < num_rows, other=0.0)
        # Neither an infinity nor a NaN is below infinity.
        total += tl.where(squares < float("inf"), squares, 0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    factor = tl.where(norm > 0.0, 1.0 / tl.where(norm > 0.0, norm, 1.0), 0.0)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        squares = tl.load(squares_ptr + first + rows, mask=rows < num_rows, other=0.0)
        factors = tl.where(squares < float("inf"), factor, 0.0)
        tl.store(factors_ptr + first + rows, factors, mask=rows < num_rows)


@triton.jit(do_not_specialize=["row_blocks"])
def _scale_rows_kernel(
    grad_ptr,
    factors_ptr,
    out_ptr,
    num_columns,
    width,
    row_blocks,
    BLOCK: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
):
    num_columns = known_columns(num_columns, COLUMN_STEP)
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    factor = tl.load(factors_ptr + row)
    # A row of factor 0 may hold a NaN.
    counts = columns < tl.where(factor == 0.0, 0, num_columns)
    grad = widen(tl.load(grad_ptr + row * num_columns + columns, mask=counts, other=0.0)).to(tl.float64)
    scaled = (grad * factor).to(tl.float32)
    tl.store(out_ptr + row * width + columns, narrow(scaled, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _mark_rows_kernel(out_ptr, squares_ptr, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.load(squares_ptr + rows, mask=rows < num_rows, other=0.0)
    # Neither an infinity nor a NaN is below infinity.
    faulty = tl.where(squares < float("inf"), 0, 1)
    if tl.max(faulty, axis=0) == 0:
        return
    nothing = tl.full([ROWS, BLOCK], float("nan"), dtype=out_ptr.dtype.element_ty)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (faulty != 0)[:, None] & (columns < num_columns)[None, :]
        tl.store(out_ptr + rows[:, None] * num_columns + columns[None, :], nothing, mask=mask)


def average(
    grad_NK: Tensor,
    mean_NK: Tensor,
    exponents_N: Tensor,
    rate: float | Tensor,
    memory: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Launch `average_gradient`, which writes to `out`. All tensors are contiguous, and those of `out` may be the given ones."""
    runs_here(grad_NK)
    num_rows, num_columns = grad_NK.shape
    gradient_columns(num_columns)
    block, _ = row_tile(num_columns, BLOCK_COLUMNS)
    if num_rows:
        _average_kernel[row_grid(num_rows, 1)](
            grad_NK, mean_NK, exponents_N, *out, rate_argument(rate), num_columns,
            RATE_ON_DEVICE=isinstance(rate, Tensor), PARTS=2**memory, LEAST=AVERAGE_EXPONENT_MIN, BLOCK=block,
        )  # fmt: skip


def row_squares(grad_NK: Tensor) -> Tensor:
    """Return the sum of squares of each row, float64 [N]; not finite where the row is not."""
    runs_here(grad_NK)
    num_rows, num_columns = grad_NK.shape
    gradient_columns(num_columns)
    squares_N = torch.empty(num_rows, dtype=torch.float64, device=grad_NK.device)
    block, _ = row_tile(num_columns, BLOCK_COLUMNS)
    _row_squares_kernel[row_grid(num_rows, 1)](
        grad_NK, squares_N, num_columns, BLOCK=block, COLUMN_STEP=column_step(num_columns)
    )
    return squares_N


def row_factors(squares_N: Tensor, num_groups: int) -> Tensor:
    """Return 1 / norm of the matrix of each row, float64 [N]; 0 for a matrix of zeros, and for a row that is not finite.

    squares_N: float64 [N], `row_squares` of a stack of `num_groups` matrices.
    """
    factors_N = torch.empty_like(squares_N)
    num_rows = squares_N.numel() // num_groups
    _row_factors_kernel[row_grid(num_groups, 1)](squares_N, factors_N, num_rows, BLOCK=BLOCK)
    return factors_N


def scale_rows(grad_NK: Tensor, factors_N: Tensor, *, out_NK: Tensor | None = None) -> Tensor:
    """Return each row times its float64 factor, rounded to float32 and then to its dtype; zeros where the factor is 0.

    out_NK: where the result goes, in the dtype of grad_NK, with rows that are contiguous and may lie apart; None for a new tensor
    """
    out_NK = torch.empty_like(grad_NK) if out_NK is None else out_NK
    num_rows, num_columns = grad_NK.shape
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    _scale_rows_kernel[row_grid(num_rows, row_blocks)](
        grad_NK, factors_N, out_NK, num_columns, out_NK.stride(0), row_blocks,
        BLOCK=block, COLUMN_STEP=column_step(num_columns),
    )  # fmt: skip
    return out_NK


def mark_rows(out_NK: Tensor, squares_N: Tensor) -> None:
    """Make each row NaN whose sum of squares, `row_squares` of another matrix, is not finite. The rows are contiguous."""
    num_rows, num_columns = out_NK.shape
    _mark_rows_kernel[row_grid(triton.cdiv(num_rows, MARKED_ROWS), 1)](
        out_NK, squares_N, num_rows, num_columns, ROWS=MARKED_ROWS, BLOCK=MARKED_COLUMNS
    )
