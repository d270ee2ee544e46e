"""Codebook kernels for single rows: values of codes and queries, first rows, counts of use, revival.

Legend: N codes, C code width, KW words a row, KG groups a row, R vectors of a batch, s sign bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import round_half_even, widen
from arbitor.optimized.kernels.launch import announce_written, row_grid, runs_here
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import (
    ALIVE_QUERY,
    CODE_EXPONENT_MAX,
    CODE_EXPONENT_MIN,
    QUERY_MAX,
    QUERY_STEPS,
    USAGE_MAX,
)

LOW_EXPONENT, HIGH_EXPONENT = tl.constexpr(CODE_EXPONENT_MIN), tl.constexpr(CODE_EXPONENT_MAX)
STEPS, MOST_STEPS = tl.constexpr(float(QUERY_STEPS)), tl.constexpr(float(QUERY_MAX))
MOST_USES, ALIVE = tl.constexpr(USAGE_MAX), tl.constexpr(ALIVE_QUERY)

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


@triton.jit
def revived_trits(z):
    """Return the trits (int32) that vectors in whole sixteenths make as codes."""
    return tl.where(z >= ALIVE, 1, 0) - tl.where(z <= -ALIVE, 1, 0)


@triton.jit
def distance(z, code):
    """Return 2**10 |z_q / 16 - c|**2 as int32, for float32 vectors z_q and c of one block."""
    return tl.sum((z * (4.0 * z - 128.0 * code) + 1024.0 * code * code).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_columns", "row_groups", "row_words"])
def _revival_gains_kernel(
    z_ptr, words_ptr, exponents_ptr, ids_ptr, gains_ptr, num_columns, row_groups, row_words,
    GROUP_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64)
    code = tl.load(ids_ptr + vector)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < num_columns
    z = query_values(tl.load(z_ptr + vector * num_columns + columns, mask=mask, other=0.0))
    # A vector without a code reads code 0, and has no gain.
    row = tl.maximum(code, 0)
    words = tl.load(words_ptr + row * row_words + columns // 16, mask=mask, other=0)
    levels = tl.load(exponents_ptr + row * row_groups + columns // GROUP_SIZE, mask=mask, other=0)
    own = code_values(words, columns % 16, levels).to(tl.float32)
    made = revived_trits(z).to(tl.float32)
    # Distances times 2**10. 4 z_q**2 - 128 z_q c + 1024 c**2 is a whole number, and its sum over 128 columns is below 2**25.
    gain = distance(z, own) - distance(z, made)
    tl.store(gains_ptr + vector, tl.where(code >= 0, gain, 0))


@triton.jit(do_not_specialize=["first", "num_codes", "row_groups", "row_words"])
def _revive_codes_kernel(
    z_ptr, vectors_ptr, words_ptr, exponents_ptr, trit_accum_ptr, exponent_accum_ptr,
    first, num_codes, num_columns, row_groups, row_words,
    FIRST_ON_DEVICE: tl.constexpr, SIGN_BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    vector = tl.load(vectors_ptr + place)
    if vector < 0:
        return
    row = window_row(first, place, num_codes, FIRST_ON_DEVICE)
    word_ids = tl.arange(0, BLOCK_WORDS)
    lanes = tl.arange(0, 16)[None, :]
    columns = word_ids[:, None] * 16 + lanes
    mask = columns < num_columns
    z = query_values(tl.load(z_ptr + vector * num_columns + columns, mask=mask, other=0.0))
    trits = revived_trits(z)
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
    usage_ptr, vectors_ptr, first, window, num_codes, FIRST_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = window_row(first, places, num_codes, FIRST_ON_DEVICE)
    usage = tl.load(usage_ptr + rows, mask=places < window, other=0).to(tl.int32)
    revived = tl.load(vectors_ptr + places, mask=places < window, other=-1) >= 0
    tl.store(usage_ptr + rows, tl.where(revived, 1, usage >> 1).to(tl.int16), mask=places < window)


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


def vectors_of_window(
    z_RC: Tensor, weight: DeviceWeight, ids_R: Tensor, usage: Tensor, first: int | Tensor, window: int
) -> Tensor:
    """Launch `revival_vectors`; returns int64 [window]. The library sorts, all shapes are fixed, and nothing waits."""
    runs_here(z_RC)
    num_vectors, num_columns = z_RC.shape
    if num_vectors == 0:
        return torch.full((window,), -1, dtype=torch.int64, device=z_RC.device)
    gains = torch.empty(num_vectors, dtype=torch.int32, device=z_RC.device)
    _revival_gains_kernel[row_grid(num_vectors, 1)](
        z_RC.contiguous(), weight.words, weight.exponents, ids_R.contiguous(), gains,
        num_columns, weight.exponents.shape[1], weight.words.shape[1],
        GROUP_SIZE=weight.group_size, BLOCK_C=triton.next_power_of_2(num_columns),
    )  # fmt: skip
    by_gain = gains.sort(descending=True, stable=True).indices
    by_code = by_gain[ids_R[by_gain].sort(stable=True).indices]
    codes, gains = ids_R[by_code], gains[by_code]
    same_code = torch.zeros_like(codes, dtype=torch.bool)
    same_code[1:] = codes[1:] == codes[:-1]
    # The farthest vector of each code keeps its gain.
    gains = gains.masked_fill(same_code, 0).clamp(min=0)
    chosen = by_code[gains.sort(descending=True, stable=True).indices]
    rows = (first + torch.arange(window, device=usage.device)) % usage.numel()
    dead = usage[rows] == 0
    places = dead.cumsum(dim=0) - 1
    given = dead & (places < torch.count_nonzero(gains))
    return torch.where(given, chosen[places.clamp(min=0, max=num_vectors - 1)], -1)


def revive_(weight: DeviceWeight, z_RC: Tensor, vectors: Tensor, first: int | Tensor, sign_bits: int) -> None:
    """Launch `revive_codes`, in place."""
    runs_here(z_RC)
    if vectors.numel() == 0 or z_RC.shape[0] == 0:
        return
    num_codes, num_columns = weight.shape
    groups, words = weight.exponents.shape[1], weight.words.shape[1]
    _revive_codes_kernel[row_grid(vectors.numel(), 1)](
        z_RC.contiguous(), vectors.contiguous(),
        weight.words, weight.exponents, weight.trit_accum, weight.exponent_accum,
        _start(first, num_codes), num_codes, num_columns, groups, words,
        FIRST_ON_DEVICE=isinstance(first, Tensor), SIGN_BITS=sign_bits,
        BLOCK_WORDS=triton.next_power_of_2(words), BLOCK_GROUPS=triton.next_power_of_2(groups),
    )  # fmt: skip
    announce_written(weight.words, weight.exponents)


def age_(usage: Tensor, vectors: Tensor, first: int | Tensor) -> None:
    """Launch `age_codes`, in place."""
    runs_here(usage)
    window = vectors.numel()
    if window:
        _age_codes_kernel[(triton.cdiv(window, BLOCK),)](
            usage, vectors.contiguous(), _start(first, usage.numel()), window, usage.numel(),
            FIRST_ON_DEVICE=isinstance(first, Tensor), BLOCK=BLOCK,
        )  # fmt: skip


def _start(first: int | Tensor, num_codes: int) -> int | Tensor:
    """Return where a window starts. A number is brought within the table, so that it has one kernel argument type."""
    return first if isinstance(first, Tensor) else first % num_codes
