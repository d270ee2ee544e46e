"""Codebook kernels for single rows: values of codes and queries, first rows, counts of use, revival.

Legend: N codes, C code width, KW words a row, KG groups a row, R vectors of a batch, s sign bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import clock_step, philox_words, round_half_even, widen
from arbitor.optimized.kernels.launch import Clock, announce_written, runs_here
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import (
    ALIVE_QUERY,
    CODE_EXPONENT_MAX,
    CODE_EXPONENT_MIN,
    QUERY_MAX,
    QUERY_STEPS,
    REVIVAL_BLOCK,
    USAGE_MAX,
)

LOW_EXPONENT, HIGH_EXPONENT = tl.constexpr(CODE_EXPONENT_MIN), tl.constexpr(CODE_EXPONENT_MAX)
STEPS, MOST_STEPS = tl.constexpr(float(QUERY_STEPS)), tl.constexpr(float(QUERY_MAX))
MOST_USES, ALIVE, REVIVAL = tl.constexpr(USAGE_MAX), tl.constexpr(ALIVE_QUERY), tl.constexpr(REVIVAL_BLOCK)

BLOCK = 256
BLOCK_ROWS = 64


@triton.jit
def query_values(z):
    """Return z_q, float32 or bfloat16 vectors in whole sixteenths, as float32."""
    z = widen(z)
    scaled = tl.where(z == z, z, 0.0) * STEPS
    scaled = tl.minimum(tl.maximum(scaled, -MOST_STEPS), MOST_STEPS)
    return round_half_even(scaled)


@triton.jit
def code_exponents(levels):
    """Return clamp(E, -5, 2) as int32. A codebook has no mantissa bits, so its levels are its exponents."""
    return tl.minimum(tl.maximum(levels.to(tl.int32), LOW_EXPONENT), HIGH_EXPONENT)


@triton.jit
def half_bits(exponents):
    """Return the bits of 2**e as float16."""
    return (exponents + 15) << 10


@triton.jit
def code_values(words, lanes, levels):
    """Return float16 c' = T * 2**clamp(E, -5, 2) for the trits at two-bit `lanes` of int32 `words`; it is exact.

    The low bit of a lane says that the trit is not zero, the high bit that it is negative. So the value is the bits of the scale,
    masked and signed.
    """
    code = words >> (2 * lanes)
    bits = half_bits(code_exponents(levels)) | ((code & 2) << 14)
    return (bits & -(code & 1)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def bucket_trits(rows, columns, num_codes, SIGN_BITS: tl.constexpr):
    """Return the trits (int32) that the bucket numbers of int64 rows prescribe for `columns` below the sign bits."""
    numbers = (rows << SIGN_BITS) // num_codes
    return (((numbers >> columns) & 1) * 2 - 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_codes", "row_words"])
def _sign_words_kernel(
    words_ptr, num_codes, row_words, SIGN_BITS: tl.constexpr, SIGN_WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, 16)[None, :]
    for place in tl.static_range(SIGN_WORDS):
        columns = place * 16 + lanes
        address = words_ptr + rows * row_words + place
        words = tl.load(address, mask=rows < num_codes, other=0)
        own = (words[:, None] >> (2 * lanes)) & 3
        lane = tl.where(
            columns < SIGN_BITS, bucket_trits(rows[:, None], columns, num_codes, SIGN_BITS) & 3, own
        )
        tl.store(address, tl.xor_sum(lane << (2 * lanes), axis=1), mask=rows < num_codes)


@triton.jit(do_not_specialize=["num_ids"])
def _count_codes_kernel(ids_ptr, ends_ptr, usage_ptr, num_ids, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + places, mask=places < num_ids, other=-1)
    before = tl.load(ids_ptr + places - 1, mask=(places > 0) & (places < num_ids), other=-1)
    # One thread acts for each code, so there are no atomics.
    first = (ids >= 0) & (ids != before)
    count = tl.load(ends_ptr + places, mask=first, other=0) - places
    total = tl.load(usage_ptr + ids, mask=first, other=0).to(tl.int64) + count
    tl.store(usage_ptr + ids, tl.minimum(total, MOST_USES).to(tl.int16), mask=first)


@triton.jit
def window_row(first, place, num_codes, FIRST_ON_DEVICE: tl.constexpr):
    """Return the int64 row at a place of the window."""
    if FIRST_ON_DEVICE:
        start = tl.load(first)
    else:
        start = first.to(tl.int64)
    return (start + place) % num_codes


@triton.jit(
    do_not_specialize=[
        "first",
        "num_codes",
        "num_vectors",
        "row_groups",
        "row_words",
        "seed_low",
        "seed_high",
        "step",
        "tensor_id",
    ]
)
def _revive_codes_kernel(
    z_ptr, usage_ptr, words_ptr, exponents_ptr, trit_accum_ptr, exponent_accum_ptr,
    first, num_codes, num_columns, num_vectors, row_groups, row_words, seed_low, seed_high, step, tensor_id,
    FIRST_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr, SIGN_BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    row = window_row(first, tl.program_id(0).to(tl.int64), num_codes, FIRST_ON_DEVICE)
    if tl.load(usage_ptr + row) != 0:
        return
    one = tl.zeros([1], dtype=tl.int64)
    draw, _, _, _ = philox_words(
        row + one,
        tl.full([1], REVIVAL, tl.int32),
        clock_step(step, STEP_ON_DEVICE),
        tensor_id,
        seed_low,
        seed_high,
    )
    vector = tl.sum((draw.to(tl.int64) * num_vectors) >> 32, axis=0)
    word_ids = tl.arange(0, BLOCK_WORDS)
    lanes = tl.arange(0, 16)[None, :]
    columns = word_ids[:, None] * 16 + lanes
    mask = columns < num_columns
    z = query_values(tl.load(z_ptr + vector * num_columns + columns, mask=mask, other=0.0))
    trits = tl.where(z >= ALIVE, 1, 0) - tl.where(z <= -ALIVE, 1, 0)
    trits = tl.where(columns < SIGN_BITS, bucket_trits(row, columns, num_codes, SIGN_BITS), trits)
    words = tl.xor_sum((trits & 3) << (2 * lanes), axis=1)
    tl.store(words_ptr + row * row_words + word_ids, words, mask=word_ids < row_words)
    zeros = tl.zeros([BLOCK_WORDS, 16], dtype=tl.int8)
    tl.store(trit_accum_ptr + row * num_columns + columns, zeros, mask=mask)
    groups = tl.arange(0, BLOCK_GROUPS)
    none = tl.zeros([BLOCK_GROUPS], dtype=tl.int8)
    tl.store(exponents_ptr + row * row_groups + groups, none, mask=groups < row_groups)
    tl.store(exponent_accum_ptr + row * row_groups + groups, none, mask=groups < row_groups)


@triton.jit(do_not_specialize=["first", "window", "num_codes"])
def _age_codes_kernel(
    usage_ptr, first, window, num_codes, FIRST_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = window_row(first, places, num_codes, FIRST_ON_DEVICE)
    usage = tl.load(usage_ptr + rows, mask=places < window, other=0).to(tl.int32)
    aged = tl.where(usage == 0, 1, usage >> 1)
    tl.store(usage_ptr + rows, aged.to(tl.int16), mask=places < window)


def sign_words_(words: Tensor, sign_bits: int) -> None:
    """Launch the signs of the first columns of `initial_codebook`, into words [N, KW]."""
    runs_here(words)
    num_codes, row_words = words.shape
    if sign_bits:
        _sign_words_kernel[(triton.cdiv(num_codes, BLOCK_ROWS),)](
            words, num_codes, row_words, SIGN_BITS=sign_bits, SIGN_WORDS=triton.cdiv(sign_bits, 16), BLOCK=BLOCK_ROWS
        )  # fmt: skip


def count_(usage: Tensor, ids: Tensor) -> None:
    """Launch `count_codes` on flat ids, in place."""
    runs_here(usage)
    if ids.numel() == 0:
        return
    in_order = torch.sort(ids).values
    ends = torch.searchsorted(in_order, in_order, right=True)
    grid = (triton.cdiv(ids.numel(), BLOCK),)
    _count_codes_kernel[grid](in_order, ends, usage, ids.numel(), BLOCK=BLOCK)


def revive_(
    weight: DeviceWeight,
    usage: Tensor,
    z_RC: Tensor,
    first: int | Tensor,
    window: int,
    sign_bits: int,
    clock: Clock,
) -> None:
    """Launch `revive_codes`, in place."""
    runs_here(usage)
    if window == 0 or z_RC.shape[0] == 0:
        return
    num_codes, num_columns = weight.shape
    groups, words = weight.exponents.shape[1], weight.words.shape[1]
    _revive_codes_kernel[(window,)](
        z_RC.contiguous(), usage.contiguous(), weight.words, weight.exponents, weight.trit_accum, weight.exponent_accum,
        _start(first, num_codes), num_codes, num_columns, z_RC.shape[0], groups, words,
        clock.seed_low, clock.seed_high, clock.step, clock.tensor_id,
        FIRST_ON_DEVICE=isinstance(first, Tensor), STEP_ON_DEVICE=clock.step_on_device, SIGN_BITS=sign_bits,
        BLOCK_WORDS=triton.next_power_of_2(words), BLOCK_GROUPS=triton.next_power_of_2(groups),
    )  # fmt: skip
    announce_written(weight.words, weight.exponents)


def age_(usage: Tensor, first: int | Tensor, window: int) -> None:
    """Launch `age_codes`, in place."""
    runs_here(usage)
    if window:
        _age_codes_kernel[(triton.cdiv(window, BLOCK),)](
            usage, _start(first, usage.numel()), window, usage.numel(),
            FIRST_ON_DEVICE=isinstance(first, Tensor), BLOCK=BLOCK,
        )  # fmt: skip


def _start(first: int | Tensor, num_codes: int) -> int | Tensor:
    """Return where a window starts. A number is brought within the table, so that it has one kernel argument type."""
    return first if isinstance(first, Tensor) else first % num_codes
