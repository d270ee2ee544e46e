"""Products of bfloat16 matrices that are added to another matrix before they are rounded, once.

Legend: E matrices of a stack, M rows and N columns of the result, K terms of a sum. Rows address in 64 bits.

A library would round the product to bfloat16 before it adds, or write it out in float32. Here a program keeps the float32 sums of
its tile, adds the tile of the other matrix, and rounds. One program adds all terms of a sum, step by step. So bits follow from
shapes and strides, and not from addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, runs_here
from arbitor.optimized.kernels.products import multiplies_wide

PROGRAMS = 132
"""Programs of a round: one for each multiprocessor of an H100 or H200."""

UNIT = 8
"""Neighbouring elements that a thread reads at a time, if all widths and strides allow it: 16 bytes."""

GROUP = 8
"""Rows of tiles whose programs run side by side, so that they share the columns of b in the cache."""


@triton.jit(
    do_not_specialize=[
        "rows_units",
        "columns_units",
        "terms_units",
        "a_matrix",
        "a_stride",
        "b_matrix",
        "b_stride",
    ]
)
def _product_sum_kernel(
    a_ptr, b_ptr, added_ptr, out_ptr, squares_ptr, factor, added_factor,
    rows_units, columns_units, terms_units, a_matrix, a_stride, b_matrix, b_stride,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ADDS: tl.constexpr, MARK: tl.constexpr, WIDE: tl.constexpr,
    ROWS_UNIT: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_rows, num_columns, num_terms = rows_units * ROWS_UNIT, columns_units * UNIT, terms_units * UNIT
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    matrix = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    # A group of rows of tiles is taken column by column.
    first_row_tile = tile // (GROUP * column_tiles) * GROUP
    group_rows = tl.minimum(row_tiles - first_row_tile, GROUP)
    within = tile % (GROUP * column_tiles)
    rows = (first_row_tile + within % group_rows).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    terms = tl.arange(0, BLOCK_K)
    is_row, is_column = rows < num_rows, columns < num_columns
    a_stride, b_stride = tl.cast(a_stride, tl.int64) * UNIT, tl.cast(b_stride, tl.int64) * UNIT
    # One of the two steps between neighbours is a constant, so that the compiler sees which elements lie side by side.
    a_row = 1 if A_TURNED else a_stride
    a_term = a_stride if A_TURNED else 1
    b_term = 1 if B_TURNED else b_stride
    b_column = b_stride if B_TURNED else 1
    a_tile_ptr = a_ptr + matrix * a_matrix * UNIT + rows[:, None] * a_row + terms[None, :] * a_term
    b_tile_ptr = b_ptr + matrix * b_matrix * UNIT + terms[:, None] * b_term + columns[None, :] * b_column
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, num_terms, BLOCK_K):
        a_mask, b_mask = is_row[:, None], is_column[None, :]
        if not EVEN:
            is_term = terms < num_terms - start
            a_mask, b_mask = a_mask & is_term[None, :], b_mask & is_term[:, None]
        a = tl.load(a_tile_ptr, mask=a_mask, other=0.0)
        b = tl.load(b_tile_ptr, mask=b_mask, other=0.0)
        if WIDE:
            sums = tl.dot(widen(a), widen(b), sums, input_precision="ieee")
        else:
            sums = tl.dot(a, b, sums)
        a_tile_ptr += BLOCK_K * a_term
        b_tile_ptr += BLOCK_K * b_term
    mask = is_row[:, None] & is_column[None, :]
    row = matrix * num_rows + rows
    places = row[:, None] * num_columns + columns[None, :]
    values = factor * sums
    if ADDS:
        values += added_factor * widen(tl.load(added_ptr + places, mask=mask, other=0.0))
    if MARK:
        squares = tl.load(squares_ptr + row, mask=is_row, other=0.0)
        values = tl.where((squares < float("inf"))[:, None], values, float("nan"))
    # A GPU has an instruction that rounds two values. The interpreter would truncate them.
    rounded = narrow(values, tl.bfloat16) if WIDE else values.to(tl.bfloat16)
    tl.store(out_ptr + places, rounded, mask=mask)


@dataclass(frozen=True)
class Tile:
    """A tile of the result, and how a program computes it.

    Fields:
        block_m, block_n: rows and columns.
        block_k:    terms of a step.
        num_stages: steps that are read ahead.
        num_warps:  warps of the program.
        speed:      elements that a multiprocessor makes in a time, over those of the largest tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    speed: float

    def count(self, num_rows: int, num_columns: int) -> int:
        """Return how many tiles a matrix has."""
        return triton.cdiv(num_rows, self.block_m) * triton.cdiv(num_columns, self.block_n)

    def time(self, num_matrices: int, num_rows: int, num_columns: int) -> float:
        """Return the time of the multiprocessor that has most tiles, in no unit."""
        rounds = triton.cdiv(num_matrices * self.count(num_rows, num_columns), PROGRAMS)
        return rounds * self.block_m * self.block_n / self.speed


