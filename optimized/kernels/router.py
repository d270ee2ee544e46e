"""Router kernels: the operands of the choice of experts, as float64, and the choice by scores. The library multiplies.

Legend: E experts, K columns, M vectors; KW words a row, KG groups a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.codebook_rows import query_values
from arbitor.optimized.kernels.common import lane_weights, level_scales
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import HANDICAP_STEPS, QUERY_STEPS, ROUTER_OCTAVES

OCTAVES = tl.constexpr(ROUTER_OCTAVES)

STEP_SCORE = QUERY_STEPS / HANDICAP_STEPS
"""Units of a score that one step of a handicap takes, a power of two."""

STEP = tl.constexpr(STEP_SCORE)

BLOCK_COLUMNS = 1024
BLOCK_VALUES = 1024

BLOCK_SCORES = 1024
"""Scores of a program that chooses. A vector with more is sorted by the library."""


@triton.jit(do_not_specialize=["row_groups", "row_words", "row_blocks"])
def _router_rows_kernel(
    words_ptr, levels_ptr, largest_ptr, out_ptr, num_columns, row_groups, row_words, row_blocks,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    words = tl.load(words_ptr + row * row_words + columns // 16, mask=mask, other=0)
    levels = tl.load(levels_ptr + row * row_groups + columns // GROUP_SIZE, mask=mask, other=0).to(tl.int32)
    levels = tl.maximum(levels, tl.load(largest_ptr).to(tl.int32) - (OCTAVES << MANTISSA_BITS))
    values = lane_weights(words, columns % 16, level_scales(levels, MANTISSA_BITS))
    tl.store(out_ptr + row * num_columns + columns, values.to(tl.float64), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _whole_sixteenths_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    steps = query_values(tl.load(x_ptr + places, mask=mask, other=0.0))
    tl.store(out_ptr + places, steps.to(tl.float64), mask=mask)


@triton.jit(do_not_specialize=["num_vectors", "top_k"])
def _best_rows_kernel(
    scores_ptr,
    handicap_ptr,
    out_ptr,
    num_vectors,
    top_k,
    HANDICAP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    vectors = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, BLOCK_E)[None, :]
    mask = (vectors < num_vectors)[:, None] & (experts < EXPERTS)
    low = float("-inf")
    scores = tl.load(scores_ptr + vectors[:, None] * EXPERTS + experts, mask=mask, other=low)
    if HANDICAP:
        handicap = tl.load(handicap_ptr + experts, mask=experts < EXPERTS, other=0)
        # The product is exact, so that one operation that does both rounds as two do.
        scores -= handicap.to(tl.float64) * STEP
    chosen = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.int32)
    for _ in range(top_k):
        open_scores = tl.where((chosen == 0) & (experts < EXPERTS), scores, low)
        is_best = open_scores == tl.max(open_scores, axis=1)[:, None]
        # Every score is finite. Of equal ones the lowest expert is taken.
        best = tl.min(tl.where(is_best, experts, BLOCK_E), axis=1)
        chosen += (experts == best[:, None]).to(tl.int32)
    places = vectors[:, None] * top_k + tl.cumsum(chosen, axis=1) - 1
    tl.store(out_ptr + places, (experts + tl.zeros_like(chosen)).to(tl.int64), mask=mask & (chosen > 0))


def best_rows(scores_ME: Tensor, top_k: int, handicap_E: Tensor | None = None) -> Tensor:
    """Return the experts of the largest of some finite scores, int64 [M, k], ascending; of equal scores the lowest expert's.

    A handicap, int16 [E], is taken off the scores first.
    """
    num_vectors, num_experts = scores_ME.shape
    if num_experts > BLOCK_SCORES:
        if handicap_E is not None:
            scores_ME = scores_ME - handicap_E.to(torch.float64) * STEP_SCORE
        order_ME = scores_ME.sort(dim=-1, descending=True, stable=True).indices
        return order_ME[:, :top_k].sort(dim=-1).values
    runs_here(scores_ME)
    out = torch.empty(num_vectors, top_k, dtype=torch.int64, device=scores_ME.device)
    if num_vectors:
        block_e = triton.next_power_of_2(num_experts)
        block_m = BLOCK_SCORES // block_e
        _best_rows_kernel[row_grid(1, triton.cdiv(num_vectors, block_m))](
            scores_ME.contiguous(),
            None if handicap_E is None else handicap_E.contiguous(),
            out,
            num_vectors,
            top_k,
            HANDICAP=handicap_E is not None,
            EXPERTS=num_experts,
            BLOCK_M=block_m,
            BLOCK_E=block_e,
        )
    return out


def router_rows(weight: DeviceWeight) -> Tensor:
    """Return the rows of a router's weight as the choice sees them, float64 [E, K]: levels at most 16 octaves apart."""
    runs_here(weight.words)
    num_rows, num_columns = weight.shape
    out = torch.empty(num_rows, num_columns, dtype=torch.float64, device=weight.device)
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    _router_rows_kernel[row_grid(num_rows, row_blocks)](
        weight.words, weight.exponents, weight.exponents.amax(), out,
        num_columns, weight.exponents.shape[1], weight.words.shape[1], row_blocks,
        GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK=block,
    )  # fmt: skip
    return out


def whole_sixteenths(x_MK: Tensor) -> Tensor:
    """Return vectors in whole sixteenths, half to even, within plus and minus 127, as float64 [M, K]."""
    runs_here(x_MK)
    x_MK = x_MK.contiguous()
    out = torch.empty(x_MK.shape, dtype=torch.float64, device=x_MK.device)
    if x_MK.numel():
        grid = row_grid(1, triton.cdiv(x_MK.numel(), BLOCK_VALUES))
        _whole_sixteenths_kernel[grid](x_MK, out, x_MK.numel(), BLOCK=BLOCK_VALUES)
    return out
