"""The gradients of stacked matrices: a product for each expert, of the slots that chose it.

Legend: E experts, N outputs of an expert, K inputs, M slots. Products with the matrices are in products.py.

Text chooses some experts ten times as often as others. A launch would wait for the program that sums over all slots of a frequent
expert. So the slots of small matrices, which take few programs, are cut into parts (`parts`). An expert's parts follow from its own
slots, so its gradient has the same bits whatever slots the other experts have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import known_columns, narrow, widen
from arbitor.optimized.kernels.launch import column_step, row_grid, runs_here
from arbitor.optimized.kernels.parts import add_group_parts
from arbitor.optimized.kernels.products import multiplies_wide, tile_width
from arbitor.optimized.kernels.slots import Plan, group_of_part

PART_SLOTS = 512
"""Slots of a part, at most."""

SMALL = 16
"""Tiles of a small matrix, at most."""


@triton.jit(do_not_specialize=["num_groups", "row_blocks", "column_blocks"])
def _grouped_weight_grad_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, starts_ptr, part_ends_ptr, num_outputs, num_inputs,
    num_groups, row_blocks, column_blocks,
    GRAD_SLOTS: tl.constexpr, X_SLOTS: tl.constexpr,
    PART: tl.constexpr, GROUP_BLOCK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUT_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_outputs, num_inputs = known_columns(num_outputs, OUTPUT_STEP), known_columns(num_inputs, COLUMN_STEP)
    tile = tl.program_id(0) // column_blocks
    # The matrix of an expert, or of a part of its slots.
    matrix = tile // row_blocks
    outputs = (tile % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    if PART > 0:
        group, part = group_of_part(part_ends_ptr, matrix, num_groups, GROUP_BLOCK)
        # There may be fewer parts than programs.
        if group >= num_groups:
            return
        begin = tl.load(starts_ptr + group) + part * PART
        end = tl.minimum(begin + PART, tl.load(starts_ptr + group + 1))
    else:
        begin, end = tl.load(starts_ptr + matrix), tl.load(starts_ptr + matrix + 1)
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        used = places < end
        slots = tl.load(order_ptr + places, mask=used, other=0)
        grad_mask = used[:, None] & (outputs < num_outputs)[None, :]
        grad_row_ptr = grad_ptr + (slots // GRAD_SLOTS)[:, None] * num_outputs
        grad = tl.load(grad_row_ptr + outputs[None, :], mask=grad_mask, other=0.0)
        x_mask = used[:, None] & (inputs < num_inputs)[None, :]
        x_row_ptr = x_ptr + (slots // X_SLOTS)[:, None] * num_inputs
        x = tl.load(x_row_ptr + inputs[None, :], mask=x_mask, other=0.0)
        if WIDE:
            sums += tl.dot(tl.trans(widen(grad)), widen(x), input_precision="ieee")
        else:
            sums = tl.dot(tl.trans(grad), x, sums)
    rows = matrix.to(tl.int64) * num_outputs + outputs
    mask = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    made = narrow(sums, out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * num_inputs + inputs[None, :], made, mask=mask)


def weight_grad(
    grad: Tensor,
    x: Tensor,
    plan: Plan,
    num_groups: int,
    *,
    dtype: torch.dtype,
    grad_slots: int = 1,
    x_slots: int = 1,
) -> Tensor:
    """Launch `grouped_linear_weight_grad`; returns `dtype` [E N, K].

    grad, x:             rows of outputs and of inputs, contiguous
    grad_slots, x_slots: neighbouring slots that read one row
    """
    runs_here(grad)
    num_slots, num_outputs, num_inputs = plan.order.numel(), grad.shape[1], x.shape[1]
    wide = multiplies_wide(x)
    block_n, block_k = (tile_width(size, 64 if wide else 128) for size in (num_outputs, num_inputs))
    row_blocks, column_blocks = triton.cdiv(num_outputs, block_n), triton.cdiv(num_inputs, block_k)
    cut = is_cut(num_slots, row_blocks * column_blocks)
    # Tiles of more slots are faster where experts have many, slower where they have few, and leave the same bits.
    is_full = not cut and min(block_n, block_k) == 128 and num_slots >= 64 * num_groups
    part_ends = plan.tile_ends(PART_SLOTS) if cut else None
    num_matrices = num_slots // PART_SLOTS + num_groups if cut else num_groups
    # Parts are rounded when they are added.
    made = torch.empty(
        num_matrices, num_outputs, num_inputs, dtype=torch.float32 if cut else dtype, device=x.device
    )
    _grouped_weight_grad_kernel[row_grid(num_matrices * row_blocks, column_blocks)](
        grad, x, made, plan.order, plan.starts, part_ends, num_outputs, num_inputs,
        num_groups, row_blocks, column_blocks,
        GRAD_SLOTS=grad_slots, X_SLOTS=x_slots,
        PART=PART_SLOTS if cut else 0, GROUP_BLOCK=triton.next_power_of_2(num_groups) if cut else 0, WIDE=wide,
        BLOCK_M=64 if is_full else 32, BLOCK_N=block_n, BLOCK_K=block_k,
        OUTPUT_STEP=column_step(num_outputs), COLUMN_STEP=column_step(num_inputs),
    )  # fmt: skip
    if part_ends is None:
        return made.reshape(num_groups * num_outputs, num_inputs)
    grads = torch.empty(num_groups, num_outputs, num_inputs, dtype=dtype, device=x.device)
    return add_group_parts(made, part_ends, grads).flatten(0, 1)


def is_cut(num_slots: int, tiles: int) -> bool:
    """Return whether slots are cut into parts, for a matrix of so many tiles. Few slots would be one part, with the same bits."""
    return tiles <= SMALL and num_slots > PART_SLOTS
