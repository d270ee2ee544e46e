"""Packing kernels: canonical bytes from trits and back, and between canonical bytes and device words.

Legend: n trits in all, N rows, K columns, KW words a row. Sizes are int64, so tables beyond 2**31 trits address right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_trits
from arbitor.optimized.kernels.launch import runs_here
from arbitor.optimized.layouts import TRITS_PER_WORD, words_per_row
from arbitor.reference.constants import packed_bytes

BLOCK = 256


@triton.jit
def _byte_digit(packed_ptr, positions, mask):
    """Return trits (int32) at flat int64 positions of canonical bytes; 0 where masked."""
    byte = tl.load(packed_ptr + positions // 5, mask=mask, other=0).to(tl.int32)
    digit = (positions % 5).to(tl.int32)
    byte = tl.where(digit >= 1, byte // 3, byte)
    byte = tl.where(digit >= 2, byte // 3, byte)
    byte = tl.where(digit >= 3, byte // 3, byte)
    byte = tl.where(digit >= 4, byte // 3, byte)
    return tl.where(mask, byte % 3 - 1, 0)


@triton.jit(do_not_specialize=["num_trits"])
def _pack_trits_kernel(trits_ptr, packed_ptr, num_trits, BLOCK: tl.constexpr):
    num_trits = num_trits.to(tl.int64)
    byte_ids = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.zeros([BLOCK], dtype=tl.int32)
    for j in tl.static_range(4, -1, -1):
        positions = byte_ids * 5 + j
        trit = tl.load(trits_ptr + positions, mask=positions < num_trits, other=0).to(tl.int32)
        byte = byte * 3 + trit + 1
    tl.store(packed_ptr + byte_ids, byte.to(tl.uint8), mask=byte_ids * 5 < num_trits)


@triton.jit(do_not_specialize=["num_trits"])
def _unpack_trits_kernel(packed_ptr, trits_ptr, num_trits, BLOCK: tl.constexpr):
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = positions < num_trits
    tl.store(trits_ptr + positions, _byte_digit(packed_ptr, positions, mask).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "row_words"])
def _words_from_packed_kernel(packed_ptr, words_ptr, num_rows, num_columns, row_words, BLOCK: tl.constexpr):
    word_ids = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = word_ids // row_words, (word_ids % row_words) * 16
    words = tl.zeros([BLOCK], dtype=tl.int32)
    for lane in tl.static_range(16):
        mask = (rows < num_rows) & (columns + lane < num_columns)
        trits = _byte_digit(packed_ptr, rows * num_columns + columns + lane, mask)
        words = words | ((trits & 3) << (2 * lane))
    tl.store(words_ptr + word_ids, words, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "row_words"])
def _packed_from_words_kernel(words_ptr, packed_ptr, num_rows, num_columns, row_words, BLOCK: tl.constexpr):
    num_trits = num_rows.to(tl.int64) * num_columns
    byte_ids = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.zeros([BLOCK], dtype=tl.int32)
    for j in tl.static_range(4, -1, -1):
        positions = byte_ids * 5 + j
        mask = positions < num_trits
        rows, columns = positions // num_columns, positions % num_columns
        word = tl.load(words_ptr + rows * row_words + columns // 16, mask=mask, other=0)
        byte = byte * 3 + lane_trits(word, (columns % 16).to(tl.int32)) + 1
    tl.store(packed_ptr + byte_ids, byte.to(tl.uint8), mask=byte_ids * 5 < num_trits)


def pack(trits: Tensor) -> Tensor:
    """Launch `pack_trits` on int8 trits of any shape; returns uint8 [ceil(n / 5)]."""
    runs_here(trits)
    flat = trits.contiguous()
    packed = torch.empty(packed_bytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    if packed.numel():
        _pack_trits_kernel[(triton.cdiv(packed.numel(), BLOCK),)](flat, packed, flat.numel(), BLOCK=BLOCK)
    return packed


def unpack(packed: Tensor, num_trits: int) -> Tensor:
    """Launch `unpack_trits`; returns int8 [num_trits]."""
    runs_here(packed)
    trits = torch.empty(num_trits, dtype=torch.int8, device=packed.device)
    if num_trits:
        grid = (triton.cdiv(num_trits, BLOCK),)
        _unpack_trits_kernel[grid](packed.contiguous(), trits, num_trits, BLOCK=BLOCK)
    return trits


def words_from_packed(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Launch the conversion of canonical bytes to device words, int32 [N, KW]."""
    runs_here(packed)
    num_rows, num_columns = shape
    words = torch.empty(num_rows, words_per_row(num_columns), dtype=torch.int32, device=packed.device)
    grid = (triton.cdiv(words.numel(), BLOCK),)
    _words_from_packed_kernel[grid](
        packed.contiguous(), words, num_rows, num_columns, words.shape[1], BLOCK=BLOCK
    )
    return words


def packed_from_words(words: Tensor, shape: tuple[int, int]) -> Tensor:
    """Launch the conversion of device words to canonical bytes, uint8 [ceil(N*K / 5)]."""
    runs_here(words)
    num_rows, num_columns = shape
    packed = torch.empty(packed_bytes(num_rows * num_columns), dtype=torch.uint8, device=words.device)
    grid = (triton.cdiv(packed.numel(), BLOCK),)
    _packed_from_words_kernel[grid](words, packed, num_rows, num_columns, words.shape[1], BLOCK=BLOCK)
    return packed


# The kernels above spell the number out: Triton folds literals, not module constants.
assert TRITS_PER_WORD == 16
