"""Slots by expert: which slots each expert has, sorted on the device without waiting for it.

Legend: E experts, M slots, S blocks of slots, K columns of a row.

A slot counts how many slots of its expert come before it: those of earlier blocks, which a sum over all blocks gives, and those of
its own block. Its place is that count after the slots of all experts before its own. So the order is that of a stable sort, in two
launches around one sum, where a sort of bytes takes several launches more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import known_columns
from arbitor.optimized.kernels.launch import column_step, row_grid, row_tile, runs_here

COUNTED_GROUPS = 63
"""Most experts whose slots are counted. A program compares each of its slots with every expert, so more experts are sorted."""

BLOCK_SLOTS = 64
"""Slots of a block, each of which a program compares with every expert."""


GATHERED_SLOTS, GATHERED_COLUMNS = 16, 256
"""Slots and columns of a tile of rows that are brought in order."""


@triton.jit
def block_members(
    experts_ptr, block, num_slots, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the slots of a block, the mask of slots that there are, and int32 [GROUP_BLOCK, BLOCK], 1 where a slot has a group.

    Unused slots are in group GROUPS, behind the experts.
    """
    slots = block * BLOCK + tl.arange(0, BLOCK)
    mask = slots < num_slots
    experts = tl.load(experts_ptr + slots, mask=mask, other=0).to(tl.int32)
    groups = tl.where(experts < 0, GROUPS, experts)
    members = (tl.arange(0, GROUP_BLOCK)[:, None] == groups[None, :]) & mask[None, :]
    return slots, mask, members.to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _count_slots_kernel(
    experts_ptr, counts_ptr, num_slots, num_blocks,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _, _, members = block_members(experts_ptr, block, num_slots, GROUPS, GROUP_BLOCK, BLOCK)
    groups = tl.arange(0, GROUP_BLOCK)
    # The count before the first is 0, so that sums up to a place are sums of what comes before the next.
    tl.store(counts_ptr + 1 + groups * num_blocks + block, tl.sum(members, axis=1), mask=groups <= GROUPS)
    if block == 0:
        tl.store(counts_ptr, 0)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _place_slots_kernel(
    experts_ptr, before_ptr, order_ptr, starts_ptr, num_slots, num_blocks,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slots, mask, members = block_members(experts_ptr, block, num_slots, GROUPS, GROUP_BLOCK, BLOCK)
    groups = tl.arange(0, GROUP_BLOCK)
    before = tl.load(before_ptr + groups * num_blocks + block, mask=groups <= GROUPS, other=0).to(tl.int32)
    ranks = tl.cumsum(members, axis=1) - 1 + before[:, None]
    places = tl.sum(tl.where(members > 0, ranks, 0), axis=0)
    tl.store(order_ptr + places, slots.to(tl.int64), mask=mask)
    if block == 0:
        starts = tl.load(before_ptr + groups * num_blocks, mask=groups <= GROUPS, other=0)
        tl.store(starts_ptr + groups, starts.to(tl.int64), mask=groups <= GROUPS)
        tl.store(starts_ptr + GROUPS + 1, num_slots.to(tl.int64))


@dataclass(frozen=True)
class Plan:
    """Slots by expert, on the device.

    order:  int64 [M], slots in ascending order of their expert, unused slots last.
    starts: int64 [E + 2], where the slots of each expert begin in `order`, then where the unused slots begin, then the end.
    """

    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, experts_M: Tensor, num_groups: int) -> Plan:
        """Return the plan of slots. Their order is stable, so sums run in an order that depends on the slots alone."""
        if num_groups > COUNTED_GROUPS or experts_M.numel() == 0:
            return cls._sorted(experts_M, num_groups)
        runs_here(experts_M)
        num_slots, device = experts_M.numel(), experts_M.device
        num_blocks = triton.cdiv(num_slots, BLOCK_SLOTS)
        counts = torch.empty((num_groups + 1) * num_blocks + 1, dtype=torch.int32, device=device)
        order = torch.empty(num_slots, dtype=torch.int64, device=device)
        starts = torch.empty(num_groups + 2, dtype=torch.int64, device=device)
        sizes = {
            "GROUPS": num_groups,
            "GROUP_BLOCK": triton.next_power_of_2(num_groups + 1),
            "BLOCK": BLOCK_SLOTS,
        }
        _count_slots_kernel[(num_blocks,)](experts_M, counts, num_slots, num_blocks, **sizes)
        before = counts.cumsum(0, dtype=torch.int32)
        _place_slots_kernel[(num_blocks,)](experts_M, before, order, starts, num_slots, num_blocks, **sizes)
        return cls(order, starts)

    @classmethod
    def _sorted(cls, experts_M: Tensor, num_groups: int) -> Plan:
        """Return the plan of slots of any number of experts."""
        # A sort takes a pass for each byte of a key.
        few = num_groups + 1 <= torch.iinfo(torch.uint8).max
        dtype = torch.uint8 if few else torch.int32
        sorted_M, order = torch.sort(torch.where(experts_M < 0, num_groups, experts_M).to(dtype), stable=True)
        bounds = torch.arange(num_groups + 2, dtype=dtype, device=experts_M.device)
        return cls(order, torch.searchsorted(sorted_M, bounds))

    def ends_with_zeros(self, num_groups: int) -> Tensor:
        """Return where the rows of each expert end in `rows_by_expert`, int32 [E]."""
        zeros = torch.arange(1, num_groups + 1, device=self.starts.device)
        return (self.starts[1 : num_groups + 1] + zeros).to(torch.int32)

    def tile_ends(self, block: int) -> Tensor:
        """Return where the tiles of `block` slots of each expert end, int32 [E + 1], and last where those of unused slots end."""
        tiles = (self.starts.diff() + (block - 1)) // block
        return tiles.cumsum(0, dtype=torch.int32)


@triton.jit(do_not_specialize=["num_places", "num_groups", "column_blocks"])
def _gather_rows_kernel(
    rows_ptr, out_ptr, order_ptr, starts_ptr, num_columns, row_stride, num_places, num_groups, column_blocks,
    ROW_SLOTS: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMN_STEP: tl.constexpr, STRIDE_STEP: tl.constexpr,
):  # fmt: skip
    num_columns, row_stride = known_columns(num_columns, COLUMN_STEP), known_columns(row_stride, STRIDE_STEP)
    places = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    groups = tl.arange(0, GROUP_BLOCK)
    # The places of each group end behind a row of zeros for it and for each group before it.
    ends = tl.load(starts_ptr + 1 + groups, mask=groups < num_groups, other=0) + groups + 1
    is_before = (ends[None, :] <= places[:, None]) & (groups < num_groups)[None, :]
    group = tl.sum(is_before.to(tl.int32), axis=1)
    # Behind the last group nobody reads.
    inside = (places < num_places) & (group < num_groups)
    sorted_places = places - group
    is_slot = inside & (sorted_places < tl.load(starts_ptr + 1 + group, mask=inside, other=0))
    slots = tl.load(order_ptr + sorted_places, mask=is_slot, other=0)
    columns_mask = (columns < num_columns)[None, :]
    row_ptr = rows_ptr + (slots // ROW_SLOTS)[:, None] * row_stride
    values = tl.load(row_ptr + columns[None, :], mask=is_slot[:, None] & columns_mask, other=0.0)
    out_row_ptr = out_ptr + places.to(tl.int64)[:, None] * num_columns
    tl.store(out_row_ptr + columns[None, :], values, mask=inside[:, None] & columns_mask)


def rows_by_expert(rows: Tensor, plan: Plan, num_groups: int, row_slots: int = 1) -> Tensor:
    """Return the rows of slots in the order of a plan, with a row of zeros behind those of each expert, [M + E + 1, K].

    Where rows end, by expert, says `Plan.ends_with_zeros`. What stands behind the last end is not written.

    rows:      what slots read; rows may lie apart, but none of their elements
    row_slots: neighbouring slots that read one row
    """
    runs_here(rows)
    num_places, num_columns = plan.order.numel() + num_groups, rows.shape[1]
    block_k, column_blocks = row_tile(num_columns, GATHERED_COLUMNS)
    # One place more than can be used, since torch asks for a last end before the length.
    made = torch.empty(num_places + 1, num_columns, dtype=rows.dtype, device=rows.device)
    _gather_rows_kernel[row_grid(triton.cdiv(num_places, GATHERED_SLOTS), column_blocks)](
        rows, made, plan.order, plan.starts, num_columns, rows.stride(0), num_places, num_groups, column_blocks,
        ROW_SLOTS=row_slots, GROUP_BLOCK=triton.next_power_of_2(num_groups),
        BLOCK_M=GATHERED_SLOTS, BLOCK_K=block_k,
        COLUMN_STEP=column_step(num_columns), STRIDE_STEP=column_step(rows.stride(0)),
    )  # fmt: skip
    return made


@triton.jit
def group_of_part(part_ends_ptr, part, num_groups, GROUP_BLOCK: tl.constexpr):
    """Return the group that a part belongs to, and the part's place in it; `num_groups` for a part past the last."""
    groups = tl.arange(0, GROUP_BLOCK)
    ends = tl.load(part_ends_ptr + groups, mask=groups < num_groups, other=2147483647)
    return place_among(ends, part)


@triton.jit
def group_of_tile(starts_ptr, tile, num_groups, GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Return the group that a tile of BLOCK slots belongs to, and the tile's place in it; `num_groups` for a tile past the last."""
    groups = tl.arange(0, GROUP_BLOCK)
    inside = groups < num_groups
    starts = tl.load(starts_ptr + groups, mask=inside, other=0)
    ends = tl.load(starts_ptr + groups + 1, mask=inside, other=0)
    tiles = ((ends - starts + (BLOCK - 1)) // BLOCK).to(tl.int32)
    return place_among(tl.where(inside, tl.cumsum(tiles, axis=0), 2147483647), tile)


@triton.jit
def place_among(ends, index):
    """Return the group that an index belongs to, by where the indices of each group end, and its place in the group."""
    # Indices of a group follow each other, so they count from the end of the group before.
    return tl.sum((ends <= index).to(tl.int32), axis=0), index - tl.max(
        tl.where(ends <= index, ends, 0), axis=0
    )
