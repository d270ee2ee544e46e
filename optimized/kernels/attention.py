"""Attention kernels: one position of a sequence against slots that all heads share.

Each program takes some heads and a part of the slots (`parts`) and writes the softmax of that part. A second kernel adds the parts
in their order, so that every launch gives the same bits. A slot is loaded once for all heads of a tile, as key and as value.
Legend: B batch, H heads, S slots, L latent columns (the values), R rotary columns, J parts of the slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here


@dataclass(frozen=True)
class Tile:
    """What a program takes.

    Fields:
        heads: that share the loads of a slot.
        slots: of a step.
        num_warps, num_stages: of a program.
    """

    heads: int
    slots: int
    num_warps: int
    num_stages: int


FEW_HEADS, MANY_HEADS = Tile(16, 32, 4, 2), Tile(32, 32, 4, 2)
"""Tiles for few heads, and for at least twice as many. Of 64 heads together the sums would take more registers than there are."""

PART_SLOTS, LATER_PART_SLOTS = 128, 512
"""Slots of a part: of the first parts, and of those that follow NEAR_SLOTS.

Where a part lies follows from the place of its slots alone, so that a sequence gives the same bits whatever else is in the batch. A
short sequence has many parts, which occupy a GPU. A long one has few, since each writes a sum for every head.
"""
NEAR_SLOTS = 1024
BLOCK_COLUMNS = 128


@triton.jit
def shares_dot(shares, values, sums, NATIVE: tl.constexpr):
    """Return sums + shares @ values in float32.

    With NATIVE the values are bfloat16, and each share is the sum of two bfloat16 numbers, which keep 16 of its 24 bits. The result
    is rounded to 8.
    """
    if NATIVE:
        high = shares.to(tl.bfloat16)
        low = (shares - high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(low, values, sums)
        sums = tl.dot(high, values, sums)
    else:
        sums = tl.dot(shares, values, sums, input_precision="ieee")
    return sums


@triton.jit
def slots_dot(queries, slots, NATIVE: tl.constexpr):
    """Return queries @ slots^T in float32; products of bfloat16 numbers are exact there."""
    if NATIVE:
        dots = tl.dot(queries, tl.trans(slots))
    else:
        dots = tl.dot(queries, tl.trans(slots), input_precision="ieee")
    return dots


@triton.jit
def operand(values, NATIVE: tl.constexpr):
    """Return an operand of a product: bfloat16 as it is, or float32."""
    if NATIVE:
        return values
    else:
        return widen(values)


@triton.jit(do_not_specialize=["num_heads", "num_slots", "head_blocks", "num_parts"])
def _decode_attention_kernel(
    q_ptr, keys_ptr, bias_ptr, places_ptr, sums_ptr, tops_ptr, totals_ptr, sequence_stride, row_stride,
    num_heads, num_slots, head_blocks, num_parts, num_latent, num_rotary, scale,
    PART: tl.constexpr, NEAR: tl.constexpr, LATER_PART: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, HAS_ROTARY: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # The later parts are the longer ones. They start first.
    part = num_parts - 1 - tl.program_id(0) % num_parts
    sequence = (tl.program_id(0) // num_parts // head_blocks).to(tl.int64)
    heads = (tl.program_id(0) // num_parts % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    num_columns = num_latent + num_rotary
    latents, rotaries = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    is_head, is_latent, is_rotary = heads < num_heads, latents < num_latent, rotaries < num_rotary

    q_rows = (sequence * num_heads + heads)[:, None] * num_columns
    q_latent = tl.load(
        q_ptr + q_rows + latents[None, :], mask=is_head[:, None] & is_latent[None, :], other=0.0
    )
    q_latent = operand(q_latent, NATIVE)
    if HAS_ROTARY:
        # The mask has a name of its own, because a loop may not change the shape of an earlier variable.
        q_mask = is_head[:, None] & is_rotary[None, :]
        q_rotary = tl.load(q_ptr + q_rows + num_latent + rotaries[None, :], mask=q_mask, other=0.0)
        q_rotary = operand(q_rotary, NATIVE)

    top = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    sums = tl.zeros([BLOCK_H, BLOCK_L], dtype=tl.float32)
    begin, end = part * PART, part * PART + PART
    if part >= NEAR // PART:
        begin = NEAR + (part - NEAR // PART) * LATER_PART
        end = begin + LATER_PART
    for start in range(begin, tl.minimum(end, num_slots), BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        bias = tl.load(bias_ptr + sequence * num_slots + slots, mask=slots < num_slots, other=float("-inf"))
        visible = bias > float("-inf")
        rows = slots.to(tl.int64)
        if places_ptr is not None:
            rows = tl.load(places_ptr + sequence * num_slots + slots, mask=visible, other=0)
        rows = (sequence * sequence_stride + rows * row_stride)[:, None]
        mask = visible[:, None] & is_latent[None, :]
        latent = operand(tl.load(keys_ptr + rows + latents[None, :], mask=mask, other=0.0), NATIVE)
        scores = slots_dot(q_latent, latent, NATIVE)
        if HAS_ROTARY:
            mask = visible[:, None] & is_rotary[None, :]
            rotary = tl.load(keys_ptr + rows + num_latent + rotaries[None, :], mask=mask, other=0.0)
            scores += slots_dot(q_rotary, operand(rotary, NATIVE), NATIVE)
        scores = tl.where(visible[None, :], scores * scale + bias[None, :], float("-inf"))
        # Until a slot is visible, all scores and their largest are -inf. Then 0 is subtracted.
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(shares, axis=1)
        sums = shares_dot(shares, latent, sums * shrink[:, None], NATIVE)
        top = higher

    places = (sequence * num_heads + heads) * num_parts + part
    tl.store(tops_ptr + places, top, mask=is_head)
    tl.store(totals_ptr + places, total, mask=is_head)
    mask = is_head[:, None] & is_latent[None, :]
    tl.store(sums_ptr + places[:, None] * num_latent + latents[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["num_parts", "row_blocks"])
def _decode_attention_combine_kernel(
    sums_ptr, tops_ptr, totals_ptr, y_ptr, num_parts, num_latent, row_blocks, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_latent
    top = tl.load(tops_ptr + row * num_parts)
    for part in range(1, num_parts):
        top = tl.maximum(top, tl.load(tops_ptr + row * num_parts + part))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = base - base
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, num_parts):
        place = row * num_parts + part
        weight = tl.exp(tl.load(tops_ptr + place) - base)
        total += weight * tl.load(totals_ptr + place)
        sums += weight * tl.load(sums_ptr + place * num_latent + columns, mask=mask, other=0.0)
    y = tl.where(total > 0.0, sums / tl.where(total > 0.0, total, 1.0), 0.0)
    # A NaN in a visible slot stays one.
    y = tl.where(total == total, y, total)
    tl.store(y_ptr + row * num_latent + columns, narrow(y, y_ptr.dtype.element_ty), mask=mask)


def tile_of(num_heads: int) -> Tile:
    """Return the tile for so many heads."""
    return MANY_HEADS if num_heads >= MANY_HEADS.heads else FEW_HEADS


def parts_of_slots(num_slots: int) -> int:
    """Return how many parts the slots of a sequence have."""
    near, later = min(num_slots, NEAR_SLOTS), max(num_slots - NEAR_SLOTS, 0)
    return triton.cdiv(near, PART_SLOTS) + triton.cdiv(later, LATER_PART_SLOTS)


def attended(
    q_BHK: Tensor,
    keys_BSK: Tensor,
    bias_BS: Tensor,
    num_latent: int,
    scale: float,
    places_BS: Tensor | None = None,
) -> Tensor:
    """Launch `decode_attention` on checked arguments. Rows of keys may lie apart in memory."""
    runs_here(q_BHK)
    batch, num_heads, num_columns = q_BHK.shape
    num_slots, num_rotary = bias_BS.shape[1], num_columns - num_latent
    keys_BSK = keys_BSK if keys_BSK.stride(-1) == 1 else keys_BSK.contiguous()
    shape = (batch, num_heads, num_latent)
    if not (batch and num_heads and num_slots):
        return torch.zeros(shape, dtype=q_BHK.dtype, device=q_BHK.device)
    y_BHL = torch.empty(shape, dtype=q_BHK.dtype, device=q_BHK.device)
    tile, num_parts = tile_of(num_heads), parts_of_slots(num_slots)
    head_blocks = triton.cdiv(num_heads, tile.heads)
    sums = torch.empty(batch, num_heads, num_parts, num_latent, dtype=torch.float32, device=q_BHK.device)
    tops = torch.empty(batch, num_heads, num_parts, dtype=torch.float32, device=q_BHK.device)
    totals = torch.empty(batch, num_heads, num_parts, dtype=torch.float32, device=q_BHK.device)
    _decode_attention_kernel[row_grid(batch * head_blocks, num_parts)](
        q_BHK.contiguous(),
        keys_BSK,
        bias_BS.contiguous(),
        None if places_BS is None else places_BS.contiguous(),
        sums,
        tops,
        totals,
        *keys_BSK.stride()[:2],
        num_heads,
        num_slots,
        head_blocks,
        num_parts,
        num_latent,
        num_rotary,
        scale,
        PART=PART_SLOTS,
        NEAR=NEAR_SLOTS,
        LATER_PART=LATER_PART_SLOTS,
        BLOCK_H=tile.heads,
        BLOCK_S=tile.slots,
        BLOCK_L=max(16, triton.next_power_of_2(num_latent)),
        BLOCK_R=max(16, triton.next_power_of_2(max(num_rotary, 1))),
        HAS_ROTARY=num_rotary > 0,
        # The interpreter's products of bfloat16 are wrong.
        NATIVE=q_BHK.dtype == torch.bfloat16 and q_BHK.device.type == "cuda",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    block, row_blocks = row_tile(num_latent, BLOCK_COLUMNS)
    _decode_attention_combine_kernel[row_grid(batch * num_heads, row_blocks)](
        sums, tops, totals, y_BHL, num_parts, num_latent, row_blocks, BLOCK=block
    )
    return y_BHL