TILES = (
    Tile(128, 256, 64, 3, 8, 1.0),
    Tile(128, 128, 64, 3, 4, 0.9),
    Tile(64, 128, 64, 3, 4, 0.85),
    Tile(64, 64, 64, 4, 4, 0.7),
)
"""The tiles, largest first. A tensor core of Hopper takes 64 rows at a time.

The speeds let `tile_of` choose best among 60 products that were timed on an H200: 1.05 times as long as with the best of 19 tiles.
"""

LEAST_TERMS = 32
"""Least terms of a step. See `products.Tiling.within` for what fewer would do."""


def tile_of(num_matrices: int, num_rows: int, num_columns: int, num_terms: int, unit: int = UNIT) -> Tile:
    """Return the tile with the least `time`, and of equal ones the largest.

    A tile of which no matrix would fill more than half is left out. So are all but the smallest where elements are not read by
    `UNIT`, because a thread would have more addresses than registers.
    """
    fitting = [tile for tile in TILES if tile.block_m < 2 * num_rows and tile.block_n < 2 * num_columns]
    if not fitting or unit != UNIT:
        fitting = [TILES[-1]]
    tile = min(fitting, key=lambda each: each.time(num_matrices, num_rows, num_columns))
    return replace(tile, block_k=max(LEAST_TERMS, min(tile.block_k, triton.next_power_of_2(num_terms))))


def product_sum(
    a: Tensor,
    b: Tensor,
    *,
    factor: float = 1.0,
    added: Tensor | None = None,
    added_factor: float = 1.0,
    out: Tensor | None = None,
    squares_N: Tensor | None = None,
) -> Tensor:
    """Return factor (a @ b) + added_factor `added`, bfloat16 [E, M, N], rounded once from float32.

    Only multiples of 8 elements, at addresses of 16 bytes, are read fast.

    a, b:      bfloat16 [E, M, K] and [E, K, N], not empty; each matrix is contiguous, or the transpose of one that is
    added:     bfloat16 [E, M, N], contiguous; None adds nothing
    out:       where the result goes, contiguous, which may be `added`; None for a new tensor
    squares_N: float64 [E M], sums of squares; rows whose sum is not finite become NaN
    """
    runs_here(a)
    (num_matrices, num_rows, num_terms), num_columns = a.shape, b.shape[2]
    if out is None:
        out = torch.empty(num_matrices, num_rows, num_columns, dtype=a.dtype, device=a.device)
    a_turned, b_turned = a.stride(2) != 1, b.stride(2) != 1
    a_stride, b_stride = a.stride(1 + a_turned), b.stride(1 + b_turned)
    # By itself Triton would notice only multiples of 16.
    unit = math.gcd(UNIT, num_columns, num_terms, a.stride(0), a_stride, b.stride(0), b_stride)
    unit = math.gcd(unit, num_rows) if a_turned else unit
    rows_unit = unit if a_turned else 1
    tile = tile_of(num_matrices, num_rows, num_columns, num_terms, unit)
    _product_sum_kernel[row_grid(num_matrices, tile.count(num_rows, num_columns))](
        a, b, out if added is None else added, out, out if squares_N is None else squares_N, factor, added_factor,
        num_rows // rows_unit, num_columns // unit, num_terms // unit,
        a.stride(0) // unit, a_stride // unit, b.stride(0) // unit, b_stride // unit,
        A_TURNED=a_turned, B_TURNED=b_turned, ADDS=added is not None, MARK=squares_N is not None,
        WIDE=multiplies_wide(a), ROWS_UNIT=rows_unit, UNIT=unit, EVEN=num_terms % tile.block_k == 0, GROUP=GROUP,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
