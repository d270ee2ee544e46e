"""Embedding kernel: gradients of equal ids summed in a fixed order, without atomics.

Legend: R ids in the batch (slots), K width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here

BLOCK_POSITIONS = 32
BLOCK_COLUMNS = 128


@triton.jit(do_not_specialize=["row_blocks"])
def _embedding_row_grads_kernel(
    grad_ptr, order_ptr, starts_ptr, out_ptr, num_columns, row_blocks,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(starts_ptr + slot), tl.load(starts_ptr + slot + 1)
    # float64, as in the specification, and in an order that depends on the positions alone.
    sums = tl.zeros([BLOCK_K], dtype=tl.float64)
    for start in range(begin, end, BLOCK_R):
        positions = start + tl.arange(0, BLOCK_R)
        used = positions < end
        sources = tl.load(order_ptr + positions, mask=used, other=0)
        mask = used[:, None] & (columns < num_columns)[None, :]
        grad = tl.load(grad_ptr + sources[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        sums += tl.sum(widen(grad).to(tl.float64), axis=0)
    tl.store(out_ptr + slot * num_columns + columns, sums.to(tl.float32), mask=columns < num_columns)


def row_grads(ids_R: Tensor, grad_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `embedding_row_grads` on flat ids and gradients [R, K]; shapes depend on shapes alone."""
    runs_here(grad_RK)
    num_ids, num_columns = grad_RK.shape
    sums = torch.empty(num_ids, num_columns, dtype=torch.float32, device=grad_RK.device)
    if num_ids == 0:
        return ids_R, sums
    ids_sorted, order = torch.sort(ids_R, stable=True)
    is_first = torch.ones_like(ids_sorted, dtype=torch.bool)
    torch.ne(ids_sorted[1:], ids_sorted[:-1], out=is_first[1:])
    slots = is_first.cumsum(0) - 1
    # starts[s] is the first sorted position of slot s; unused slots, and the end of the last one, are at num_ids.
    starts = torch.searchsorted(slots, torch.arange(num_ids + 1, device=ids_R.device))
    rows = torch.where(starts[:-1] < num_ids, ids_sorted[starts[:-1].clamp(max=num_ids - 1)], -1)
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    _embedding_row_grads_kernel[row_grid(num_ids, row_blocks)](
        grad_RK.contiguous(),
        order,
        starts,
        sums,
        num_columns,
        row_blocks,
        BLOCK_R=BLOCK_POSITIONS,
        BLOCK_K=block,
    )
    return rows, sums
