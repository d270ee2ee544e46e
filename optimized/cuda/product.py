"""The product of few rows with a packed weight: the host's side of `product.cu`.

Legend: M rows, N outputs, K inputs; KW words a row, KG groups a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.cuda.launch import aligned, launch
from arbitor.optimized.layouts import MAX_COLUMNS, DeviceWeight

CHUNK = 96
"""Columns of a row that a thread takes at a time. They must be whole groups."""

STEP = 4 * CHUNK
"""Columns of a row that a warp takes at a time."""

OUTPUTS = 16
"""Outputs of a tile, which has FEW rows."""

FEW = 8
"""Most rows that the kernel takes. `docs/log.md` has the times beside Triton's and those of `many_rows.cu`."""

MANY, SOME = 600, 300
"""Tiles of outputs from which on blocks are larger: the tiles of 9,600 and of 4,800 outputs."""

PAIR_BYTES = 36_000
"""Bytes of shared memory for x, so that a multiprocessor has room for several blocks."""


def fits(x_MK: Tensor, weight: DeviceWeight) -> bool:
    """Return whether the kernel takes a product: few rows, and what `fits_chunks`."""
    return x_MK.shape[0] <= FEW and fits_chunks(x_MK, weight)


def fits_chunks(x_MK: Tensor, weight: DeviceWeight) -> bool:
    """Return whether x can meet chunks of a weight: rows of bfloat16 that start at 16 bytes, and groups that fit a chunk."""
    return (
        x_MK.dtype is torch.bfloat16
        and x_MK.shape[0] > 0
        and weight.shape[0] <= MAX_COLUMNS
        and x_MK.shape[1] % 8 == 0
        and CHUNK % weight.group_size == 0
        and aligned(x_MK, 16)
    )


def chunk_constants(weight: DeviceWeight) -> dict[str, int]:
    """Return what `chunk.cuh` is told of a weight."""
    levels, row_groups = CHUNK // weight.group_size, weight.exponents.shape[1]
    return {
        "GROUP_SIZE": weight.group_size,
        "MANTISSA_BITS": weight.mantissa_bits,
        "WORD_BYTES": 8 if weight.words.shape[1] % 2 == 0 and aligned(weight.words, 8) else 4,
        "LEVEL_BYTES": 4 if levels % 4 == 0 and row_groups % 4 == 0 and aligned(weight.exponents, 4) else 1,
    }


def few_rows_product(x_MK: Tensor, weight: DeviceWeight) -> Tensor:
    """Return x W^T, bfloat16 [M, N], for contiguous rows that `fits`.

    How the sums are cut follows from the weight alone. The bits of a row therefore do not depend on the rows beside it.
    """
    num_rows, num_inputs = x_MK.shape
    num_outputs, row_words, row_groups = weight.shape[0], weight.words.shape[1], weight.exponents.shape[1]
    tiles, splits = block_of(_tiles(weight), num_rows)
    kernel = Kernel.of(
        "product",
        "few_rows_product",
        **chunk_constants(weight),
        TILES=tiles,
        SPLITS=splits,
        BLOCKS=3 if tiles * splits <= 8 else 1,
    )
    # Sixteen columns take two pieces of 16 bytes for each row, and one more.
    step_bytes = STEP // 16 * (2 * num_rows + 1) * 16
    steps = math.ceil(num_inputs / STEP)
    phase_steps = max(PAIR_BYTES // step_bytes // splits, 1) * splits
    sum_bytes = tiles * splits * 4 * 32 * 4
    y_MN = torch.empty(num_rows, num_outputs, dtype=torch.bfloat16, device=x_MK.device)
    launch(
        kernel,
        (
            x_MK,
            weight.words,
            weight.exponents,
            y_MN,
            *map(np.int32, (num_rows, num_outputs, num_inputs, row_words, row_groups, phase_steps)),
        ),
        blocks=math.ceil(num_outputs / (OUTPUTS * tiles)),
        threads=32 * tiles * splits,
        device=x_MK.device,
        shared_bytes=max(min(phase_steps, steps) * step_bytes, sum_bytes),
    )
    return y_MN


def _tiles(weight: DeviceWeight) -> int:
    return math.ceil(weight.shape[0] / OUTPUTS)


def block_of(tiles: int, num_rows: int) -> tuple[int, int]:
    """Return the tiles of outputs of a block, and the warps that share the columns of a tile. The latter follow from `tiles` alone.

    x is laid out again in every block. For more than half a tile of rows a block is therefore larger, where there are enough tiles.
    """
    tall = num_rows > FEW // 2
    if tiles >= MANY:
        return (8 if tall else 4), 2
    return (4 if tall and tiles >= SOME else 2), 4
