"""Changed bytes of a piece: how many there are in each block, their places and values, and what they make of the piece before.

`arbitor.optimized.distributed.changes` has the order of the bytes, and does the same by torch where there is no GPU.
Legend: P bytes of a piece, S blocks of `block` bytes, C changed bytes.
A tile is ROWS blocks by LANES, the power of two that holds a block. Bytes address in 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.launch import row_grid, warps_of

ROWS = 8
"""Blocks of a tile."""


@triton.jit
def _tile(num_bytes, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return the blocks of a program [ROWS], their bytes [ROWS, LANES], and which of these there are."""
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)[None, :]
    places = blocks[:, None] * BLOCK + lanes
    return blocks, lanes, places, (lanes < BLOCK) & (places < num_bytes)


@triton.jit
def _differ(before_ptr, after_ptr, places, inside):
    """Return 1 where a byte of a tile has changed, else 0, int32."""
    before = tl.load(before_ptr + places, mask=inside, other=0)
    return (before != tl.load(after_ptr + places, mask=inside, other=0)).to(tl.int32)


@triton.jit(do_not_specialize=["num_bytes", "num_blocks"])
def _count_changes_kernel(
    before_ptr, after_ptr, counts_ptr, num_bytes, num_blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    blocks, _, places, inside = _tile(num_bytes, BLOCK, ROWS, LANES)
    counts = tl.sum(_differ(before_ptr, after_ptr, places, inside), axis=1)
    tl.store(counts_ptr + blocks, counts, mask=blocks < num_blocks)


@triton.jit(do_not_specialize=["num_bytes", "num_blocks"])
def _write_changes_kernel(
    before_ptr, after_ptr, ends_ptr, sent_ptr, num_bytes, num_blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    num_changed = tl.load(ends_ptr + num_blocks - 1)
    # The piece is sent as it is.
    if num_blocks + 2 * num_changed >= num_bytes:
        return
    blocks, lanes, places, inside = _tile(num_bytes, BLOCK, ROWS, LANES)
    differ = _differ(before_ptr, after_ptr, places, inside)
    counts = tl.sum(differ, axis=1)
    there = blocks < num_blocks
    tl.store(sent_ptr + blocks, counts.to(tl.uint8), mask=there)
    firsts = tl.load(ends_ptr + blocks, mask=there, other=0) - counts
    ranks = firsts[:, None] + tl.cumsum(differ, axis=1) - 1
    changed_ptr = sent_ptr + num_blocks + ranks
    tl.store(changed_ptr, tl.broadcast_to(lanes, [ROWS, LANES]).to(tl.uint8), mask=differ != 0)
    after = tl.load(after_ptr + places, mask=differ != 0, other=0)
    tl.store(changed_ptr + num_changed, after, mask=differ != 0)


@triton.jit(do_not_specialize=["num_blocks", "num_changed"])
def _take_changes_kernel(
    piece_ptr, sent_ptr, ends_ptr, num_blocks, num_changed,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = blocks < num_blocks
    counts = tl.load(sent_ptr + blocks, mask=there, other=0).to(tl.int32)
    firsts = tl.load(ends_ptr + blocks, mask=there, other=0) - counts
    lanes = tl.arange(0, LANES)[None, :]
    used = lanes < counts[:, None]
    changed_ptr = sent_ptr + num_blocks + firsts[:, None] + lanes
    places = blocks[:, None] * BLOCK + tl.load(changed_ptr, mask=used, other=0)
    tl.store(piece_ptr + places, tl.load(changed_ptr + num_changed, mask=used, other=0), mask=used)


def _shape(block: int) -> dict[str, int]:
    """Return the tile of blocks of so many bytes."""
    lanes = triton.next_power_of_2(block)
    return {"BLOCK": block, "ROWS": ROWS, "LANES": lanes, "num_warps": warps_of(ROWS * lanes)}


def counted(before_P: Tensor, after_P: Tensor, num_blocks: int, block: int) -> Tensor:
    """Return how many bytes of each block differ, int32 [S]."""
    counts_S = torch.empty(num_blocks, dtype=torch.int32, device=before_P.device)
    _count_changes_kernel[row_grid(triton.cdiv(num_blocks, ROWS), 1)](
        before_P, after_P, counts_S, before_P.numel(), num_blocks, **_shape(block)
    )
    return counts_S


def written(before_P: Tensor, after_P: Tensor, ends_S: Tensor, block: int) -> Tensor:
    """Return counts [S], places [C] and values [C] at the beginning of uint8 [P], if they are fewer than P bytes; else anything.

    The device alone need know C. `ends_S` int64 are the sums of the counts up to each block.
    """
    num_blocks = ends_S.numel()
    sent = torch.empty_like(before_P)
    _write_changes_kernel[row_grid(triton.cdiv(num_blocks, ROWS), 1)](
        before_P, after_P, ends_S, sent, before_P.numel(), num_blocks, **_shape(block)
    )
    return sent


def taken(piece_P: Tensor, sent: Tensor, ends_S: Tensor, block: int) -> None:
    """Make a piece what it is after the changes that `written` returned, in place."""
    num_blocks = ends_S.numel()
    num_changed = (sent.numel() - num_blocks) // 2
    _take_changes_kernel[row_grid(triton.cdiv(num_blocks, ROWS), 1)](
        piece_P, sent, ends_S, num_blocks, num_changed, **_shape(block)
    )
