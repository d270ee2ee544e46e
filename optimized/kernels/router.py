"""Router kernels: the choice of experts in two launches for routers of a usual size, and the pieces of it for others.

Scores are whole numbers, so that every way to add them up gives the same. For few vectors one launch has a program for each score,
and another one takes the largest. For more of them one launch splits the weight into digits of 7 bits. In the other one tensor
cores multiply the digits with the vectors in int8, and the largest scores are taken. For larger routers the operands are made in
float64, and the library multiplies.
Legend: E experts, K columns, M vectors; KW words a row, KG groups a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.codebook_rows import query_values
from arbitor.optimized.kernels.common import lane_trits, lane_weights, level_scales
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import (
    HANDICAP_MAX,
    HANDICAP_MOVE,
    HANDICAP_STEPS,
    QUERY_STEPS,
    ROUTER_OCTAVES,
)

OCTAVES = tl.constexpr(ROUTER_OCTAVES)

STEP_SCORE = QUERY_STEPS / HANDICAP_STEPS
"""Units of a score that one step of a handicap takes, a power of two."""

STEP = tl.constexpr(STEP_SCORE)

BLOCK_COLUMNS = 1024
BLOCK_VALUES = 1024

MOVE, MOST_HANDICAP = tl.constexpr(HANDICAP_MOVE), tl.constexpr(HANDICAP_MAX)

BLOCK_CHOSEN = 4096
"""Choices that are counted at a time."""

FEW_VECTORS = 1024
"""Most vectors that take the smallest tile, of which there are more."""

BLOCK_SCORES = 1024
"""Most scores of a vector for a program that chooses. A vector with more is sorted by the library."""

TILE_SCORES = 128
"""Scores of a program that chooses, if it has more than one vector."""

SINGLE_VECTORS = 16
"""Most vectors whose scores have a program each. An H200 took 9.5 us for the smallest tile of 32 experts and 512 columns, and 45
for 3,072 columns, since a program takes one step after the other."""

SINGLE_WEIGHTS = 2**20
"""Most weights of a router for that. Each program looks for the largest of their levels."""

FUSED_EXPERTS, FUSED_COLUMNS = 128, 4096
"""Largest router that is multiplied by digits. Each program reads all of them."""

DIGIT_BITS = tl.constexpr(7)
"""Bits of a digit of a weight, whose sign is kept apart. Three digits hold 2 mantissa bits, a leading bit and 16 octaves."""

DIGIT = tl.constexpr(2**7 - 1)
"""Largest digit."""


@triton.jit
def largest_level(levels_ptr, num_levels, BLOCK: tl.constexpr):
    """Return the largest of some int8 levels, as int32."""
    largest = tl.full([BLOCK], -128, tl.int32)
    for start in range(0, num_levels, BLOCK):
        places = start + tl.arange(0, BLOCK)
        levels = tl.load(levels_ptr + places, mask=places < num_levels, other=-128).to(tl.int32)
        largest = tl.maximum(largest, levels)
    return tl.max(largest, axis=0)


@triton.jit
def best_of_scores(
    scores, experts, top_k, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Return int32 [BLOCK_M, BLOCK_E], 1 for the experts of the `top_k` largest finite scores, of equal ones the lowest."""
    low = float("-inf")
    chosen = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.int32)
    for _ in range(top_k):
        open_scores = tl.where((chosen == 0) & (experts < EXPERTS), scores, low)
        is_best = open_scores == tl.max(open_scores, axis=1)[:, None]
        best = tl.min(tl.where(is_best, experts, BLOCK_E), axis=1)
        chosen += (experts == best[:, None]).to(tl.int32)
    return chosen


