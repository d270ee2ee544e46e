"""Sums shared among programs: how a sum is cut into parts, and how its parts are added.

A sum that one program would take too long over is cut into *parts*. A part is a contiguous range of the terms, and one program
adds up one part. A second launch adds the parts in ascending order, so a sum has the same bits on every run and needs no atomics.
The cuts follow from shapes, or from the number of terms of the sum.

| kernels | what is summed | the terms of a part | what a part leaves |
|---|---|---|---|
| `products` | the inputs of an output | a number of tiles, by the widths | a float32 sum |
| `norm` | the rows of a weight gradient | a number of rows, by the shape | a float32 sum |
| `experts` | the slots of an expert | `PART_SLOTS` slots | a float32 sum |
| `segments` | the edges of a segment | `PART_EDGES` sorted positions | a float64 sum |
| `attention` | the slots of a sequence | a number of slots, by their place | a largest score, a total and a float32 sum |
| `denoise` | the squares of a latent | a tile of columns | two float32 sums |
| `distributed` | the ranks of a gradient | the gradient of a rank, in float32 or bfloat16 | that gradient |
| `mxint8` | the ranks of a gradient | the gradient of a rank, in eight bits | that gradient, which the second launch decodes |
| `codebook` | the codes of a search, of which the nearest is kept | a number of codes, by the device | a score and a code |

The search keeps the best score in place of a sum. Its scores are exact, so the device may decide where its cuts lie.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid

BLOCK = 256
GROUP_BLOCK = 1024
"""Elements of an output whose parts one program adds."""

MANY = 2**20
"""Elements of an output from which a program adds the parts of GROUP_BLOCK of them, and not of BLOCK."""


@triton.jit(do_not_specialize=["size", "num_parts"])
def _add_parts_kernel(parts_ptr, out_ptr, size, num_parts, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The first part is taken as it is: a sum of zeros below 0 is one, too.
    sums = widen(tl.load(parts_ptr + places, mask=places < size, other=0.0))
    for _ in range(1, num_parts):
        parts_ptr += size
        sums += widen(tl.load(parts_ptr + places, mask=places < size, other=0.0))
    tl.store(out_ptr + places, narrow(sums, out_ptr.dtype.element_ty), mask=places < size)


@triton.jit(do_not_specialize=["group_blocks"])
def _add_group_parts_kernel(parts_ptr, part_ends_ptr, out_ptr, size, group_blocks, BLOCK: tl.constexpr):
    group = (tl.program_id(0) // group_blocks).to(tl.int64)
    places = (tl.program_id(0) % group_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    begin = tl.load(part_ends_ptr + group - 1, mask=group > 0, other=0).to(tl.int64)
    end = tl.load(part_ends_ptr + group).to(tl.int64)
    # The first part is taken as it is: a sum of one part has the bits of that part.
    first = tl.where(begin < end, size, 0)
    sums = tl.load(parts_ptr + begin * size + places, mask=places < first, other=0.0)
    for part in range(begin + 1, end):
        sums += tl.load(parts_ptr + part * size + places, mask=inside, other=0.0)
    tl.store(out_ptr + group * size + places, narrow(sums, out_ptr.dtype.element_ty), mask=inside)


def parts_of(size: int, most: int, least: int = 1) -> tuple[int, int]:
    """Return how many terms a part has, and how many parts `size` terms make: at most `most`, of `least` terms or more.

    No terms make one part, which is empty.
    """
    part = max(triton.cdiv(size, most), least)
    return part, max(triton.cdiv(size, part), 1)


def add_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Add contiguous parts [S, ...] in their order, in float32, into `out` [...], rounded once; return `out`.

    parts: float32 or bfloat16, at least one.
    """
    block = BLOCK if out.numel() < MANY else GROUP_BLOCK
    grid = row_grid(triton.cdiv(out.numel(), block), 1)
    _add_parts_kernel[grid](parts, out, out.numel(), parts.shape[0], BLOCK=block)
    return out


def add_group_parts(parts: Tensor, part_ends: Tensor, out: Tensor) -> Tensor:
    """Add the float32 parts [S, ...] of each group in their order into `out` [E, ...], rounded once; return `out`.

    part_ends: int32 [E] or longer, where each group's parts end; a group without parts gets zeros.
    """
    num_groups, size = out.shape[0], parts.shape[1:].numel()
    group_blocks = triton.cdiv(size, GROUP_BLOCK)
    _add_group_parts_kernel[row_grid(num_groups, group_blocks)](
        parts, part_ends, out, size, group_blocks, BLOCK=GROUP_BLOCK
    )
    return out
