"""Scale kernels: scales of exponents, weights as floats, and the first weights of a model.

Legend: N rows, K columns, KG groups a row, KW words a row, R selected rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_weights, level_scales, philox_words, word_bytes
from arbitor.optimized.kernels.launch import Clock, row_grid, row_tile, runs_here
from arbitor.optimized.layouts import DeviceWeight, words_per_row
from arbitor.reference.constants import INIT_HIGH_BYTE, INIT_LOW_BYTE, RESERVED_STEP

LOW_BYTE, HIGH_BYTE = tl.constexpr(INIT_LOW_BYTE), tl.constexpr(INIT_HIGH_BYTE)

BLOCK = 256
BLOCK_COLUMNS = 2048
BLOCK_WORDS = 64


@triton.jit(do_not_specialize=["size"])
def _group_scales_kernel(levels_ptr, scales_ptr, size, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    levels = tl.load(levels_ptr + index, mask=index < size, other=0)
    tl.store(scales_ptr + index, level_scales(levels, MANTISSA_BITS), mask=index < size)


@triton.jit(do_not_specialize=["num_slots", "row_groups", "row_words", "row_blocks", "matrix_rows"])
def _dequantize_kernel(
    rows_ptr, words_ptr, exponents_ptr, out_ptr, num_slots, num_columns, row_groups, row_words, row_blocks,
    matrix_rows, out_columns,
    HAS_ROWS: tl.constexpr, GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slots = (tl.program_id(0) // row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = slots < num_slots
    rows = tl.load(rows_ptr + slots, mask=inside, other=0) if HAS_ROWS else slots
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (columns < num_columns)
    words = tl.load(words_ptr + rows[:, None] * row_words + columns // 16, mask=mask, other=0)
    levels = tl.load(exponents_ptr + rows[:, None] * row_groups + columns // GROUP_SIZE, mask=mask, other=0)
    values = lane_weights(words, columns % 16, level_scales(levels, MANTISSA_BITS))
    # Matrices of a stack stand side by side.
    out_rows = slots % matrix_rows * out_columns + slots // matrix_rows * num_columns
    tl.store(out_ptr + out_rows[:, None] + columns, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["row_groups", "row_words", "row_blocks", "seed_low", "seed_high", "step", "tensor_id"]
)
def _initial_words_kernel(
    words_ptr, num_columns, row_groups, row_words, row_blocks, seed_low, seed_high, step, tensor_id,
    GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    word_ids = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, 16)[None, :]
    columns = word_ids[:, None] * 16 + lanes
    places = columns % GROUP_SIZE
    group_ids = row * row_groups + columns // GROUP_SIZE
    # Every lane makes its group's Philox call itself. That is wasteful, but a weight is initialised once.
    w0, w1, w2, w3 = philox_words(
        group_ids, places // 16, step.to(tl.uint32, bitcast=True), tensor_id, seed_low, seed_high
    )
    value = word_bytes(w0, w1, w2, w3, places)
    trits = tl.where(value >= HIGH_BYTE, 1, 0) - tl.where(value < LOW_BYTE, 1, 0)
    trits = tl.where(columns < num_columns, trits, 0)
    words = tl.xor_sum((trits & 3) << (2 * lanes), axis=1)
    tl.store(words_ptr + row * row_words + word_ids, words, mask=word_ids < row_words)


def scales_of(levels: Tensor, mantissa_bits: int) -> Tensor:
    """Launch `group_scales`; returns float32 in the shape of the int8 levels."""
    runs_here(levels)
    flat = levels.contiguous()
    scales = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    if flat.numel():
        grid = (triton.cdiv(flat.numel(), BLOCK),)
        _group_scales_kernel[grid](flat, scales, flat.numel(), MANTISSA_BITS=mantissa_bits, BLOCK=BLOCK)
    return scales


def dense_rows(
    weight: DeviceWeight,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    *,
    num_groups: int = 1,
    row_multiple: int = 1,
) -> Tensor:
    """Launch `dequantize`; returns `dtype` [N, K], or [R, K] for int64 rows [R].

    A stack of `num_groups` matrices comes side by side, [N / num_groups, num_groups K]. Rows of zeros follow, to a multiple of
    `row_multiple`.
    """
    runs_here(weight.words)
    num_columns = weight.shape[1]
    num_slots = weight.shape[0] if rows is None else rows.shape[0]
    matrix_rows, out_columns = num_slots // num_groups, num_groups * num_columns
    out_rows = triton.cdiv(matrix_rows, row_multiple) * row_multiple
    out = torch.empty(out_rows, out_columns, dtype=dtype, device=weight.device)
    if out_rows > matrix_rows:
        out[matrix_rows:].zero_()
    if num_slots:
        block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
        # Narrow rows share a program.
        tile_rows = max(1, BLOCK_COLUMNS // block)
        _dequantize_kernel[row_grid(triton.cdiv(num_slots, tile_rows), row_blocks)](
            weight.words if rows is None else rows.contiguous(), weight.words, weight.exponents, out,
            num_slots, num_columns, weight.exponents.shape[1], weight.words.shape[1], row_blocks, matrix_rows, out_columns,
            HAS_ROWS=rows is not None, GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits,
            ROWS=tile_rows, BLOCK=block,
        )  # fmt: skip
    return out


def initial_words(
    shape: tuple[int, int],
    row_groups: int,
    group_size: int,
    seed: int,
    tensor_id: int,
    device: torch.device | str,
) -> Tensor:
    """Launch the random trits of `initial_weight`; returns device words int32 [N, KW]."""
    clock = Clock.of(seed, RESERVED_STEP, tensor_id, torch.device(device), last_step=RESERVED_STEP)
    num_rows, num_columns = shape
    words = torch.empty(num_rows, words_per_row(num_columns), dtype=torch.int32, device=device)
    runs_here(words)
    block, row_blocks = row_tile(words.shape[1], BLOCK_WORDS)
    _initial_words_kernel[row_grid(num_rows, row_blocks)](
        words, num_columns, row_groups, words.shape[1], row_blocks,
        clock.seed_low, clock.seed_high, clock.step, clock.tensor_id, GROUP_SIZE=group_size, BLOCK=block,
    )  # fmt: skip
    return words