@triton.jit
def whole_weights(
    words_ptr, levels_ptr, row, columns, mask, least, num_columns, row_groups, row_words,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr,
):  # fmt: skip
    """Return the trits of a row and their sizes in units of `lowest_unit`, both int32, for levels of at least `least`."""
    words = tl.load(words_ptr + row * row_words + columns // 16, mask=mask, other=0)
    levels = tl.load(levels_ptr + row * row_groups + columns // GROUP_SIZE, mask=mask, other=0).to(tl.int32)
    levels = tl.maximum(levels, least)
    whole = (levels & ((1 << MANTISSA_BITS) - 1)) + (1 << MANTISSA_BITS)
    return lane_trits(words, columns % 16), whole << ((levels >> MANTISSA_BITS) - (least >> MANTISSA_BITS))


@triton.jit
def lowest_unit(least, MANTISSA_BITS: tl.constexpr):
    """Return the unit of all weights as float32: the last mantissa bit at the exponent of the least level."""
    return (((least >> MANTISSA_BITS) - MANTISSA_BITS + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_vectors", "row_groups", "row_words"])
def _router_scores_kernel(
    x_ptr, words_ptr, levels_ptr, out_ptr, num_vectors, num_columns, row_groups, row_words, num_levels,
    EXPERTS: tl.constexpr, GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_LEVELS: tl.constexpr,
):  # fmt: skip
    expert, vector = tl.program_id(0) // num_vectors, (tl.program_id(0) % num_vectors).to(tl.int64)
    least = largest_level(levels_ptr, num_levels, BLOCK_LEVELS) - (OCTAVES << MANTISSA_BITS)
    sums = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        trits, sizes = whole_weights(
            words_ptr, levels_ptr, expert, columns, mask, least, num_columns, row_groups, row_words, GROUP_SIZE, MANTISSA_BITS
        )  # fmt: skip
        steps = query_values(tl.load(x_ptr + vector * num_columns + columns, mask=mask, other=0.0))
        sums += (trits * steps.to(tl.int32)).to(tl.int64) * sizes
    # Both factors and the product are exact.
    score = tl.sum(sums, axis=0).to(tl.float64) * lowest_unit(least, MANTISSA_BITS).to(tl.float64)
    tl.store(out_ptr + vector * EXPERTS + expert, score)


@triton.jit(do_not_specialize=["row_groups", "row_words", "row_blocks", "plane"])
def _router_digits_kernel(
    words_ptr, levels_ptr, digits_ptr, unit_ptr, num_columns, row_groups, row_words, row_blocks, num_levels, plane,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LEVELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // row_blocks
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    least = largest_level(levels_ptr, num_levels, BLOCK_LEVELS) - (OCTAVES << MANTISSA_BITS)
    trits, size = whole_weights(
        words_ptr, levels_ptr, row, columns, mask, least, num_columns, row_groups, row_words, GROUP_SIZE, MANTISSA_BITS
    )  # fmt: skip
    out_ptr = digits_ptr + row * num_columns + columns
    tl.store(out_ptr, (trits * (size & DIGIT)).to(tl.int8), mask=mask)
    tl.store(out_ptr + plane, (trits * ((size >> DIGIT_BITS) & DIGIT)).to(tl.int8), mask=mask)
    tl.store(out_ptr + 2 * plane, (trits * (size >> (2 * DIGIT_BITS))).to(tl.int8), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(unit_ptr, lowest_unit(least, MANTISSA_BITS))


@triton.jit(do_not_specialize=["num_vectors", "top_k", "plane"])
def _choose_kernel(
    x_ptr, digits_ptr, unit_ptr, handicap_ptr, out_ptr, num_vectors, top_k, num_columns, plane,
    HANDICAP: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    vectors = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.arange(0, BLOCK_E)
    low = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.int32)
    middle = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.int32)
    high = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.int32)
    for start in range(0, num_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < num_columns
        x_mask = (vectors < num_vectors)[:, None] & inside[None, :]
        x = tl.load(x_ptr + vectors[:, None] * num_columns + columns[None, :], mask=x_mask, other=0.0)
        steps = query_values(x).to(tl.int8)
        # Columns come first, so that no operand is turned around.
        digit_ptr = digits_ptr + rows[None, :] * num_columns + columns[:, None]
        mask = (rows < EXPERTS)[None, :] & inside[:, None]
        low = tl.dot(steps, tl.load(digit_ptr, mask=mask, other=0), low, out_dtype=tl.int32)
        middle = tl.dot(steps, tl.load(digit_ptr + plane, mask=mask, other=0), middle, out_dtype=tl.int32)
        high = tl.dot(steps, tl.load(digit_ptr + 2 * plane, mask=mask, other=0), high, out_dtype=tl.int32)
    sums = low.to(tl.int64) + (middle.to(tl.int64) << DIGIT_BITS) + (high.to(tl.int64) << (2 * DIGIT_BITS))
    # Both factors and the product are exact.
    scores = sums.to(tl.float64) * tl.load(unit_ptr).to(tl.float64)
    experts = rows[None, :]
    if HANDICAP:
        handicap = tl.load(handicap_ptr + experts, mask=experts < EXPERTS, other=0)
        scores -= handicap.to(tl.float64) * STEP
    chosen = best_of_scores(scores, experts, top_k, EXPERTS, BLOCK_M, BLOCK_E)
    places = vectors[:, None] * top_k + tl.cumsum(chosen, axis=1) - 1
    mask = (vectors < num_vectors)[:, None] & (experts < EXPERTS) & (chosen > 0)
    tl.store(out_ptr + places, (experts + tl.zeros_like(chosen)).to(tl.int64), mask=mask)


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
    chosen = best_of_scores(scores, experts, top_k, EXPERTS, BLOCK_M, BLOCK_E)
    places = vectors[:, None] * top_k + tl.cumsum(chosen, axis=1) - 1
    tl.store(out_ptr + places, (experts + tl.zeros_like(chosen)).to(tl.int64), mask=mask & (chosen > 0))


@triton.jit(do_not_specialize=["num_chosen"])
def _balance_kernel(
    chosen_ptr, load_ptr, handicap_ptr, num_chosen,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BINS)
    mask = experts < EXPERTS
    counts = tl.zeros([BINS], dtype=tl.int64)
    for start in range(0, num_chosen, BLOCK):
        places = start + tl.arange(0, BLOCK)
        # What is no choice is counted behind the experts.
        chosen = tl.load(chosen_ptr + places, mask=places < num_chosen, other=-1).to(tl.int32)
        counts += tl.histogram(tl.where(chosen < 0, EXPERTS, chosen), BINS).to(tl.int64)
    counts = tl.where(mask, counts, 0)
    total = tl.sum(counts, axis=0)
    load = tl.load(load_ptr + experts, mask=mask, other=0)
    handicap = tl.load(handicap_ptr + experts, mask=mask, other=0)
    tl.store(load_ptr + experts, load + counts, mask=mask)
    surplus = MOVE * (EXPERTS * counts - total)
    # A division of whole numbers cuts towards 0.
    moves = tl.minimum(surplus // tl.maximum(total, 1), MOVE)
    moved = handicap.to(tl.int64) + moves
    least = tl.min(tl.where(mask, moved, 2**62), axis=0)
    evened = tl.minimum(moved - least, MOST_HANDICAP)
    tl.store(
        handicap_ptr + experts, tl.where(total > 0, evened, handicap.to(tl.int64)).to(tl.int16), mask=mask
    )


def balance(chosen: Tensor, load_E: Tensor, handicap_E: Tensor) -> None:
    """Launch `balance_experts` on contiguous tensors, in place."""
    runs_here(load_E)
    num_experts = load_E.numel()
    _balance_kernel[(1,)](
        chosen, load_E, handicap_E, chosen.numel(),
        EXPERTS=num_experts, BINS=triton.next_power_of_2(num_experts + 1), BLOCK=BLOCK_CHOSEN, num_warps=8,
    )  # fmt: skip


def chosen_rows(x_MK: Tensor, weight: DeviceWeight, top_k: int, handicap_E: Tensor | None = None) -> Tensor:
    """Return the experts that vectors choose, int64 [M, k], ascending, in two launches for a router that `is_fused`.

    x_MK:       float32 or bfloat16, contiguous
    handicap_E: int16 [E], taken off the scores
    """
    runs_here(x_MK)
    num_vectors, num_columns = x_MK.shape
    num_experts, num_groups = weight.exponents.shape
    out = torch.empty(num_vectors, top_k, dtype=torch.int64, device=x_MK.device)
    if not num_vectors:
        return out
    digits_3EK = torch.empty(3, num_experts, num_columns, dtype=torch.int8, device=x_MK.device)
    unit = torch.empty((), dtype=torch.float32, device=x_MK.device)
    plane = num_experts * num_columns
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    _router_digits_kernel[row_grid(num_experts, row_blocks)](
        weight.words, weight.exponents, digits_3EK, unit, num_columns, num_groups, weight.words.shape[1], row_blocks,
        weight.exponents.numel(), plane,
        GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK=block, BLOCK_LEVELS=BLOCK_VALUES,
    )  # fmt: skip
    block_m, block_k = (16, 128) if num_vectors <= FEW_VECTORS else (64, 64)
    _choose_kernel[row_grid(1, triton.cdiv(num_vectors, block_m))](
        x_MK, digits_3EK, unit, None if handicap_E is None else handicap_E.contiguous(), out,
        num_vectors, top_k, num_columns, plane,
        HANDICAP=handicap_E is not None, EXPERTS=num_experts,
        BLOCK_M=block_m, BLOCK_E=max(16, triton.next_power_of_2(num_experts)),
        BLOCK_K=max(32, min(block_k, triton.next_power_of_2(num_columns))),
    )  # fmt: skip
    return out


def has_program_each(x_MK: Tensor, weight: DeviceWeight) -> bool:
    """Return whether `single_scores` takes vectors: there are few, and the router is not large."""
    return 0 < x_MK.shape[0] <= SINGLE_VECTORS and math.prod(weight.shape) <= SINGLE_WEIGHTS


def single_scores(x_MK: Tensor, weight: DeviceWeight) -> Tensor:
    """Return the scores of few vectors, float32 or bfloat16, contiguous, without a handicap: float64 [M, E]."""
    runs_here(x_MK)
    num_vectors, num_columns = x_MK.shape
    num_experts, num_groups = weight.exponents.shape
    scores_ME = torch.empty(num_vectors, num_experts, dtype=torch.float64, device=x_MK.device)
    block, _ = row_tile(num_columns, BLOCK_COLUMNS)
    _router_scores_kernel[row_grid(num_experts, num_vectors)](
        x_MK, weight.words, weight.exponents, scores_ME, num_vectors, num_columns, num_groups, weight.words.shape[1],
        weight.exponents.numel(),
        EXPERTS=num_experts, GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK=block,
        BLOCK_LEVELS=BLOCK_VALUES,
    )  # fmt: skip
    return scores_ME


def is_fused(weight: DeviceWeight) -> bool:
    """Return whether a router is multiplied by digits. A sum of products of one digit stays below 2^26."""
    return weight.shape[0] <= FUSED_EXPERTS and weight.shape[1] <= FUSED_COLUMNS


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
        block_m = max(1, TILE_SCORES // block_e)
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
