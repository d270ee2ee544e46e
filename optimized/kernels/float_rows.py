"""The product of a few float32 rows with a packed weight, which is unpacked on the way: each weight is read once, in its two bits.

Legend: N outputs, K inputs, M rows of x; KW words a row, KG groups a row.

A program adds up some outputs of one row of x. A thread makes the sixteen weights of a word and multiplies them where they are. No
sum is cut between programs, so the bits of a row do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.kernels.tiles import run_of, scale_bits, span_of, weight_tile, word_levels
from arbitor.optimized.layouts import DeviceWeight

TILE = 4096
"""Weights of a tile: 32 for each of 128 threads."""

PROGRAMS = 512
"""Programs that a launch has at least, unless the weight has fewer rows."""

MOST_OUTPUTS = 4
"""Most outputs of a program."""


@triton.jit(do_not_specialize=["num_outputs", "num_x", "row_words", "row_groups"])
def _float_rows_kernel(
    x_ptr, words_ptr, exponents_ptr, y_ptr, num_x, num_outputs, num_inputs, row_words, row_groups,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, SPAN: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same rows of the weight.
    x_row = (tl.program_id(0) % num_x).to(tl.int64)
    outputs = (tl.program_id(0) // num_x).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # An output past the last is read as the last, and is not stored.
    rows = tl.minimum(outputs, num_outputs - 1)[:, None]
    words_row_ptr, levels_row_ptr = words_ptr + rows * row_words, exponents_ptr + rows * row_groups
    inputs = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        word = start // 16 + tl.arange(0, BLOCK_K // 16)[None, :]
        level = word * 16 // GROUP_SIZE
        words = tl.load(words_row_ptr + word, mask=word < row_words, other=0)
        l0, l1, l2, l3 = word_levels(levels_row_ptr, level, row_groups, SPAN)
        s0, s1 = scale_bits(l0, MANTISSA_BITS), scale_bits(l1, MANTISSA_BITS)
        s2, s3 = scale_bits(l2, MANTISSA_BITS), scale_bits(l3, MANTISSA_BITS)
        offsets = word * 16 - level * GROUP_SIZE
        w = weight_tile(words, s0, s1, s2, s3, offsets, BLOCK_N, BLOCK_K, GROUP_SIZE, RUN, tl.bfloat16)
        x = tl.load(x_ptr + x_row * num_inputs + start + inputs, mask=start + inputs < num_inputs, other=0.0)
        sums += widen(w) * x[None, :]
    y_row_ptr = y_ptr + x_row * num_outputs
    tl.store(y_row_ptr + outputs, tl.sum(sums, axis=1), mask=outputs < num_outputs)


def float_rows_product(x_MK: Tensor, weight: DeviceWeight) -> Tensor:
    """Return x W^T, float32 [M, N], of contiguous float32 rows [M, K]."""
    runs_here(x_MK)
    (num_x, num_inputs), num_outputs = x_MK.shape, weight.shape[0]
    block_n = min(MOST_OUTPUTS, triton.next_power_of_2(max(num_outputs // PROGRAMS, 1)))
    block_k = max(32, row_tile(num_inputs, TILE // block_n)[0])
    y_MN = torch.empty(num_x, num_outputs, dtype=torch.float32, device=x_MK.device)
    _float_rows_kernel[row_grid(num_x, triton.cdiv(num_outputs, block_n))](
        x_MK, weight.words, weight.exponents, y_MN,
        num_x, num_outputs, num_inputs, weight.words.shape[1], weight.exponents.shape[1],
        GROUP_SIZE=weight.group_size, RUN=run_of(weight.group_size), SPAN=span_of(weight.group_size),
        MANTISSA_BITS=weight.mantissa_bits, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return y_MN
