"""Memory kernels: the hash of n-grams, and strengths that decay in a window and rise where rows are named.

Legend: B batch, P positions, o order of the n-gram, N rows of a table, R rows named.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.launch import runs_here, signed_word
from arbitor.reference.constants import STRENGTH_MAX

MOST = tl.constexpr(STRENGTH_MAX)

BLOCK = 256


@triton.jit
def _mixed(x):
    """Return well-mixed uint32 words; products wrap."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit(do_not_specialize=["num_positions", "num_codes", "num_rows", "salt"])
def _ngram_rows_kernel(
    codes_ptr, previous_ptr, rows_ptr, num_positions, num_codes, num_rows, salt,
    ORDER: tl.constexpr, HAS_PREVIOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < num_codes
    sequence, position = flat // num_positions, flat % num_positions
    known = inside
    word = tl.zeros([BLOCK], dtype=tl.uint32) + salt.to(tl.uint32, bitcast=True)
    word = _mixed(word)
    for place in tl.static_range(ORDER):
        back = ORDER - 1 - place
        given = position >= back
        code = tl.load(codes_ptr + flat - back, mask=inside & given, other=-1)
        if HAS_PREVIOUS and back > 0:
            # Position 0 comes right after the last of the ORDER - 1 codes before it.
            before = previous_ptr + sequence * (ORDER - 1) + position + place
            code = tl.where(given, code, tl.load(before, mask=inside & (position < back), other=-1))
        known = known & (code >= 0)
        word = _mixed((word + 0x9E3779B9) ^ code.to(tl.uint32))
    row = tl.where(known, word.to(tl.int64) % num_rows, -1)
    tl.store(rows_ptr + flat, row, mask=inside)


@triton.jit(do_not_specialize=["first", "window", "num_rows"])
def _decay_strengths_kernel(
    strengths_ptr, first, window, num_rows,
    FIRST_ON_DEVICE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if FIRST_ON_DEVICE:
        start = tl.load(first)
    else:
        start = first.to(tl.int64)
    rows = (start + places) % num_rows
    strengths = tl.load(strengths_ptr + rows, mask=places < window, other=0).to(tl.int32)
    left = strengths - ((strengths + (1 << SHIFT) - 1) >> SHIFT)
    tl.store(strengths_ptr + rows, left.to(tl.int8), mask=places < window)


@triton.jit(do_not_specialize=["num_named", "gain"])
def _raise_strengths_kernel(rows_ptr, ends_ptr, strengths_ptr, num_named, gain, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + places, mask=places < num_named, other=-1)
    before = tl.load(rows_ptr + places - 1, mask=(places > 0) & (places < num_named), other=-1)
    # One thread acts for each row, so there are no atomics.
    first = (rows >= 0) & (rows != before)
    count = tl.load(ends_ptr + places, mask=first, other=0) - places
    total = tl.load(strengths_ptr + rows, mask=first, other=0).to(tl.int64) + gain * count
    tl.store(strengths_ptr + rows, tl.minimum(total, MOST).to(tl.int8), mask=first)


def ngram_rows(codes_BP: Tensor, previous: Tensor | None, order: int, num_rows: int, salt: int) -> Tensor:
    """Launch `ngram_rows`."""
    runs_here(codes_BP)
    codes_BP = codes_BP.contiguous()
    rows_BP = torch.empty_like(codes_BP)
    if codes_BP.numel():
        before = codes_BP if previous is None else previous.contiguous()
        _ngram_rows_kernel[(triton.cdiv(codes_BP.numel(), BLOCK),)](
            codes_BP, before, rows_BP, codes_BP.shape[1], codes_BP.numel(), num_rows, signed_word(salt),
            ORDER=order, HAS_PREVIOUS=previous is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return rows_BP


def touch_(strengths: Tensor, rows: Tensor, gain: int, first: int | Tensor, window: int, shift: int) -> None:
    """Launch `touch_strengths` on flat rows, in place: the window first, then the rows."""
    runs_here(strengths)
    num_rows = strengths.numel()
    if window:
        start = first if isinstance(first, Tensor) else first % num_rows
        _decay_strengths_kernel[(triton.cdiv(window, BLOCK),)](
            strengths, start, window, num_rows,
            FIRST_ON_DEVICE=isinstance(first, Tensor), SHIFT=shift, BLOCK=BLOCK,
        )  # fmt: skip
    if rows.numel():
        in_order = torch.sort(rows).values
        ends = torch.searchsorted(in_order, in_order, right=True)
        _raise_strengths_kernel[(triton.cdiv(rows.numel(), BLOCK),)](
            in_order, ends, strengths, rows.numel(), gain, BLOCK=BLOCK
        )  # fmt: skip
