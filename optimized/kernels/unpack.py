"""Kernel that unpacks several weights in one launch. A table on the device says where each lies, and where its floats go.

Legend: N rows, K columns, KW words a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_weights, level_scales
from arbitor.optimized.kernels.launch import row_grid, runs_here
from arbitor.optimized.kernels.together import place_of_program, table_of, tensor_at
from arbitor.optimized.layouts import DeviceWeight, words_per_row

BLOCK_WORDS = 128
"""Words of a program."""

EIGHT = 8
"""Columns of bfloat16 that are stored at once, where every row has a multiple of them."""

APART = 256
"""Number that divides the places of matrices in their buffer, so that each begins where memory of its own could begin."""


@triton.jit(do_not_specialize=["num_weights"])
def _unpack_together_kernel(
    table_ptr, out_ptr, words_like, levels_like, num_weights,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, IN_EIGHTS: tl.constexpr, IS_ALIGNED: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    number, block = place_of_program(table_ptr, num_weights, WEIGHT_BLOCK)
    row_ptr = table_ptr + number * 8
    words_ptr = tensor_at(row_ptr, 0, words_like, IS_ALIGNED)
    exponents_ptr = tensor_at(row_ptr, 1, levels_like, IS_ALIGNED)
    # The buffer is so small that places in it have 32 bits.
    offset = tl.multiple_of(tl.load(row_ptr + 2).to(tl.int32), 256)
    num_columns = tl.load(row_ptr + 3).to(tl.int32)
    if IN_EIGHTS:
        num_columns = tl.multiple_of(num_columns, 8)
    matrix_rows, out_rows = tl.load(row_ptr + 4).to(tl.int32), tl.load(row_ptr + 5).to(tl.int32)
    num_groups = tl.load(row_ptr + 6).to(tl.int32)
    row_words = (num_columns + 15) // 16
    row_groups = (num_columns + GROUP_SIZE - 1) // GROUP_SIZE

    word_ids = block * WORDS + tl.arange(0, WORDS)
    # The rows of the first matrix of a stack, and of zeros after it, then those of the next one.
    slots = word_ids // row_words
    words_before = word_ids - slots * row_words
    matrices = slots // out_rows
    rows = slots - matrices * out_rows
    inside = matrices < num_groups
    has_weights = inside & (rows < matrix_rows)
    sources = matrices * matrix_rows + rows
    lanes = tl.arange(0, 16)[None, :]
    columns = words_before[:, None] * 16 + lanes
    mask = columns < num_columns
    words = tl.load(words_ptr + sources * row_words + words_before, mask=has_weights, other=0)
    levels = tl.load(
        exponents_ptr + (sources * row_groups)[:, None] + columns // GROUP_SIZE,
        mask=has_weights[:, None] & mask, other=0,
    )  # fmt: skip
    values = lane_weights(words[:, None], lanes, level_scales(levels, MANTISSA_BITS))
    # Matrices of a stack stand side by side.
    places = offset + ((rows * num_groups + matrices) * num_columns)[:, None] + columns
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask)


def unpacked_together(
    weights: Sequence[DeviceWeight], num_groups: Sequence[int], dtype: torch.dtype, *, row_multiple: int
) -> dict[int, Tensor]:
    """Unpack weights of one device, each as `dense_rows` does, into one buffer.

    There is a launch for each format of weights.

    Args:
        weights: of fewer than 2**31 elements together, with their rows of zeros: a place in the buffer is a number of 32 bits.
        num_groups: how many matrices stand side by side, of each weight.
        dtype: float32 or bfloat16.
        row_multiple: as `dense_rows` takes it.

    Returns:
        Matrices by the places of their weights. Those of a format whose table a recording does not find are missing.
    """
    kinds: dict[tuple[int, int], list[int]] = {}
    for place, weight in enumerate(weights):
        runs_here(weight.words)
        kinds.setdefault((weight.group_size, weight.mantissa_bits), []).append(place)
    made: dict[int, Tensor] = {}
    for places in kinds.values():
        of_kind = [weights[place] for place in places]
        matrices = _unpacked(of_kind, [num_groups[place] for place in places], dtype, row_multiple)
        made.update(zip(places, matrices, strict=False))
    return made


def _unpacked(
    weights: Sequence[DeviceWeight], num_groups: Sequence[int], dtype: torch.dtype, row_multiple: int
) -> list[Tensor]:
    """Return the matrices of weights of one format; none of them if a recording does not find the table."""
    shapes, rows, size, end = [], [], 0, 0
    for weight, count in zip(weights, num_groups, strict=True):
        num_columns, matrix_rows = weight.shape[1], weight.shape[0] // count
        out_rows = triton.cdiv(matrix_rows, row_multiple) * row_multiple
        end += triton.cdiv(count * out_rows * words_per_row(num_columns), BLOCK_WORDS)
        addresses = weight.words.data_ptr(), weight.exponents.data_ptr()
        rows.append([*addresses, size, num_columns, matrix_rows, out_rows, count, end])
        shapes.append((size, (out_rows, count * num_columns)))
        size += triton.cdiv(math.prod(shapes[-1][1]), APART) * APART
    first = weights[0]
    table = table_of(rows, first.device)
    if table is None:
        return []
    buffer = torch.empty(size, dtype=dtype, device=first.device)
    _unpack_together_kernel[row_grid(1, end)](
        table.tensor, buffer, first.words, first.exponents, len(weights),
        GROUP_SIZE=first.group_size, MANTISSA_BITS=first.mantissa_bits,
        IN_EIGHTS=all(weight.shape[1] % EIGHT == 0 for weight in weights), IS_ALIGNED=table.is_aligned(2),
        WEIGHT_BLOCK=triton.next_power_of_2(len(weights)), WORDS=BLOCK_WORDS,
    )  # fmt: skip
    return [buffer[start : start + math.prod(shape)].view(shape) for start, shape in shapes]
