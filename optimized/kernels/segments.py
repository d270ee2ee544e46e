"""Sums of the rows of each segment, in a fixed order and without atomics; a long segment is cut into parts (`parts`).

Legend: R rows, D width, E edges (each reads one row), S segments.
Edges are sorted by their segment; a position is a place in that order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile

PART_EDGES = 64
"""Positions of a part. A part begins at a multiple of this number, and is used if all its positions belong to one segment."""

BLOCK_COLUMNS = 1024
WARP_COLUMNS = 256

AT_ONCE = tl.constexpr(8)
"""Rows that are on their way at the same time."""


@triton.jit
def add_edges(
    sums, rows_ptr, order_ptr, signs_ptr, begin, gap_begin, gap, index, columns, num_columns,
    NUM_SLOTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Return sums plus the rows of COUNT edges. The first edge is number `index` from `begin` on, and the gap is left out."""
    # The loop is unrolled, so that the loads of all rows are on their way at once.
    for place in tl.static_range(COUNT):
        position = begin + index + place
        position += tl.where(position < gap_begin, 0, gap)
        edge = tl.load(order_ptr + position)
        row = rows_ptr + edge // NUM_SLOTS * num_columns
        value = widen(tl.load(row + columns, mask=columns < num_columns, other=0.0)).to(tl.float64)
        if signs_ptr is not None:
            value *= widen(tl.load(signs_ptr + edge)).to(tl.float64)
        sums += value
    return sums


@triton.jit
def sum_of_edges(
    rows_ptr, order_ptr, signs_ptr, begin, end, gap_begin, gap, columns, num_columns,
    NUM_SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the float64 sums of the edges at positions begin .. end - 1, without the `gap` positions from `gap_begin` on."""
    sums = tl.zeros([BLOCK_D], dtype=tl.float64)
    number = end - begin - gap
    for index in range(0, number - number % AT_ONCE, AT_ONCE):
        sums = add_edges(
            sums, rows_ptr, order_ptr, signs_ptr, begin, gap_begin, gap, index, columns, num_columns,
            NUM_SLOTS, AT_ONCE,
        )  # fmt: skip
    # At most 4 + 2 + 1 edges are left, by the bits of the number. Most segments have only these, and in float64 a masked row
    # would cost as much arithmetic as a row that counts.
    for halvings in tl.static_range(1, 4):
        if number & (AT_ONCE >> halvings) != 0:
            sums = add_edges(
                sums, rows_ptr, order_ptr, signs_ptr, begin, gap_begin, gap,
                number - number % (AT_ONCE >> (halvings - 1)), columns, num_columns,
                NUM_SLOTS, AT_ONCE >> halvings,
            )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["row_blocks"])
def _part_sums_kernel(
    rows_ptr, keys_ptr, order_ptr, signs_ptr, parts_ptr, num_columns, row_blocks,
    NUM_SLOTS: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part = (tl.program_id(0) // row_blocks).to(tl.int64)
    begin = part * PART
    key = tl.load(keys_ptr + begin)
    # Nothing reads the sums of a part that lies in several segments, or in none.
    if (key < 0) | (key != tl.load(keys_ptr + begin + PART - 1)):
        return
    columns = (tl.program_id(0) % row_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = begin + PART
    sums = sum_of_edges(
        rows_ptr, order_ptr, signs_ptr, begin, end, end, 0, columns, num_columns,
        NUM_SLOTS, BLOCK_D,
    )  # fmt: skip
    tl.store(parts_ptr + part * num_columns + columns, sums, mask=columns < num_columns)


@triton.jit(do_not_specialize=["row_blocks"])
def _segment_sums_kernel(
    rows_ptr, order_ptr, starts_ptr, signs_ptr, parts_ptr, out_ptr, num_columns, row_blocks,
    NUM_SLOTS: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    segment = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
    first = (begin + PART - 1) // PART
    # Parts first .. last - 1 lie in this segment as a whole.
    last = tl.maximum(end // PART, first)
    # The edges before and after those parts come first, then the parts. This order depends on the positions alone. The sums are
    # in float64, as in the specification.
    sums = sum_of_edges(
        rows_ptr, order_ptr, signs_ptr, begin, end, first * PART, (last - first) * PART, columns, num_columns,
        NUM_SLOTS, BLOCK_D,
    )  # fmt: skip
    for start in range(first, last, AT_ONCE):
        for place in tl.static_range(AT_ONCE):
            part = start + place
            width = tl.where(part < last, num_columns, 0)
            sums += tl.load(parts_ptr + part * num_columns + columns, mask=columns < width, other=0.0)
    out = out_ptr + segment * num_columns + columns
    tl.store(out, narrow(sums.to(tl.float32), out_ptr.dtype.element_ty), mask=columns < num_columns)


def segment_sums(
    rows_RD: Tensor,
    keys_E: Tensor,
    order_E: Tensor,
    starts: Tensor,
    dtype: torch.dtype,
    signs_E: Tensor | None = None,
) -> Tensor:
    """Return the sum of the rows of each segment's edges, [S, D], each row times the sign of its edge if there are signs.

    keys:    the sorted keys of all edges, one key for each segment; an edge with a key below 0 belongs to no segment
    order:   position -> edge; edge e reads row e // (E / R)
    starts:  [S + 1], the first position of each segment, and the end of the last
    """
    (num_rows, num_columns), num_edges = rows_RD.shape, order_E.numel()
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    shared = {
        # This is a constant, so that a division by it becomes a product.
        "NUM_SLOTS": num_edges // num_rows,
        "PART": PART_EDGES,
        "BLOCK_D": block,
        "num_warps": min(4, triton.cdiv(block, WARP_COLUMNS)),
    }
    rows_RD, num_parts = rows_RD.contiguous(), num_edges // PART_EDGES
    parts = torch.empty(num_parts, num_columns, dtype=torch.float64, device=rows_RD.device)
    if num_parts:
        _part_sums_kernel[row_grid(num_parts, row_blocks)](
            rows_RD, keys_E, order_E, signs_E, parts, num_columns, row_blocks, **shared
        )
    num_segments = starts.numel() - 1
    sums_SD = torch.empty(num_segments, num_columns, dtype=dtype, device=rows_RD.device)
    _segment_sums_kernel[row_grid(num_segments, row_blocks)](
        rows_RD, order_E, starts, signs_E, parts, sums_SD, num_columns, row_blocks, **shared
    )
    return sums_SD
