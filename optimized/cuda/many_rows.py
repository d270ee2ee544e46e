"""The product of many rows with a packed weight on Hopper: the host's side of `many_rows.cu`.

Legend: M rows, N outputs, K inputs; KW words a row, KG groups a row; S parts of a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.cuda.launch import launch
from arbitor.optimized.cuda.product import STEP, chunk_constants, fits_chunks
from arbitor.optimized.kernels.parts import add_parts, parts_of
from arbitor.optimized.kernels.slots import Plan
from arbitor.optimized.layouts import DeviceWeight

WORDS = 6
"""Words of a chunk, and slabs of x in shared memory."""

LANES = 8
"""Pairs of lanes of a word."""

MOST = 512
"""Most rows that the kernel takes. `docs/log.md` has the times beside Triton's and the library's."""

HEIGHT = 64
"""Outputs of a tile of a warp group."""

TALL = 256
"""Sums of a thread from which on a whole warp group copies, times two."""


@dataclass(frozen=True)
class Form:
    """How a product is cut into blocks.

    rows:        of x that a block multiplies
    warp_groups: that multiply
    heights:     tiles of 64 outputs of a warp group
    blocks:      that a multiprocessor has room for
    batch:       products of 16 inputs whose operands are made at once
    parts:       of a sum, at most
    """

    rows: int
    warp_groups: int
    heights: int
    blocks: int
    batch: int
    parts: int

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return HEIGHT * self.heights * self.warp_groups

    @property
    def threads(self) -> int:
        """Threads of a block, with those that copy."""
        return 128 * self.warp_groups + (128 if self.heights * (self.rows + 64) >= TALL else 32)

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a block."""
        return WORDS * 16 * LANES * self.rows


def fits(x_MK: Tensor, weight: DeviceWeight) -> bool:
    """Return whether the kernel takes a product: not more rows than MOST, and what `fits_chunks`."""
    return x_MK.shape[0] <= MOST and fits_chunks(x_MK, weight)


def form_of(num_rows: int, weight: DeviceWeight) -> Form:
    """Return the form for a number of rows of x."""
    if num_rows <= 8:
        return Form(8, 2, 1, 2, 4, 4)
    if num_rows <= 16:
        return Form(16, 2, 1, 2, 4, 4)
    if num_rows <= 64:
        return Form(64, 2, 1, 1, 4, 2)
    return Form(128, 2, 2, 1, 2, 1)


def many_rows_product(
    x: Tensor,
    weight: DeviceWeight,
    form: Form,
    *,
    num_groups: int = 1,
    experts_M: Tensor | None = None,
    plan: Plan | None = None,
    slots_of_row: int = 1,
) -> Tensor:
    """Return x W^T, bfloat16 [M, N], for contiguous rows that `fits`. The other arguments are those of `packed_product`.

    With a plan sums are not cut.
    """
    num_slots, num_inputs = x.shape[0] * slots_of_row, x.shape[1]
    num_outputs = weight.shape[0] // num_groups
    row_words, row_groups = weight.words.shape[1], weight.exponents.shape[1]
    steps, num_tiles = math.ceil(num_inputs / STEP), math.ceil(num_slots / form.rows)
    part_steps, num_parts = parts_of(steps, form.parts)
    slots = 0
    if experts_M is not None:
        slots, num_tiles = 2, num_slots
    elif plan is not None:
        # Every expert, and the unused slots, may have a tile that is not full.
        slots, num_tiles = 1, num_tiles + num_groups + 1
        part_steps, num_parts = steps, 1
    constants = {
        **chunk_constants(weight),
        "SLOTS": slots,
        "ROWS": form.rows,
        "WARP_GROUPS": form.warp_groups,
        "HEIGHT": form.heights,
        "BLOCKS": form.blocks,
        "BATCH": form.batch,
        "PARTS": int(num_parts > 1),
    }
    order, starts = (None, None) if plan is None else (plan.order, plan.starts)
    by = (experts_M, order, starts, np.int32(num_slots), np.int32(num_groups))
    places = num_tiles * steps * WORDS * form.rows
    slabs = torch.empty(places * LANES * 4, dtype=torch.int32, device=x.device)
    launch(
        Kernel.of("many_rows", "lay_out_rows", **constants),
        (x, slabs, *by, *map(np.int32, (slots_of_row, num_inputs, steps * WORDS, num_tiles))),
        blocks=math.ceil(places / 128),
        threads=128,
        device=x.device,
    )
    y_MN = torch.empty(num_slots, num_outputs, dtype=torch.bfloat16, device=x.device)
    shape = (num_parts, num_slots, num_outputs)
    sums = y_MN if num_parts == 1 else torch.empty(shape, dtype=torch.float32, device=x.device)
    sizes = (num_outputs, num_inputs, row_words, row_groups, num_parts, part_steps, num_tiles)
    launch(
        Kernel.of("many_rows", "many_rows_product", **constants),
        (slabs, weight.words, weight.exponents, sums, *by, *map(np.int32, sizes)),
        blocks=math.ceil(num_outputs / form.outputs) * num_parts * num_tiles,
        threads=form.threads,
        device=x.device,
        shared_bytes=form.shared_bytes,
    )
    return y_MN if num_parts == 1 else add_parts(sums, y_MN)
