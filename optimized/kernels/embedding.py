"""Embedding kernel: gradients of equal ids summed in the order of their positions, without atomics.

Legend: R ids in the batch (slots), K width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import widen
from arbitor.optimized.kernels.launch import runs_here

BLOCK_POSITIONS = 32
BLOCK_COLUMNS = 128


@triton.jit
def _segment_sum_kernel(
    grad_ptr, order_ptr, starts_ptr, out_ptr, num_columns, stride_r, stride_k,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(starts_ptr + slot), tl.load(starts_ptr + slot + 1)
    # float64, as in the specification: a row's sum is then the same however its positions are cut into blocks.
    sums = tl.zeros([BLOCK_K], dtype=tl.float64)
    for start in range(begin, end, BLOCK_R):
        positions = start + tl.arange(0, BLOCK_R)
        used = positions < end
        sources = tl.load(order_ptr + positions, mask=used, other=0)
        mask = used[:, None] & (columns < num_columns)[None, :]
        grad = tl.load(
            grad_ptr + sources[:, None] * stride_r + columns[None, :] * stride_k, mask=mask, other=0.0
        )
        sums += tl.sum(widen(grad).to(tl.float64), axis=0)
    tl.store(out_ptr + slot * num_columns + columns, sums.to(tl.float32), mask=columns < num_columns)


def row_grads(ids_R: Tensor, grad_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `embedding_row_grads` on flat ids and gradients [R, K] of any strides; shapes depend on shapes alone."""
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
    if num_columns:
        _segment_sum_kernel[(num_ids, triton.cdiv(num_columns, BLOCK_COLUMNS))](
            grad_RK, order, starts, sums, num_columns, *grad_RK.stride(),
            BLOCK_R=BLOCK_POSITIONS, BLOCK_K=BLOCK_COLUMNS,
        )  # fmt: skip
    return rows, sums
