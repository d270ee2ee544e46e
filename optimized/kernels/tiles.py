"""Tiles of a weight for `tl.dot`, from packed words: a thread takes a word and makes its sixteen weights.

So the weights of a word are neighbours in one thread, and go to shared memory sixteen bytes at a time. Left to itself, Triton
spreads the lanes of a word over threads, and a tile then costs more to lay out than to multiply.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from arbitor.optimized.layouts import TRITS_PER_WORD


def run_of(group_size: int) -> int:
    """Return the lanes between which all groups of a word start."""
    return math.gcd(group_size, TRITS_PER_WORD)


def span_of(group_size: int) -> int:
    """Return how many groups a word can overlap, four at most."""
    return triton.cdiv(group_size - run_of(group_size) + TRITS_PER_WORD, group_size)


@triton.jit
def lane_pairs(
    low, high, s0, s1, s2, s3, offsets, LANE: tl.constexpr, STEP: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return the weights of the lanes LANE, LANE + STEP, ... of words in pairs, as two-byte floats in the halves of an int32.

    Each doubling of STEP adds an axis of two after the axes of the words, that of the lane's highest bit first. The weights stay in
    the thread that has the word.
    low, high: the halves of words, `spread`
    s0 .. s3:  the scales of a word's groups, as the bits of two-byte floats
    offsets:   columns of the first group that lie before the word
    """
    if STEP < 16:
        even = lane_pairs(low, high, s0, s1, s2, s3, offsets, LANE, 2 * STEP, GROUP_SIZE, RUN)
        odd = lane_pairs(low, high, s0, s1, s2, s3, offsets, LANE + STEP, 2 * STEP, GROUP_SIZE, RUN)
        return tl.join(even, odd)
    else:
        # All groups of a word start at multiples of RUN lanes, and the first group at most GROUP_SIZE - RUN columns before it.
        first: tl.constexpr = LANE // RUN * RUN
        scales = s0
        if first + GROUP_SIZE - RUN >= GROUP_SIZE:
            scales = tl.where(offsets + first >= GROUP_SIZE, s1, scales)
        if first + GROUP_SIZE - RUN >= 2 * GROUP_SIZE:
            scales = tl.where(offsets + first >= 2 * GROUP_SIZE, s2, scales)
        if first + GROUP_SIZE - RUN >= 3 * GROUP_SIZE:
            scales = tl.where(offsets + first >= 3 * GROUP_SIZE, s3, scales)
        # The low bit of a code says nonzero, the high bit is the sign.
        codes = (low if LANE < 8 else high) >> (2 * (LANE % 8))
        return (codes & 0x10001) * scales + ((codes & 0x20002) << 14)


@triton.jit
def spread(halves):
    """Return the lower eight lanes of words with odd lanes 14 bits higher, so that the lanes of a pair are 16 bits apart."""
    return (halves & 0x3333) | ((halves & 0xCCCC) << 14)


@triton.jit
def weight_tile(
    words, s0, s1, s2, s3, offsets, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the weights [ROWS, COLUMNS], of two bytes each, of words [ROWS, COLUMNS / 16] and the scales of their groups."""
    low, high = spread(words), spread(words >> 16)
    pairs = lane_pairs(low, high, s0, s1, s2, s3, offsets, 0, 2, GROUP_SIZE, RUN)
    bits = tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), [ROWS, COLUMNS])
    # The bitcast follows the reshape. Triton 3.6 would try to move the reshape past the copy to shared memory, and cannot.
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def scale_bits(levels, MANTISSA_BITS: tl.constexpr):
    """Return the bits of int8 levels' scales as bfloat16, in int32: `level_scales`, sixteen bits lower."""
    return (levels.to(tl.int32) + (127 << MANTISSA_BITS)) << (7 - MANTISSA_BITS)


@triton.jit
def word_levels(rows_ptr, first, row_groups, SPAN: tl.constexpr):
    """Return four levels, of which SPAN belong to the groups that a word can overlap: `first` and the groups after it."""
    l0 = levels_of(rows_ptr, first, row_groups)
    l1, l2, l3 = l0, l0, l0
    if SPAN > 1:
        l1 = levels_of(rows_ptr, first + 1, row_groups)
    if SPAN > 2:
        l2, l3 = levels_of(rows_ptr, first + 2, row_groups), levels_of(rows_ptr, first + 3, row_groups)
    return l0, l1, l2, l3


@triton.jit
def levels_of(rows_ptr, group, row_groups):
    """Return the level of a group of each row, where there is one.

    Groups of neighbouring words are near each other, which Triton 3.6 does not see. The hint makes it give levels to the threads
    that have the words. Loads stay single bytes, because the alignment of a row is unknown (`row_groups` is not specialised).
    """
    return tl.load(tl.max_contiguous(rows_ptr + group, [1, 2]), mask=group < row_groups, other=0)
