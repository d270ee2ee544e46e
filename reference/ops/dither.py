"""Dither: the random bytes that make integer rounding unbiased, as a pure function of where and when they are used.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), written out in 64-bit integers.
Legend: G columns a group; one group of twelve costs one Philox call of sixteen bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import RESERVED_STEP
from arbitor.reference.promises import op

__all__ = ["dither_bytes"]

PHILOX_ROUNDS = 10
"""Rounds of the Philox4x32-10 generator."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""Multipliers of the first and third counter word."""

PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
"""Increments of the two key words in a round, modulo 2**32."""

BYTES_PER_BLOCK = 16
"""Bytes from one Philox call."""

_WORD = 0xFFFFFFFF


def multiply_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * b for int64 tensors holding uint32 words."""
    # int64 wraps modulo 2**64, so the bits are those of the unsigned product, also where its sign is lost.
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four int64 tensors of uint32 words for four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = multiply_words(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = multiply_words(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _WORD, (k1 + PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


@op
def dither_bytes(
    group_ids: Tensor, *, group_size: int, seed: int, step: int | Tensor, tensor_id: int
) -> Tensor:
    """Return the dither of each group: one byte a place, then one for the exponent.

    Math:    byte i is byte i mod 16, little-endian, of Philox(key = seed, counter = (group id, i // 16, step, tensor id))
    Shapes:  group_ids int64 [...], each in 0 .. 2**32 - 1
    Range:   group_size G one of 6, 12, 16, 24, 32, 48, 64, 96; seed 0 .. 2**64 - 1; step 0 .. 2**32 - 1, an integer or a
             0-dim int64 tensor; tensor_id 0 .. 2**32 - 1
    Returns: uint8 [..., G + 1]; place i uses byte i, the exponent uses byte G
    Raises:  ValueError for a group size, seed, step or tensor id out of range
    Laws:    the bytes of a group depend on its own id alone, not on the other ids of the call
    Source:  docs/spec/dither.md; known answers from the Random123 distribution
    """
    checks.dtype_in("group_ids", group_ids, (torch.int64,))
    checks.values_between("group_ids", group_ids, 0, _WORD)
    checks.group_size(group_size)
    checks.vote_clock(seed, step, tensor_id, last_step=RESERVED_STEP)
    key = (seed & _WORD, seed >> 32)
    step_word = torch.as_tensor(step, device=group_ids.device).expand_as(group_ids)
    tensor_word = torch.full_like(group_ids, tensor_id)
    blocks = []
    for block in range(group_size // BYTES_PER_BLOCK + 1):
        words = philox((group_ids, torch.full_like(group_ids, block), step_word, tensor_word), key)
        for word in words:
            blocks += [(word >> shift) & 0xFF for shift in (0, 8, 16, 24)]
    return torch.stack(blocks[: group_size + 1], dim=-1).to(torch.uint8)
