"""The product of many rows with a packed weight on Hopper: the host's side of `many_rows.cu`.

Legend: M rows, N outputs, K inputs; KW words a row, KG groups a row; S parts of a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.cuda.launch import launch
from arbitor.optimized.cuda.product import FEW, STEP, chunk_constants, fits_chunks
from arbitor.optimized.kernels.parts import add_parts, parts_of
from arbitor.optimized.kernels.slots import Plan
from arbitor.optimized.layouts import MAX_COLUMNS, DeviceWeight

WORDS = 6
"""Words of a chunk, and slabs of x in shared memory."""

LANES = 8
"""Pairs of lanes of a word."""

ROWS = ((2**27, FEW + 1, MAX_COLUMNS), (2**24, FEW + 1, 1024), (2**22, 17, 512))
"""Weights from which on the kernel is faster than the library and Triton's kernel, for the least and the most rows of each line.

`docs/log.md` has the times.
"""

LEAST_EXPERT, LEAST_SIDE = 2**19, 256
"""Least weights, and least inputs and outputs, of an expert. A step has 384 columns, and a block 128 outputs or more."""

PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""

HEIGHT = 64
"""Outputs of a tile of a warp group."""

SHARED_BYTES = 227 * 1024
"""Bytes of shared memory of a multiprocessor that blocks can have."""

TALL = 256
"""Heights times (rows + 64) from which on sums take so many registers that a whole warp group copies, and gives them its own."""


@dataclass(frozen=True)
class Form:
    """How a product is cut into blocks.

    rows:        of x that a block multiplies
    warp_groups: that multiply
    heights:     tiles of 64 outputs of a warp group
    blocks:      that a multiprocessor has room for
    batch:       products of 16 inputs whose operands are made at once
    parts:       of a sum, at most
    runs:        blocks that share the outputs of a tile, 0 for one for each range of outputs
    """

    rows: int
    warp_groups: int
    heights: int
    blocks: int
    batch: int
    parts: int = 1
    runs: int = 0

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return HEIGHT * self.heights * self.warp_groups

    @property
    def copy_warps(self) -> int:
        """Warps of a block that copy."""
        return 4 if self.heights * (self.rows + 64) >= TALL else 1

    @property
    def threads(self) -> int:
        """Threads of a block, with those that copy."""
        return 128 * self.warp_groups + 32 * self.copy_warps

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab of x."""
        return 16 * LANES * self.rows

    @property
    def starts_early(self) -> bool:
        """Whether blocks start before x is laid out. Where they do not fill a GPU, they would crowd on some multiprocessors."""
        return self.rows <= 16

    def resident(self, steps: int) -> bool:
        """Whether a block has room for all slabs of so many steps, and copies them once for several ranges of outputs."""
        return self.runs > 0 and self.blocks * (steps * WORDS * self.slab_bytes + 2048) <= SHARED_BYTES


def fits(x_MK: Tensor, weight: DeviceWeight) -> bool:
    """Return whether the kernel takes a product with one matrix: more rows than `product.cu`, and fewer than the library."""
    return pays(x_MK.shape[0], *weight.shape) and fits_chunks(x_MK, weight)


def pays(num_rows: int, num_outputs: int, num_inputs: int) -> bool:
    """Return whether the kernel is the fastest for a product of this size."""
    lines = ((least, most) for weights, least, most in ROWS if num_outputs * num_inputs >= weights)
    least, most = next(lines, (1, 0))
    return least <= num_rows <= most


def fits_slots(x: Tensor, weight: DeviceWeight, num_groups: int) -> bool:
    """Return whether the kernel takes slots of a stack of matrices."""
    return pays_for_experts(weight.shape[0] // num_groups, weight.shape[1]) and fits_chunks(x, weight)


def pays_for_experts(num_outputs: int, num_inputs: int) -> bool:
    """Return whether the kernel is the fastest for experts of this size: neither steps nor blocks may be mostly empty."""
    return min(num_outputs, num_inputs) >= LEAST_SIDE and num_outputs * num_inputs >= LEAST_EXPERT


def form_of(num_rows: int, num_outputs: int) -> Form:
    """Return the form for rows of x, by what was the fastest on an H200 (`docs/log.md`)."""
    low, high = Form(128, 1, 1, 2, 4), Form(256, 2, 1, 1, 4)
    if num_rows <= low.rows:
        kinds = (
            (16, Form(16, 1, 1, 4, 4)),
            (32, Form(32, 1, 1, 3, 4)),
            (64, Form(64, 1, 1, 3, 4)),
            (128, low),
        )
        form = next(form for most, form in kinds if num_rows <= most)
        return _filled(form, num_rows, num_outputs)
    enough = _blocks(high, num_rows, num_outputs) >= PROCESSORS * 2 // 5
    return _filled(high if enough else low, num_rows, num_outputs)


def slot_form_of(num_slots: int, num_groups: int) -> Form:
    """Return the form for slots of so many experts. Runs of outputs make two blocks for each that a GPU has room for."""
    average = math.ceil(num_slots / num_groups)
    if num_slots <= num_groups:
        form = Form(8, 2, 1, 2, 4)
    elif average <= 12:
        form = Form(16, 2, 1, 2, 4)
    elif average <= 96:
        form = Form(64, 3, 1, 1, 4)
    else:
        return Form(128, 2, 2, 1, 2)
    tiles = max(math.ceil(num_slots / form.rows), min(num_slots, num_groups))
    return replace(form, runs=math.ceil(2 * PROCESSORS * form.blocks / tiles))


def _blocks(form: Form, num_rows: int, num_outputs: int) -> int:
    return math.ceil(num_outputs / form.outputs) * math.ceil(num_rows / form.rows)


def _filled(form: Form, num_rows: int, num_outputs: int) -> Form:
    """Return a form with as many parts as fill a GPU."""
    return replace(form, parts=max(1, PROCESSORS * form.blocks // _blocks(form, num_rows, num_outputs)))


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
    resident = num_parts == 1 and form.resident(steps)
    constants = {
        **chunk_constants(weight),
        "SLOTS": slots,
        "ROWS": form.rows,
        "WARP_GROUPS": form.warp_groups,
        "HEIGHT": form.heights,
        "COPY_WARPS": form.copy_warps,
        "BLOCKS": form.blocks,
        "BATCH": form.batch,
        "PARTS": int(num_parts > 1),
        "RESIDENT": int(resident),
    }
    order, starts = (None, None) if plan is None else (plan.order, plan.starts)
    by = (experts_M, order, starts, np.int32(num_slots), np.int32(num_groups))
    ranges, places = math.ceil(num_outputs / form.outputs), num_tiles * steps * WORDS * form.rows
    runs = min(form.runs or ranges, ranges)
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
    sizes = (num_outputs, num_inputs, row_words, row_groups, num_parts, part_steps, num_tiles, runs)
    launch(
        Kernel.of("many_rows", "many_rows_product", **constants),
        (slabs, weight.words, weight.exponents, sums, *by, *map(np.int32, sizes)),
        blocks=runs * num_parts * num_tiles,
        threads=form.threads,
        device=x.device,
        shared_bytes=(steps if resident else 1) * WORDS * form.slab_bytes,
        starts_early=form.starts_early,
    )
    return y_MN if num_parts == 1 else add_parts(sums, y_MN)
