"""Update kernels: counting votes, straight from a gradient where there is one, and moving trits and exponents.

Legend: N rows, K columns, KG groups a row, KW words a row, R rows named by an update.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import (
    clock_step,
    known_columns,
    lane_trits,
    philox_words,
    widen,
    word_bytes,
)
from arbitor.optimized.kernels.launch import (
    Clock,
    announce_written,
    column_step,
    row_grid,
    row_tile,
    runs_here,
    warps_of,
)
from arbitor.optimized.kernels.votes import (
    exponents_of_rows,
    gradient_votes,
    group_dither,
    group_tile,
    rate_argument,
    tile_of,
)
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import ACCUM_MAX, EXPONENT_MIN, NUM_EXPONENTS, SCORE_SHIFT, level_range
from arbitor.reference.types import has_memory

BLOCK_WORDS = 64
BLOCK_GROUPS = 1024

COUNTED_TILES = 16
"""Tiles of BLOCK_WORDS words of which a program counts what they hold, in turn."""

COUNTED_LEVELS, COUNTED_BLOCKS = 128, 32
"""Groups whose exponents a program counts at a time, and how many times it does."""


@triton.jit
def saturate(count):
    """Return an int32 count held at plus and minus 127, as int8."""
    return tl.minimum(tl.maximum(count, -127), 127).to(tl.int8)


@triton.jit(
    do_not_specialize=[
        "rate",
        "row_groups",
        "row_words",
        "row_blocks",
        "seed_low",
        "seed_high",
        "step",
        "tensor_id",
    ]
)
def _accumulate_kernel(
    source_ptr, row_exponents_ptr, rows_ptr, rate, words_ptr, trit_accum_ptr, exponent_accum_ptr,
    num_columns, row_groups, row_words, row_blocks, seed_low, seed_high, step, tensor_id,
    FROM_GRADIENT: tl.constexpr, HAS_ROWS: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr,
    EXPONENT_RULE: tl.constexpr, SHIFT: tl.constexpr, GROUP_SIZE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
    COLUMN_STEP: tl.constexpr, FIRST_ROW: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    slot = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = slot
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot)
        # A negative row is an unused slot.
        if row < 0:
            return
    groups, columns, mask = group_tile(tl.program_id(0) % row_blocks, num_columns, GROUP_SIZE, PLACES, BLOCK)
    group_ids = row * row_groups + groups
    # The groups of a part of a table are dithered as those of the table.
    dithered_ids = (row + FIRST_ROW) * row_groups + groups
    source = tl.load(source_ptr + slot * num_columns + columns, mask=mask, other=0)

    exponent_byte = tl.zeros([BLOCK], dtype=tl.int32)
    if FROM_GRADIENT:
        if RATE_ON_DEVICE:
            rate = tl.load(rate)
        row_exponent = tl.load(row_exponents_ptr + slot)
        place_bytes, exponent_byte = group_dither(
            dithered_ids, clock_step(step, STEP_ON_DEVICE), tensor_id, seed_low, seed_high, GROUP_SIZE, PLACES
        )
        votes = gradient_votes(widen(source), row_exponent, rate, place_bytes)
    else:
        votes = source.to(tl.int32)
        if EXPONENT_RULE == "score":
            w0, w1, w2, w3 = philox_words(
                dithered_ids, tl.full([BLOCK], GROUP_SIZE // 16, tl.int32), clock_step(step, STEP_ON_DEVICE),
                tensor_id, seed_low, seed_high,
            )  # fmt: skip
            exponent_byte = word_bytes(w0, w1, w2, w3, tl.full([BLOCK], GROUP_SIZE, tl.int32))
    votes = tl.where(mask, votes, 0)

    trit_count = trit_accum_ptr + row * num_columns + columns
    tl.store(trit_count, saturate(tl.load(trit_count, mask=mask, other=0).to(tl.int32) + votes), mask=mask)

    if EXPONENT_RULE != "frozen":
        words = tl.load(words_ptr + row * row_words + columns // 16, mask=mask, other=0)
        score = tl.sum(votes * lane_trits(words, columns % 16), axis=1)
        if EXPONENT_RULE == "score":
            vote = (score + (exponent_byte >> (8 - SHIFT))) >> SHIFT
        else:
            vote = tl.where(score > 0, 1, 0) - tl.where(score < 0, 1, 0)
        exponent_count = exponent_accum_ptr + group_ids
        inside = groups < row_groups
        count = tl.load(exponent_count, mask=inside, other=0).to(tl.int32)
        tl.store(exponent_count, saturate(count + vote), mask=inside)


@triton.jit
def full_count(count, theta):
    """Return +1 where an int32 count has reached theta, -1 where minus theta, else 0."""
    return tl.where(count >= theta, 1, 0) - tl.where(count <= -theta, 1, 0)


@triton.jit(do_not_specialize=["row_words", "row_blocks", "theta"])
def _step_trits_kernel(
    rows_ptr, words_ptr, trit_accum_ptr, num_columns, row_words, row_blocks, theta,
    HAS_ROWS: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + row)
        # A negative row is an unused slot.
        if row < 0:
            return
    word_ids = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, 16)[None, :]
    columns = word_ids[:, None] * 16 + lanes
    mask = columns < num_columns
    accum = trit_accum_ptr + row * num_columns + columns
    count = tl.load(accum, mask=mask, other=0).to(tl.int32)
    full = full_count(count, theta)
    kept = count - full * theta if CARRY else tl.where(full != 0, 0, count)
    tl.store(accum, kept.to(tl.int8), mask=mask)
    address = words_ptr + row * row_words + word_ids
    words = tl.load(address, mask=word_ids < row_words, other=0)
    trits = lane_trits(words[:, None], lanes) - full
    trits = tl.minimum(tl.maximum(trits, -1), 1)
    tl.store(address, tl.xor_sum((trits & 3) << (2 * lanes), axis=1), mask=word_ids < row_words)


@triton.jit(do_not_specialize=["row_groups", "row_blocks", "theta"])
def _step_exponents_kernel(
    rows_ptr, exponents_ptr, exponent_accum_ptr, row_groups, row_blocks, theta,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + row)
        # A negative row is an unused slot.
        if row < 0:
            return
    groups = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = groups < row_groups
    offsets = row * row_groups + groups
    count = tl.load(exponent_accum_ptr + offsets, mask=mask, other=0).to(tl.int32)
    full = full_count(count, theta)
    levels = tl.load(exponents_ptr + offsets, mask=mask, other=0).to(tl.int32) - full
    tl.store(exponents_ptr + offsets, tl.minimum(tl.maximum(levels, LOW), HIGH).to(tl.int8), mask=mask)
    tl.store(exponent_accum_ptr + offsets, (count - full * theta).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["num_words"])
def _count_changed_kernel(before_ptr, after_ptr, counts_ptr, num_words, BLOCK: tl.constexpr):
    word_ids = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = word_ids < num_words
    differ = tl.load(before_ptr + word_ids, mask=mask, other=0) ^ tl.load(
        after_ptr + word_ids, mask=mask, other=0
    )
    lanes = tl.arange(0, 16)[None, :]
    changed = (differ[:, None] >> (2 * lanes)) & 3
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.sum(tl.where(changed != 0, 1, 0), axis=1), axis=0))


@triton.jit(do_not_specialize=["num_rows", "theta", "row_words", "row_blocks"])
def _count_trits_kernel(
    words_ptr, trit_accum_ptr, counts_ptr, num_rows, num_columns, row_words, row_blocks, theta, FULL: tl.constexpr,
    HAS_ACCUM: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    # A tile has ROWS rows of BLOCK words each, one row after the other.
    tile = tl.arange(0, ROWS * BLOCK)
    word_ids = (tl.program_id(0) % row_blocks) * BLOCK + tile % BLOCK
    lanes = tl.arange(0, 16)[None, :]
    columns = word_ids[:, None] * 16 + lanes
    first = (tl.program_id(0) // row_blocks).to(tl.int64) * (TILES * ROWS)
    zeros = tl.zeros([ROWS * BLOCK], dtype=tl.int32)
    rail, full = zeros, zeros
    for number in range(TILES):
        rows = first + number * ROWS + tile // BLOCK
        inside = (rows < num_rows) & (word_ids < row_words)
        mask = inside[:, None] & (columns < num_columns)
        words = tl.load(words_ptr + rows * row_words + word_ids, mask=inside, other=0)
        trits = lane_trits(words[:, None], lanes)
        zeros += tl.sum((mask & (trits == 0)).to(tl.int32), axis=1)
        # Counts that another rank keeps read as 0.
        if HAS_ACCUM:
            count = tl.load(trit_accum_ptr + rows[:, None] * num_columns + columns, mask=mask, other=0).to(
                tl.int32
            )
            rail += tl.sum((2 * trits * count <= -theta).to(tl.int32), axis=1)
            full += tl.sum((tl.abs(count) == FULL).to(tl.int32), axis=1)
    counts_ptr += tl.program_id(0).to(tl.int64) * 3
    tl.store(counts_ptr, tl.sum(zeros, axis=0))
    tl.store(counts_ptr + 1, tl.sum(rail, axis=0))
    tl.store(counts_ptr + 2, tl.sum(full, axis=0))


@triton.jit(do_not_specialize=["num_levels"])
def _count_levels_kernel(
    levels_ptr, counts_ptr, num_levels, LOWEST: tl.constexpr, MANTISSA_BITS: tl.constexpr, NUM: tl.constexpr,
    NUM_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bins = tl.arange(0, NUM_BLOCK)
    counts = tl.zeros([NUM_BLOCK], dtype=tl.int32)
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    for block in range(BLOCKS):
        places = first + block * BLOCK + tl.arange(0, BLOCK)
        levels = tl.load(levels_ptr + places, mask=places < num_levels, other=0).to(tl.int32)
        exponents = tl.where(places < num_levels, (levels >> MANTISSA_BITS) - LOWEST, NUM_BLOCK)
        counts += tl.sum((exponents[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * NUM + bins, counts, mask=bins < NUM)


def count_votes_(
    weight: DeviceWeight,
    source: Tensor,
    rate: float | Tensor | None,
    clock: Clock,
    exponent_rule: str,
    rows: Tensor | None,
    faults: Tensor | None = None,
    *,
    first_row: int = 0,
) -> None:
    """Launch `accumulate` (rate None: `source` holds votes) or `accumulate_gradient`, in place.

    The kernel is compiled for each `first_row`, of which a process has few, so that a whole weight pays nothing for it.
    """
    runs_here(source)
    source = source.contiguous()
    from_gradient = rate is not None
    row_exponents = exponents_of_rows(source, faults) if from_gradient else weight.exponents
    groups = weight.exponents.shape[1]
    places, block, row_blocks = tile_of(weight.group_size, groups)
    num_slots = source.shape[0]
    if num_slots == 0:
        return
    _accumulate_kernel[row_grid(num_slots, row_blocks)](
        source, row_exponents, row_exponents if rows is None else rows.contiguous(), 0.0 if rate is None else rate_argument(rate),
        weight.words, weight.trit_accum, weight.exponent_accum,
        weight.shape[1], groups, weight.words.shape[1], row_blocks,
        clock.seed_low, clock.seed_high, clock.step, clock.tensor_id,
        FROM_GRADIENT=from_gradient, HAS_ROWS=rows is not None, RATE_ON_DEVICE=isinstance(rate, Tensor),
        STEP_ON_DEVICE=clock.step_on_device, EXPONENT_RULE=exponent_rule, SHIFT=SCORE_SHIFT,
        GROUP_SIZE=weight.group_size, PLACES=places, BLOCK=block, COLUMN_STEP=column_step(weight.shape[1]), FIRST_ROW=first_row,
        num_warps=warps_of(places * block),
    )  # fmt: skip


def step_(weight: DeviceWeight, theta: int, theta_e: int, carry: bool, rows: Tensor | None) -> None:
    """Launch `apply_step`, in place."""
    num_slots = weight.shape[0] if rows is None else rows.shape[0]
    if num_slots == 0:
        return
    step_exponents_(weight, theta_e, rows)
    row_ids, words = weight.words if rows is None else rows.contiguous(), weight.words.shape[1]
    block, row_blocks = row_tile(words, BLOCK_WORDS)
    _step_trits_kernel[row_grid(num_slots, row_blocks)](
        row_ids, weight.words, weight.trit_accum, weight.shape[1], words, row_blocks, theta,
        HAS_ROWS=rows is not None, CARRY=carry, BLOCK=block, COLUMN_STEP=column_step(weight.shape[1]),
        num_warps=warps_of(16 * block),
    )  # fmt: skip
    announce_written(weight.words, weight.exponents)


def step_exponents_(weight: DeviceWeight, theta_e: int, rows: Tensor | None) -> None:
    """Launch the part of `apply_step` that moves exponents, in place, for one row or more."""
    runs_here(weight.words)
    num_slots = weight.shape[0] if rows is None else rows.shape[0]
    row_ids = weight.words if rows is None else rows.contiguous()
    groups, (low, high) = weight.exponents.shape[1], level_range(weight.mantissa_bits)
    block, row_blocks = row_tile(groups, BLOCK_GROUPS)
    _step_exponents_kernel[row_grid(num_slots, row_blocks)](
        row_ids, weight.exponents, weight.exponent_accum, groups, row_blocks, theta_e,
        LOW=low, HIGH=high, HAS_ROWS=rows is not None, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip


def changed_trits(before: Tensor, after: Tensor) -> Tensor:
    """Launch `count_changed_trits` on device words; returns int64 []."""
    runs_here(before)
    blocks = triton.cdiv(before.numel(), BLOCK_WORDS)
    counts = torch.empty(blocks, dtype=torch.int32, device=before.device)
    _count_changed_kernel[(blocks,)](before, after, counts, before.numel(), BLOCK=BLOCK_WORDS)
    return counts.sum()


def state_counts(weight: DeviceWeight, theta: int) -> Tensor:
    """Launch `count_state`; returns int64 [3 + 48]. Accumulators that take no memory read as 0."""
    runs_here(weight.words)
    (num_rows, num_columns), words = weight.shape, weight.words.shape[1]
    block, row_blocks = row_tile(words, BLOCK_WORDS)
    # Narrow rows share a tile.
    rows, num_levels = BLOCK_WORDS // block, weight.exponents.numel()
    tiles = _turns(num_rows, rows, COUNTED_TILES)
    programs = triton.cdiv(num_rows, tiles * rows) * row_blocks
    trits = torch.empty(programs, 3, dtype=torch.int32, device=weight.words.device)
    blocks = _turns(num_levels, COUNTED_LEVELS, COUNTED_BLOCKS)
    level_programs = triton.cdiv(num_levels, blocks * COUNTED_LEVELS)
    levels = torch.empty(level_programs, NUM_EXPONENTS, dtype=torch.int32, device=weight.words.device)
    _count_trits_kernel[row_grid(programs, 1)](
        weight.words, weight.trit_accum, trits, num_rows, num_columns, words, row_blocks, theta, FULL=ACCUM_MAX,
        HAS_ACCUM=has_memory(weight.trit_accum), TILES=tiles, ROWS=rows, BLOCK=block,
        COLUMN_STEP=column_step(num_columns), num_warps=warps_of(16 * BLOCK_WORDS),
    )  # fmt: skip
    _count_levels_kernel[row_grid(level_programs, 1)](
        weight.exponents, levels, num_levels, LOWEST=EXPONENT_MIN, MANTISSA_BITS=weight.mantissa_bits,
        NUM=NUM_EXPONENTS, NUM_BLOCK=triton.next_power_of_2(NUM_EXPONENTS), BLOCKS=blocks, BLOCK=COUNTED_LEVELS,
    )  # fmt: skip
    return torch.cat([trits.sum(dim=0), levels.sum(dim=0)])


def _turns(size: int, block: int, most: int) -> int:
    """Return in how many turns a program counts blocks of elements: at most so many, and no more than there are."""
    return min(triton.next_power_of_2(triton.cdiv(size, block)), most)
