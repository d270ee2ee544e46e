"""The denoise loop of a few samples in one launch: the host's side of `denoise.cu`.

Legend: B samples, L numbers of a latent, P tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.cuda.launch import aligned, launch
from arbitor.optimized.cuda.many_rows import PROCESSORS, SHARED_BYTES
from arbitor.optimized.cuda.product import CHUNK, OUTPUTS, STEP, chunk_constants
from arbitor.optimized.cuda.product import FEW as TILE_ROWS
from arbitor.optimized.kernels.norm import HUGE_TOTAL, TAMING_POWER
from arbitor.optimized.layouts import MAX_COLUMNS, DeviceWeight
from arbitor.reference.constants import DEFAULT_EPS

THREADS = 512
"""Threads of a block."""

WARPS = THREADS // 32

ROWS = 3
"""Rows of bfloat16 numbers that a sample is cut into, for the tensor cores."""

FEW = 4
"""Most samples that the kernel takes."""

MOST_STEPS = 8
"""Most steps that the kernel takes."""

BLOCK_WEIGHTS, BLOCK_NUMBERS = 2**13, 2**12
"""Weights of the largest product, and numbers of all tokens of a sample, for which the grid has another block. Blocks wait for one
another, and a small loop waits less in few."""


@dataclass(frozen=True)
class Plan:
    """How a loop is cut into blocks.

    blocks:       of the grid
    part_tokens:  neighbouring tokens of a sample that a block has at a time
    kept_tokens:  tokens that a block keeps in shared memory
    sums:         floats of shared memory for the sums of a product
    shared_bytes: bytes of shared memory of a block
    """

    blocks: int
    part_tokens: int
    kept_tokens: int
    sums: int
    shared_bytes: int


def fits(latent_BL: Tensor, tokens_BPD: Tensor, weights: Sequence[DeviceWeight], num_steps: int) -> bool:
    """Return whether the kernel takes a loop: few samples and steps, weights of one kind, and a plan with enough shared memory.

    Args:
        latent_BL: float32 or bfloat16, contiguous.
        tokens_BPD: of the same dtype, contiguous.
        weights: latent_in, query, step_rows and latent_out.
        num_steps: of the loop.
    """
    num_samples, size = latent_BL.shape
    num_tokens, width = tokens_BPD.shape[1:]
    return (
        0 < num_samples <= FEW
        and num_steps <= MOST_STEPS
        and size % 4 == 0
        and width % 4 == 0
        and max(num_samples * size, num_samples * width, num_samples * num_tokens) <= MAX_COLUMNS
        and CHUNK % weights[0].group_size == 0
        and len({(weight.group_size, weight.mantissa_bits) for weight in weights}) == 1
        and aligned(latent_BL, 16)
        and aligned(tokens_BPD, 16)
        and plan_of(num_samples, size, num_tokens, width, latent_BL.element_size(), *_room(latent_BL.device))
        is not None
    )


def plan_of(
    num_samples: int, size: int, num_tokens: int, width: int, float_bytes: int, processors: int, room: int
) -> Plan | None:
    """Return the plan of a loop, or None where its operands do not fit the shared memory of a block.

    How the numbers of a sample are cut does not depend on the other samples.

    Args:
        num_samples: B.
        size: L.
        num_tokens: P.
        width: D.
        float_bytes: of a number of the tokens.
        processors: multiprocessors of the GPU.
        room: bytes of shared memory that a block can have.
    """
    weights, numbers = max(size, width) * width, num_tokens * width
    blocks = min(processors, max(math.ceil(weights / BLOCK_WEIGHTS), math.ceil(numbers / BLOCK_NUMBERS)))
    part_tokens = math.ceil(num_tokens / blocks)
    tiles = math.ceil(math.ceil(max(size, width) / OUTPUTS) / blocks)
    sums = max(tiles, WARPS) * math.ceil(ROWS * num_samples / TILE_ROWS) * 4 * 32
    # Sixteen columns take two pieces of 16 bytes for each row, and one more.
    pairs = math.ceil(max(size, width) / STEP) * STEP // 16 * (2 * ROWS * num_samples + 1) * 4
    # Operands, sums, shares of tokens and their sums in each warp, sums of a block, and what samples have left.
    floats = pairs + sums + _in_fours((1 + WARPS) * part_tokens) + 4 * WARPS + _in_fours(2 * num_samples)
    rest = room - 4 * floats
    if rest < 0:
        return None
    tokens_of_block = math.ceil(num_samples * math.ceil(num_tokens / part_tokens) / blocks) * part_tokens
    kept = min(rest // (width * float_bytes), tokens_of_block)
    return Plan(blocks, part_tokens, kept, sums, 4 * floats + kept * width * float_bytes)


def denoise_loop(
    latent_BL: Tensor,
    tokens_BPD: Tensor,
    weights: Sequence[DeviceWeight],
    alphas: Sequence[float],
    halt_threshold: float | None,
) -> Tensor:
    """Return the result of `denoise_loop`, of the dtype of the latents, for a loop that `fits`."""
    num_samples, size = latent_BL.shape
    num_tokens, width = tokens_BPD.shape[1:]
    plan = plan_of(num_samples, size, num_tokens, width, latent_BL.element_size(), *_room(latent_BL.device))
    if plan is None:
        raise ValueError(f"a loop over {num_samples} samples of {size} numbers does not fit a block")
    kernel = Kernel.of(
        "denoise",
        "denoise_loop",
        # What holds for every weight that is multiplied: the least of the bytes that are read at once.
        **{
            name: min(chunk_constants(weight)[name] for weight in (weights[0], weights[1], weights[3]))
            for name in ("GROUP_SIZE", "MANTISSA_BITS", "WORD_BYTES", "LEVEL_BYTES")
        },
        FLOAT_BYTES=latent_BL.element_size(),
        SAMPLES=num_samples,
        SIZE=size,
        WIDTH=width,
        HALTS=int(halt_threshold is not None),
        THREADS=THREADS,
        HUGE_LOG2=int(math.log2(HUGE_TOTAL.value)),
        TAMING_LOG2=int(math.log2(TAMING_POWER.value)),
    )
    parts = math.ceil(num_tokens / plan.part_tokens)
    # Latents and their mean; x, q and m; the sums of parts of the tokens, sums of squares, and what parts have beside their sums.
    floats = num_samples * (2 * size + (3 + parts) * width + 4 * plan.blocks + 2 * parts)
    scratch = torch.empty(floats, dtype=torch.float32, device=latent_BL.device)
    out = torch.empty_like(latent_BL)
    # A pair of float32 numbers, as a complex one.
    steps = [np.complex64(complex(1.0 - alpha, 1.0 / math.sqrt(alpha))) for alpha in alphas]
    launch(
        kernel,
        (
            latent_BL,
            tokens_BPD,
            *(tensor for weight in weights for tensor in (weight.words, weight.exponents)),
            out,
            scratch,
            np.float32(DEFAULT_EPS),
            np.float32(halt_threshold or 0.0),
            *map(np.int32, (num_tokens, plan.part_tokens, plan.kept_tokens, plan.sums, len(steps))),
            *steps,
            *[np.complex64(0)] * (MOST_STEPS - len(steps)),
        ),
        blocks=plan.blocks,
        threads=THREADS,
        device=latent_BL.device,
        shared_bytes=plan.shared_bytes,
        waits=True,
    )
    return out


def _in_fours(size: int) -> int:
    """Return a size rounded up, so that what lies behind it starts at sixteen bytes."""
    return math.ceil(size / 4) * 4


@functools.cache
def _room(device: torch.device) -> tuple[int, int]:
    """Return the multiprocessors of a GPU, and the bytes of shared memory that a block can have. A CPU counts as an H200."""
    if device.type != "cuda":
        return PROCESSORS, SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    # The types of torch lack it.
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
