"""Embedding: gradients of equal ids summed in a fixed order, without atomics.

Legend: R ids in the batch (slots), K width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from arbitor.optimized.kernels.launch import runs_here
from arbitor.optimized.kernels.segments import segment_sums


def row_grads(ids_R: Tensor, grad_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `embedding_row_grads` on flat ids and gradients [R, K]; shapes depend on shapes alone."""
    runs_here(grad_RK)
    num_ids = ids_R.numel()
    if num_ids == 0:
        return ids_R, grad_RK.to(torch.float32)
    ids_sorted, order = torch.sort(ids_R, stable=True)
    # A -1 on each side makes the first id differ from its predecessor, and unused slots find the -1 behind the last id.
    bounded = functional.pad(ids_sorted, (1, 1), value=-1)
    # Slots are counted from 1.
    slots = (ids_sorted != bounded[:-2]).cumsum(0)
    # starts[s] is the first sorted position of slot s. Unused slots, and the end of the last slot, are at num_ids.
    starts = torch.searchsorted(slots, torch.arange(1, num_ids + 2, device=ids_R.device))
    return bounded[1:][starts[:-1]], segment_sums(grad_RK, ids_sorted, order, starts, torch.float32)
