"""Gradients in eight bits between ranks: one launch encodes a gradient, one decodes those of all ranks and adds them.

`arbitor.reference.graph.mxint8` has the rule and the order of the bytes. Both kernels follow it to the bit.
Legend: N rows, K columns, KB blocks of a row, R ranks.
A tile is TILE blocks of one row by the SIDE columns of a block. Rows address in 64 bits, columns within a row in 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, power_of_two, round_half_even, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, warps_of
from arbitor.reference.graph.mxint8 import BLOCK, LEAST_EXPONENT, NOT_FINITE, encoded_bytes

SIDE = tl.constexpr(BLOCK)
LEAST, NO_SCALE = tl.constexpr(LEAST_EXPONENT), tl.constexpr(NOT_FINITE)
BIAS, UNITS = tl.constexpr(127), tl.constexpr(6)
INFINITE = tl.constexpr(0x7F800000)
"""The bits of an infinity. Those of a NaN, without the sign, are a larger number."""

TILE_BLOCKS = 32


@triton.jit
def _tile(row_tiles, num_columns, TILE: tl.constexpr):
    """Return the row of a program, its blocks [TILE], the columns of these [TILE, SIDE], and the blocks of a row."""
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    blocks = (tl.program_id(0) % row_tiles) * TILE + tl.arange(0, TILE)
    columns = blocks[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    return row, blocks, columns, tl.cdiv(num_columns, SIDE)


@triton.jit(do_not_specialize=["num_rows"])
def _encode_kernel(
    grad_ptr, content_ptr, num_rows, num_columns, row_stride, column_stride, row_tiles, TILE: tl.constexpr,
):  # fmt: skip
    row, blocks, columns, num_blocks = _tile(row_tiles, num_columns, TILE)
    inside = columns < num_columns
    address = grad_ptr + row * row_stride + columns.to(tl.int64) * column_stride
    grad = widen(tl.load(address, mask=inside, other=0.0))
    # Magnitudes are ordered as their bits are. The exponent of the largest one, biased, is the byte of the scale.
    largest = tl.max(grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scales = tl.maximum(largest >> 23, LEAST + BIAS)
    # A block that is not finite has no scale. Its elements are read by nobody, and still are those of the reference.
    exponents = tl.where(largest == INFINITE, -1, tl.where(largest > INFINITE, LEAST, scales - BIAS))
    units = grad * power_of_two(-exponents + UNITS)[:, None]
    units = tl.where(units == units, units, 0.0)
    q = round_half_even(tl.minimum(tl.maximum(units, -127.0), 127.0)).to(tl.int32)
    tl.store(content_ptr + row * num_columns + columns, (q & 0xFF).to(tl.uint8), mask=inside)
    scales_ptr = content_ptr + num_rows.to(tl.int64) * num_columns + row * num_blocks
    tl.store(scales_ptr + blocks, scales.to(tl.uint8), mask=blocks < num_blocks)


@triton.jit
def _decoded(elements_ptr, scales_ptr, columns, inside, blocks, num_blocks):
    """Return the float32 values of a tile of an encoded gradient. A product with a power of two is exact."""
    q = tl.load(elements_ptr + columns, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    scales = tl.load(scales_ptr + blocks, mask=blocks < num_blocks, other=0).to(tl.int32)
    factors = power_of_two(scales - BIAS - UNITS)
    return q * tl.where(scales == NO_SCALE, float("nan"), factors)[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _add_encoded_kernel(
    parts_ptr, out_ptr, num_rows, num_columns, part_bytes, num_parts, row_tiles, TILE: tl.constexpr,
):  # fmt: skip
    row, blocks, columns, num_blocks = _tile(row_tiles, num_columns, TILE)
    inside = columns < num_columns
    elements_ptr = parts_ptr + row * num_columns
    scales_ptr = parts_ptr + num_rows.to(tl.int64) * num_columns + row * num_blocks
    # As in `add_parts` the first part is taken as it is.
    sums = _decoded(elements_ptr, scales_ptr, columns, inside, blocks, num_blocks)
    for _ in range(1, num_parts):
        elements_ptr += part_bytes
        scales_ptr += part_bytes
        sums += _decoded(elements_ptr, scales_ptr, columns, inside, blocks, num_blocks)
    tl.store(out_ptr + row * num_columns + columns, narrow(sums, out_ptr.dtype.element_ty), mask=inside)


def encode(grad_NK: Tensor) -> Tensor:
    """Return a gradient in eight bits, uint8, as `encoded` of the reference does.

    grad_NK: float32 or bfloat16, in any strides.
    """
    num_rows, num_columns = grad_NK.shape
    content = torch.empty(encoded_bytes(num_rows, num_columns), dtype=torch.uint8, device=grad_NK.device)
    tile, row_tiles = row_tile(triton.cdiv(num_columns, BLOCK), TILE_BLOCKS)
    _encode_kernel[row_grid(num_rows, row_tiles)](
        grad_NK, content, num_rows, num_columns, *grad_NK.stride(), row_tiles, TILE=tile, num_warps=warps_of(tile * BLOCK)
    )  # fmt: skip
    return content


def add_encoded(parts: Tensor, out_NK: Tensor) -> Tensor:
    """Decode the contiguous parts [R, bytes] of ranks and add them in their order, in float32, into `out_NK`; return `out_NK`.

    parts: uint8, what `encode` returned for gradients [N, K], at least one.
    out_NK: contiguous float32 or bfloat16, to which the sum is rounded once.
    """
    num_rows, num_columns = out_NK.shape
    tile, row_tiles = row_tile(triton.cdiv(num_columns, BLOCK), TILE_BLOCKS)
    _add_encoded_kernel[row_grid(num_rows, row_tiles)](
        parts, out_NK, num_rows, num_columns, parts.shape[1], parts.shape[0], row_tiles, TILE=tile,
        num_warps=warps_of(tile * BLOCK),
    )  # fmt: skip
    return out_NK
