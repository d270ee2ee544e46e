"""Dither kernel: Philox bytes per group, as `votes` uses them without ever writing them out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import clock_step, philox_words, word_bytes
from arbitor.optimized.kernels.launch import Clock, runs_here

BLOCK = 64


@triton.jit(do_not_specialize=["num_groups", "seed_low", "seed_high", "step", "tensor_id"])
def _dither_bytes_kernel(
    ids_ptr, out_ptr, num_groups, seed_low, seed_high, step, tensor_id,
    STEP_ON_DEVICE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = groups < num_groups
    ids = tl.load(ids_ptr + groups, mask=inside, other=0)
    step_word = clock_step(step, STEP_ON_DEVICE)
    for block in tl.static_range(GROUP_SIZE // 16 + 1):
        w0, w1, w2, w3 = philox_words(
            ids, tl.full([BLOCK], block, tl.int32), step_word, tensor_id, seed_low, seed_high
        )
        places = block * 16 + tl.arange(0, 16)
        values = word_bytes(w0[:, None], w1[:, None], w2[:, None], w3[:, None], places[None, :])
        offsets = groups[:, None] * (GROUP_SIZE + 1) + places[None, :]
        tl.store(
            out_ptr + offsets, values.to(tl.uint8), mask=inside[:, None] & (places <= GROUP_SIZE)[None, :]
        )


def dither(group_ids: Tensor, group_size: int, clock: Clock) -> Tensor:
    """Launch `dither_bytes` on int64 ids of any shape; returns uint8 [..., G + 1]."""
    runs_here(group_ids)
    ids = group_ids.contiguous()
    out = torch.empty(*ids.shape, group_size + 1, dtype=torch.uint8, device=ids.device)
    if ids.numel():
        _dither_bytes_kernel[(triton.cdiv(ids.numel(), BLOCK),)](
            ids, out, ids.numel(), clock.seed_low, clock.seed_high, clock.step, clock.tensor_id,
            STEP_ON_DEVICE=clock.step_on_device, GROUP_SIZE=group_size, BLOCK=BLOCK,
        )  # fmt: skip
    return out
