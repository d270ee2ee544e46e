"""Sums that were cut into parts, added in their order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow
from arbitor.optimized.kernels.launch import row_grid

BLOCK = 256


@triton.jit(do_not_specialize=["size", "num_parts"])
def _add_parts_kernel(parts_ptr, out_ptr, size, num_parts, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(num_parts):
        sums += tl.load(parts_ptr + places, mask=places < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + places, narrow(sums, out_ptr.dtype.element_ty), mask=places < size)


def add_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Add float32 parts [S, ...] in their order into `out` [...], rounded once; returns it."""
    grid = row_grid(triton.cdiv(out.numel(), BLOCK), 1)
    _add_parts_kernel[grid](parts, out, out.numel(), parts.shape[0], BLOCK=BLOCK)
    return out
