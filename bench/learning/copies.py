"""Whether a text that judges runs has copies of the text that they learned from."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE_BYTES = 2**24
"""Bytes of a text that are looked at a time. A multiple of BLOCK_BYTES."""

BLOCK_BYTES = 32
"""Bytes that are compared at once."""


def copied(windows_WT: Tensor, data_N: Tensor) -> Tensor:
    """Return which windows another text has a copy of, bool [W].

    The text is cut into blocks of 32 bytes. Wherever a copy of a window begins in it, the window holds whole blocks of the text. So
    a window counts as copied if, from one of its first 32 bytes on, each of its runs of 32 bytes is a block of the text. No copy
    is missed, and what is put together from several places may be counted too. Windows of fewer than 63 bytes are never counted:
    they need not hold a whole block, and short runs stand in every text.

    Args:
        windows_WT: int64 [W, T], values 0 to 255.
        data_N: uint8 [N].
    """
    num_windows, length = windows_WT.shape
    found_W = torch.zeros(num_windows, dtype=torch.bool)
    if length < 2 * BLOCK_BYTES - 1 or data_N.numel() < BLOCK_BYTES:
        return found_W
    runs_WO = _hashes(windows_WT.to(torch.uint8).unfold(1, BLOCK_BYTES, 1))
    is_block_WO = torch.zeros_like(runs_WO, dtype=torch.bool)
    for piece_N in data_N[: data_N.numel() // BLOCK_BYTES * BLOCK_BYTES].split(PIECE_BYTES):
        is_block_WO |= torch.isin(runs_WO, _hashes(piece_N.view(-1, BLOCK_BYTES)))
    for first in range(BLOCK_BYTES):
        found_W |= is_block_WO[:, first::BLOCK_BYTES].all(dim=1)
    return found_W


def _hashes(blocks: Tensor) -> Tensor:
    """Return a hash of each block, int64 [...], of uint8 [..., 32]. Sums wrap around."""
    words = blocks.contiguous().view(torch.int64)
    # Odd numbers, so that each word alone decides its part.
    odd = torch.tensor([0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB, 0x2545F4914F6CDD1D])
    mixed = words * odd
    return ((mixed ^ (mixed >> 29)) * odd.flip(0)).sum(dim=-1)
