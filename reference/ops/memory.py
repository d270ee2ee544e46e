"""Memory: the row of a table that belongs to an n-gram of codes, and the strength of each row.

Legend: B batch, P positions, o order of the n-gram, N rows of a table, R rows named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import STRENGTH_MAX
from arbitor.reference.promises import op

__all__ = ["ngram_rows", "touch_strengths"]

MIX_SHIFTS, MIX_FACTORS = (16, 15, 15), (0x21F0AAAD, 0x735A2D97)
"""Xor-shifts and multipliers of the hash: the best that Wellons' search for lowbias32 found."""

CODE_STEP = 0x9E3779B9
"""Increment of the hash before each code, modulo 2**32, so that a run of zeros does not stay zero."""

_WORD = 0xFFFFFFFF


@op
def ngram_rows(
    codes_BP: Tensor, *, order: int, num_rows: int, salt: int, previous: Tensor | None = None
) -> Tensor:
    """Return the row of the n-gram of codes that ends at each position.

    Math:    h = mix(salt); for the codes c of the n-gram, oldest first: h <- mix(((h + 0x9E3779B9) mod 2**32) xor c)
             row = h mod N; -1 where one of the codes is -1 or lies before the first one given
             mix(x): x ^= x >> 16; x *= 0x21F0AAAD; x ^= x >> 15; x *= 0x735A2D97; x ^= x >> 15, modulo 2**32
    Shapes:  codes_BP int64 [B, P], each in 0 .. 2**32 - 1, or -1 for none; order 1 .. 16; num_rows 1 .. 2**31 - 1
             salt 0 .. 2**32 - 1; previous int64 [B, order - 1], the codes before the first position, or None for none
    Returns: int64 [B, P], in 0 .. N - 1, or -1
    Raises:  TypeError or ValueError for a dtype, shape, device, code or number that is not allowed
    Laws:    a row follows from its own n-gram alone: codes cut in two, the first part as `previous`, give the same rows
    Source:  docs/spec/memory.md; REFACTOR12 (MemGram)
    """
    checks.ngrams(codes_BP, order, num_rows, salt, previous)
    for name, codes in (("codes_BP", codes_BP), ("previous", previous)):
        if codes is not None:
            checks.values_between(name, codes, -1, _WORD)
    batch, positions = codes_BP.shape
    before = codes_BP.new_full((batch, order - 1), -1) if previous is None else previous
    all_codes = torch.cat([before, codes_BP], dim=1)
    h = mix(torch.full_like(codes_BP, salt))
    known = torch.ones_like(codes_BP, dtype=torch.bool)
    for place in range(order):
        c = all_codes[:, place : place + positions]
        known &= c >= 0
        h = mix(((h + CODE_STEP) & _WORD) ^ (c & _WORD))
    return torch.where(known, h % num_rows, -1)


@op
def touch_strengths(
    strengths: Tensor,
    rows: Tensor,
    *,
    gain: int,
    first: int | Tensor,
    window: int,
    shift: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the strengths after a decay of all rows in a window and a rise of the rows that are named.

    Math:    first, for n = (first + j) mod N, j < window: s_n <- s_n - ceil(s_n / 2**shift)
             then, for every row named: s_n <- min(s_n + gain * number of times it is named, 127)
    Shapes:  strengths int8 [N], each in 0 .. 127; rows int64 [...], each in 0 .. N - 1, or -1 for an unused slot
             gain 0 .. 127; first 0 .. 2**62, an integer or int64 []; window 0 .. N; shift 0 .. 7
    Returns: int8 [N], new; or `out` (may be `strengths` itself), overwritten. In place only window and rows are touched
    Overflow: saturates at 127
    Raises:  TypeError or ValueError for a dtype, shape, device, row or number that is not allowed
    Laws:    the order of rows changes nothing; rows that are neither named nor in the window keep every byte; a strength
             that only decays reaches 0
    Source:  docs/spec/memory.md; REFACTOR12 (MemGram)
    """
    checks.strengths_of(strengths, out)
    checks.dtype_in("rows", rows, (torch.int64,))
    checks.same_device(strengths=strengths, rows=rows)
    checks.strength_rule(gain, shift)
    checks.code_window(strengths.numel(), first, window)
    checks.values_between("rows", rows, -1, strengths.numel() - 1)
    touched = strengths.to(torch.int64)
    decaying = (first + torch.arange(window, device=strengths.device)) % strengths.numel()
    touched[decaying] -= (touched[decaying] + 2**shift - 1) >> shift
    named, counts = rows[rows >= 0].unique(return_counts=True)
    touched[named] = (touched[named] + gain * counts).clamp(max=STRENGTH_MAX)
    result = touched.to(torch.int8)
    return result if out is None else out.copy_(result)


def mix(x: Tensor) -> Tensor:
    """Return well-mixed words for int64 tensors that hold uint32 words. The map is a bijection.

    The factors are below 2**31, so the product of a word with a factor fits int64, and nothing wraps before it is masked.
    """
    for shift, factor in zip(MIX_SHIFTS, MIX_FACTORS, strict=False):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> MIX_SHIFTS[-1])
