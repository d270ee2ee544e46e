"""Edge kernels: sums over neighbours and their gradients, and the heavy-hitter rule on the rows of a batch.

Legend: N nodes, D width, R rows, J slots of a row, M pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import announce_written, row_grid, row_tile, runs_here
from arbitor.optimized.kernels.segments import segment_sums
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import MAX_NEIGHBOURS, SCORE_MAX

BLOCK_COLUMNS = 512
BLOCK_SIGN_COLUMNS = 256

PAIR_BITS = 31
"""Bits of the target in the integer of a pair. The source stands above them, so that sorting brings equal pairs together."""

NO_PAIR = 1 << 62
"""The integer of a pair that does not count. It is above the integers of all other pairs."""

SHORT_NODES = 1 << 15
"""Smallest number of nodes that does not fit an int16."""

TARGET_BITS, TARGET_MASK = tl.constexpr(PAIR_BITS), tl.constexpr((1 << PAIR_BITS) - 1)
LEFT_OUT, MOST = tl.constexpr(NO_PAIR), tl.constexpr(SCORE_MAX)
SLOTS = tl.constexpr(MAX_NEIGHBOURS)


@triton.jit(do_not_specialize=["num_slots", "row_blocks"])
def _edge_sum_kernel(
    h_ptr, neighbours_ptr, signs_ptr, out_ptr, num_columns, num_slots, row_blocks,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < num_columns
    sums = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, num_slots, BLOCK_J):
        # The loop is unrolled, so that the loads of all slots are on their way at once.
        for place in tl.static_range(BLOCK_J):
            slot = start + place
            node = tl.load(neighbours_ptr + row * num_slots + slot, mask=slot < num_slots, other=-1)
            node = node.to(tl.int64)
            sign = widen(tl.load(signs_ptr + row * num_slots + slot, mask=node >= 0, other=0.0))
            # An empty slot reads nothing.
            width = tl.where(node >= 0, num_columns, 0)
            h = tl.load(h_ptr + node * num_columns + columns, mask=columns < width, other=0.0)
            sums += sign * widen(h)
    out = out_ptr + row * num_columns + columns
    tl.store(out, narrow(sums, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_slots", "row_blocks"])
def _edge_sum_sign_grad_kernel(
    grad_ptr, h_ptr, neighbours_ptr, out_ptr, num_columns, num_slots, row_blocks,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    slots = (tl.program_id(0) % row_blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    nodes = tl.load(neighbours_ptr + row * num_slots + slots, mask=slots < num_slots, other=-1).to(tl.int64)
    used = nodes >= 0
    dots = tl.zeros([BLOCK_J, BLOCK_K], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < num_columns
        grad = widen(tl.load(grad_ptr + row * num_columns + columns, mask=inside, other=0.0))
        mask = used[:, None] & inside[None, :]
        h = widen(tl.load(h_ptr + nodes[:, None] * num_columns + columns[None, :], mask=mask, other=0.0))
        dots += tl.where(mask, grad[None, :] * h, 0.0)
    tl.store(out_ptr + row * num_slots + slots, tl.sum(dots, axis=1), mask=slots < num_slots)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])
def _update_neighbours_kernel(
    pairs_ptr, ends_ptr, neighbours_ptr, scores_ptr, words_ptr, trit_accum_ptr, num_pairs, num_slots
):
    place = tl.program_id(0).to(tl.int64)
    pair = tl.load(pairs_ptr + place)
    source = pair >> TARGET_BITS
    before = tl.load(pairs_ptr + place - 1, mask=place > 0, other=-1)
    # Where the pair before has the same source, another program walks the pairs of that source.
    if (pair == LEFT_OUT) | ((before >> TARGET_BITS) == source):
        return
    slots = tl.arange(0, SLOTS)
    inside = slots < num_slots
    held = tl.load(neighbours_ptr + source * num_slots + slots, mask=inside, other=-1)
    # A score above all others keeps slots past the last one out of every choice below.
    scores = tl.load(scores_ptr + source * num_slots + slots, mask=inside, other=0).to(tl.int32)
    scores = tl.where(inside, scores, 2 * MOST + 1)
    taken = tl.zeros([SLOTS], dtype=tl.int32)
    while (pair >> TARGET_BITS) == source:
        target = (pair & TARGET_MASK).to(tl.int32)
        end = tl.load(ends_ptr + place)
        # A higher count changes no score.
        count = tl.minimum(end - place, 2 * MOST).to(tl.int32)
        holder = tl.min(tl.where((held == target) & inside, slots, SLOTS), axis=0)
        is_held = holder < SLOTS
        loss = tl.where(is_held, 0, tl.maximum(tl.minimum(count, tl.min(scores, axis=0)), 0))
        scores -= tl.where(inside, loss, 0)
        count -= loss
        free = tl.min(tl.where(scores <= 0, slots, SLOTS), axis=0)
        new = slots == tl.where(is_held | (count == 0), SLOTS, free)
        raised = tl.minimum(tl.where(new, 0, scores) + count, MOST)
        scores = tl.where(new | (slots == holder), raised, scores)
        held = tl.where(new, target, held)
        taken = tl.where(new, 1, taken)
        place = end
        pair = tl.load(pairs_ptr + place, mask=place < num_pairs, other=-1)
    tl.store(neighbours_ptr + source * num_slots + slots, held, mask=inside)
    tl.store(scores_ptr + source * num_slots + slots, scores.to(tl.int8), mask=inside)
    fresh = taken != 0
    tl.store(trit_accum_ptr + source * num_slots + slots, tl.zeros([SLOTS], dtype=tl.int8), mask=fresh)
    cleared = tl.xor_sum(tl.where(fresh, 3 << (2 * slots), 0), axis=0)
    ones = tl.xor_sum(tl.where(fresh, 1 << (2 * slots), 0), axis=0)
    word = tl.load(words_ptr + source)
    tl.store(words_ptr + source, (word & ~cleared) | ones)


def gather_sums(h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor) -> Tensor:
    """Launch `edge_sum`."""
    runs_here(h_ND)
    (num_rows, num_slots), num_columns = neighbours_RJ.shape, h_ND.shape[1]
    sums_RD = torch.empty(num_rows, num_columns, dtype=h_ND.dtype, device=h_ND.device)
    if num_rows:
        block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
        _edge_sum_kernel[row_grid(num_rows, row_blocks)](
            h_ND.contiguous(), neighbours_RJ.contiguous(), signs_RJ.contiguous(), sums_RD,
            num_columns, num_slots, row_blocks, BLOCK_J=min(num_slots, MAX_NEIGHBOURS), BLOCK_K=block,
        )  # fmt: skip
    return sums_RD


def node_grads(grad_RD: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor, num_nodes: int) -> Tensor:
    """Launch `edge_sum_input_grad`. Edges are sorted by their node, and the edges of a node are a segment."""
    runs_here(grad_RD)
    num_columns, device = grad_RD.shape[1], grad_RD.device
    if neighbours_RJ.numel() == 0:
        return torch.zeros(num_nodes, num_columns, dtype=grad_RD.dtype, device=device)
    # A sort takes longer for wider keys, so the keys are just wide enough for the number of nodes, the last of the bounds.
    of_keys = torch.int16 if num_nodes < SHORT_NODES else torch.int32
    keys, order = torch.sort(neighbours_RJ.reshape(-1).to(of_keys), stable=True)
    nodes = torch.arange(num_nodes + 1, dtype=of_keys, device=device)
    # Empty slots come before the first node.
    starts = torch.searchsorted(keys, nodes)
    return segment_sums(grad_RD, keys, order, starts, grad_RD.dtype, signs_RJ.contiguous())


def sign_grads(grad_RD: Tensor, h_ND: Tensor, neighbours_RJ: Tensor) -> Tensor:
    """Launch `edge_sum_sign_grad`."""
    runs_here(h_ND)
    num_rows, num_slots = neighbours_RJ.shape
    grads_RJ = torch.empty(num_rows, num_slots, dtype=torch.float32, device=h_ND.device)
    if num_rows:
        slots, row_blocks = row_tile(num_slots, MAX_NEIGHBOURS)
        block, _ = row_tile(h_ND.shape[1], BLOCK_SIGN_COLUMNS)
        _edge_sum_sign_grad_kernel[row_grid(num_rows, row_blocks)](
            grad_RD.contiguous(), h_ND.contiguous(), neighbours_RJ.contiguous(), grads_RJ,
            h_ND.shape[1], num_slots, row_blocks, BLOCK_J=slots, BLOCK_K=block,
        )  # fmt: skip
    return grads_RJ


def update_(
    neighbours_NJ: Tensor,
    scores_NJ: Tensor,
    signs: DeviceWeight,
    sources_M: Tensor,
    targets_M: Tensor,
    allow_loops: bool,
) -> None:
    """Launch `update_neighbours` in place. A pair has a program, and the program of a source's first pair walks all its pairs."""
    runs_here(neighbours_NJ)
    num_pairs = sources_M.numel()
    if num_pairs == 0:
        return
    counts = (sources_M >= 0) & (targets_M >= 0)
    if not allow_loops:
        counts = counts & (sources_M != targets_M)
    pairs = torch.where(counts, (sources_M << PAIR_BITS) | targets_M, NO_PAIR).sort().values
    ends = torch.searchsorted(pairs, pairs, right=True)
    _update_neighbours_kernel[row_grid(num_pairs, 1)](
        pairs, ends, neighbours_NJ, scores_NJ, signs.words, signs.trit_accum,
        num_pairs, neighbours_NJ.shape[1], num_warps=1,
    )  # fmt: skip
    announce_written(neighbours_NJ, scores_NJ, signs.words)
