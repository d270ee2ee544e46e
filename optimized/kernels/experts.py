"""The gradients of stacked matrices: a product for each expert, of the slots that chose it.

Legend: E experts, N outputs of an expert, K inputs, M slots, S parts of a sum. Products with the matrices are in products.py.

Text chooses some experts ten times as often as others, and a program that sums over all slots of such a one is what a launch waits
for. So where the matrices are too small to occupy a GPU, an expert's slots are cut into parts of one length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import widen
from arbitor.optimized.kernels.launch import row_grid, runs_here
from arbitor.optimized.kernels.products import Plan, add_parts, multiplies_wide, tile_width

PROGRAMS = 1056
"""Programs up to which an expert's slots are cut into parts: eight for each multiprocessor of an H100 or H200."""

PART_SLOTS = 128
"""Slots that a part has at least, on average."""


@triton.jit(do_not_specialize=["num_groups", "row_blocks", "column_blocks", "num_parts"])
def _grouped_weight_grad_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, starts_ptr, num_outputs, num_inputs,
    num_groups, row_blocks, column_blocks, num_parts,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // num_parts // column_blocks
    group, part = tile // row_blocks, tl.program_id(0) % num_parts
    outputs = (tile % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = (tl.program_id(0) // num_parts % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
    part_slots = tl.cdiv(tl.cdiv(end - begin, num_parts), BLOCK_M) * BLOCK_M
    begin += part * part_slots
    end = tl.minimum(begin + part_slots, end)
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        used = places < end
        slots = tl.load(order_ptr + places, mask=used, other=0)
        grad_mask = used[:, None] & (outputs < num_outputs)[None, :]
        grad = tl.load(grad_ptr + slots[:, None] * num_outputs + outputs[None, :], mask=grad_mask, other=0.0)
        x_mask = used[:, None] & (inputs < num_inputs)[None, :]
        x = tl.load(x_ptr + slots[:, None] * num_inputs + inputs[None, :], mask=x_mask, other=0.0)
        if WIDE:
            sums += tl.dot(tl.trans(widen(grad)), widen(x), input_precision="ieee")
        else:
            sums = tl.dot(tl.trans(grad), x, sums)
    rows = (part * num_groups + group).to(tl.int64) * num_outputs + outputs
    mask = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    tl.store(out_ptr + rows[:, None] * num_inputs + inputs[None, :], sums, mask=mask)


def weight_grad(grad_MN: Tensor, x_MK: Tensor, plan: Plan, num_groups: int) -> Tensor:
    """Launch `grouped_linear_weight_grad`; returns float32 [E N, K]."""
    runs_here(grad_MN)
    (num_slots, num_outputs), num_inputs, wide = grad_MN.shape, x_MK.shape[1], multiplies_wide(x_MK)
    block_n, block_k = (tile_width(size, 64 if wide else 128) for size in (num_outputs, num_inputs))
    row_blocks, column_blocks = triton.cdiv(num_outputs, block_n), triton.cdiv(num_inputs, block_k)
    num_parts = parts_of(num_slots, num_groups, num_groups * row_blocks * column_blocks)
    parts = torch.empty(
        num_parts, num_groups * num_outputs, num_inputs, dtype=torch.float32, device=x_MK.device
    )
    _grouped_weight_grad_kernel[row_grid(num_groups * row_blocks, column_blocks * num_parts)](
        grad_MN, x_MK, parts, plan.order, plan.starts, num_outputs, num_inputs,
        num_groups, row_blocks, column_blocks, num_parts,
        WIDE=wide, BLOCK_M=64 if num_parts > 1 else 32, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return parts[0] if num_parts == 1 else add_parts(parts, torch.empty_like(parts[0]))


def parts_of(num_slots: int, num_groups: int, programs: int) -> int:
    """Return in how many parts to cut the slots of an expert, for matrices that so many programs make."""
    return max(1, min(PROGRAMS // programs, num_slots // (num_groups * PART_SLOTS)))
