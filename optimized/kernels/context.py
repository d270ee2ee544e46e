"""The kernel of `visible_slots`: integers that some five hundred launches of torch would make.

Legend: B batch, Q queries, S slots.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.launch import row_grid, runs_here
from arbitor.reference.constants import CONTEXT_CHILDREN, CONTEXT_LEVELS

LEVELS, CHILDREN = tl.constexpr(CONTEXT_LEVELS), tl.constexpr(CONTEXT_CHILDREN)
assert CONTEXT_CHILDREN == 4, "a level's blocks are shifted by two bits"

BLOCK_QUERIES, BLOCK_SLOTS = 16, 128


@triton.jit
def start_of(positions, span, UNIT: tl.constexpr):
    """Return the last multiple of UNIT that lies `span` or more before int64 positions; 0 where there is none."""
    # A negative number is divided towards 0, or below it. Both become 0.
    return tl.maximum((positions - span) // UNIT, 0) * UNIT


@triton.jit
def next_start_of(start, UNIT: tl.constexpr, SUMMARIES: tl.constexpr):
    """Return the start of the next level, whose blocks have four times UNIT positions, for int64 starts of a level."""
    return start_of(start, SUMMARIES * UNIT, CHILDREN * UNIT)


@triton.jit
def blocks_of(num_queries, UNIT: tl.constexpr, SUMMARIES: tl.constexpr):
    """Return the slots of a level, whose blocks have UNIT positions."""
    return SUMMARIES + CHILDREN - 1 + (num_queries + (UNIT - 2)) // UNIT


@triton.jit
def log_place(positions, SIZE: tl.constexpr):
    """Return the places of int64 positions in a log whose smallest blocks have SIZE positions."""
    places = positions
    for level in tl.static_range(LEVELS):
        places += positions // (SIZE << (2 * level))
    return places


@triton.jit
def weight_of(level, w0, w1, w2, w3, w4, w5, w6, w7):
    """Return the weight of a level, a number that is known when the kernel is compiled."""
    low = tl.where(level == 0, w0, tl.where(level == 1, w1, tl.where(level == 2, w2, w3)))
    return tl.where(
        level < 4, low, tl.where(level == 4, w4, tl.where(level == 5, w5, tl.where(level == 6, w6, w7)))
    )


@triton.jit(do_not_specialize=["num_queries", "num_slots", "slot_blocks"])
def _visible_slots_kernel(
    first_ptr, places_ptr, bias_ptr, own_ptr, num_queries, num_slots, slot_blocks, w0, w1, w2, w3, w4, w5, w6, w7,
    WINDOW: tl.constexpr, SIZE: tl.constexpr, SUMMARIES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence, tile = (tl.program_id(0) // slot_blocks).to(tl.int64), tl.program_id(0) % slot_blocks
    slots = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    queries = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = queries < num_queries
    first = tl.load(first_ptr + sequence)
    final, last = first + num_queries - 1, first + queries
    oldest, newest = start_of(first, WINDOW - 1, SIZE), start_of(final, WINDOW - 1, SIZE)
    start = start_of(last, WINDOW - 1, SIZE)
    # First the positions.
    offset = WINDOW + SIZE + num_queries - 2
    position = oldest + slots
    inside = slots < offset
    places = tl.where(inside & (position <= final), log_place(position, SIZE), 0)
    sees = (position[None, :] >= start[:, None]) & (position[None, :] <= last[:, None])
    bias = tl.where(inside[None, :] & sees, 0.0, float("-inf"))
    for level in tl.static_range(LEVELS):
        next_oldest = next_start_of(oldest, SIZE << (2 * level), SUMMARIES)
        next_newest = next_start_of(newest, SIZE << (2 * level), SUMMARIES)
        next_start = next_start_of(start, SIZE << (2 * level), SUMMARIES)
        number = blocks_of(num_queries, SIZE << (2 * level), SUMMARIES)
        of_level = slots - offset
        inside = (of_level >= 0) & (of_level < number)
        begin = next_oldest + of_level.to(tl.int64) * (SIZE << (2 * level))
        place = log_place(begin + ((SIZE << (2 * level)) - 1), SIZE) + 1 + level
        places = tl.where(inside, tl.where(begin < newest, place, 0), places)
        sees = (begin[None, :] >= next_start[:, None]) & (begin[None, :] < start[:, None])
        bias = tl.where(inside[None, :] & sees, weight_of(level, w0, w1, w2, w3, w4, w5, w6, w7), bias)
        oldest, newest, start = next_oldest, next_newest, next_start
        offset += number
    is_slot = slots < num_slots
    if tl.program_id(1) == 0:
        tl.store(places_ptr + sequence * num_slots + slots, places, mask=is_slot)
    rows = sequence * num_queries + queries
    tl.store(
        bias_ptr + rows[:, None] * num_slots + slots[None, :], bias, mask=is_query[:, None] & is_slot[None, :]
    )
    if tile == 0:
        tl.store(own_ptr + rows, log_place(last, SIZE), mask=is_query)


def slots_seen(
    first_B: Tensor, num_queries: int, window: int, block: int, num_summaries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `visible_slots`."""
    runs_here(first_B)
    sizes = [block * CONTEXT_CHILDREN**level for level in range(CONTEXT_LEVELS)]
    blocks = (num_summaries + CONTEXT_CHILDREN - 1 + triton.cdiv(num_queries - 1, size) for size in sizes)
    num_slots, batch = window + block + num_queries - 2 + sum(blocks), first_B.numel()
    device = first_B.device
    places_BS = torch.empty(batch, num_slots, dtype=torch.int64, device=device)
    bias_BQS = torch.empty(batch, num_queries, num_slots, dtype=torch.float32, device=device)
    own_BQ = torch.empty(batch, num_queries, dtype=torch.int64, device=device)
    if batch:
        slot_blocks, query_blocks = (
            triton.cdiv(num_slots, BLOCK_SLOTS),
            triton.cdiv(num_queries, BLOCK_QUERIES),
        )
        row_grid(batch, slot_blocks)
        _visible_slots_kernel[(batch * slot_blocks, query_blocks)](
            first_B.contiguous(), places_BS, bias_BQS, own_BQ, num_queries, num_slots, slot_blocks,
            *(math.log(size) for size in sizes),
            WINDOW=window, SIZE=block, SUMMARIES=num_summaries, BLOCK_Q=BLOCK_QUERIES, BLOCK_S=BLOCK_SLOTS,
        )  # fmt: skip
    return places_BS, bias_BQS, own_BQ
