"""The gradients of stacked matrices: a product for each expert, of the slots that chose it.

Legend: E experts, N outputs of an expert, K inputs, M slots. Products with the matrices are in products.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import widen
from arbitor.optimized.kernels.launch import row_grid, runs_here
from arbitor.optimized.kernels.products import Plan, multiplies_wide, tile_width


@triton.jit(do_not_specialize=["row_blocks", "column_blocks"])
def _grouped_weight_grad_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, starts_ptr, num_outputs, num_inputs, row_blocks, column_blocks,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // column_blocks
    group = tile // row_blocks
    outputs = (tile % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
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
    rows = group.to(tl.int64) * num_outputs + outputs
    mask = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    tl.store(out_ptr + rows[:, None] * num_inputs + inputs[None, :], sums, mask=mask)


def weight_grad(grad_MN: Tensor, x_MK: Tensor, plan: Plan, num_groups: int) -> Tensor:
    """Launch `grouped_linear_weight_grad`; returns float32 [E N, K]."""
    runs_here(grad_MN)
    num_outputs, num_inputs, wide = grad_MN.shape[1], x_MK.shape[1], multiplies_wide(x_MK)
    out = torch.empty(num_groups * num_outputs, num_inputs, dtype=torch.float32, device=x_MK.device)
    block_n, block_k = (
        tile_width(num_outputs, 64 if wide else 128),
        tile_width(num_inputs, 64 if wide else 128),
    )
    row_blocks, column_blocks = triton.cdiv(num_outputs, block_n), triton.cdiv(num_inputs, block_k)
    _grouped_weight_grad_kernel[row_grid(num_groups * row_blocks, column_blocks)](
        grad_MN, x_MK, out, plan.order, plan.starts, num_outputs, num_inputs, row_blocks, column_blocks,
        WIDE=wide, BLOCK_M=32, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return out
