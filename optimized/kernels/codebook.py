"""Codebook kernels: the nearest row of a packed table, and upkeep of the rows.

Legend: N codes, C code width, Q vectors, M candidates of a vector, R vectors of a batch, s sign bits.

The search keeps a tile of queries, streams a part of the codes (`parts`) past it, and unpacks a tile of codes at a time to
float16, in which every value is exact. The codes are the rows of the product and the queries its columns, so that few queries
still fill the instruction. Every lane keeps its own best score and the tile that it came from, in the order of the codes. Lanes,
then parts, are compared at the end. All sums are exact (docs/spec/codebook.md), so parts and tiles leave no trace.
"""

from __future__ import annotations

import functools
import heapq

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.codebook_rows import code_exponents, code_values, half_bits, query_values
from arbitor.optimized.kernels.launch import MAX_PROGRAMS, row_grid, runs_here
from arbitor.optimized.kernels.tiles import run_of, span_of, weight_tile, word_levels
from arbitor.optimized.layouts import DeviceWeight

NOTHING = tl.constexpr(-3.0e38)
"""A score below all scores. The kernels maximise 16 times the negative score, z_q . c' - 8 |c'|**2."""

NO_ID = tl.constexpr(2**63 - 1)

TILES = {16: (128, 4, 3), 64: (128, 4, 3), 128: (128, 8, 3)}
"""Codes of a tile, warps and stages by queries of a tile."""

PROGRAMS_PER_SM = 2
BLOCK_CANDIDATES = 64
BLOCK_SLOTS = 256
BLOCK_PARTS = 32


@triton.jit
def trits_before(words, lanes):
    """Return how many of the first `lanes` trits of words are not zero; from 16 lanes on, of all sixteen trits."""
    mask = tl.where(lanes < 16, (1 << (2 * tl.minimum(lanes, 15))) - 1, -1)
    count = words & mask & 0x55555555
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    return (count * 0x01010101) >> 24


@triton.jit
def word_squares(words, e0, e1, e2, e3, offsets, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr):
    """Return the part of words in |c'|**2, float32. Counts of trits give it, which saves squaring the values one by one."""
    before = trits_before(words, GROUP_SIZE - offsets)
    squares = before * exact_square(e0)
    if SPAN > 1:
        until = trits_before(words, 2 * GROUP_SIZE - offsets)
        squares += (until - before) * exact_square(e1)
    if SPAN > 2:
        before, until = until, trits_before(words, 3 * GROUP_SIZE - offsets)
        squares += (until - before) * exact_square(e2)
        before, until = until, trits_before(words, 4 * GROUP_SIZE - offsets)
        squares += (until - before) * exact_square(e3)
    return squares


@triton.jit
def exact_square(exponents):
    """Return 4**e as float32."""
    return ((2 * exponents + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_codes",
        "row_groups",
        "row_words",
        "query_tiles",
        "code_tiles",
        "num_parts",
    ]
)
def _nearest_codes_kernel(
    z_ptr, words_ptr, exponents_ptr, scores_ptr, ids_ptr,
    num_queries, num_codes, num_columns, row_groups, row_words, query_tiles, code_tiles, num_parts,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Programs of one part lie side by side, so that its codes come from the cache for all but the first.
    part = (tl.program_id(0) // query_tiles).to(tl.int64)
    begin = (part * code_tiles // num_parts).to(tl.int32)
    end = ((part + 1) * code_tiles // num_parts).to(tl.int32)
    queries = (tl.program_id(0) % query_tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_C)
    z_mask = (columns < num_columns)[:, None] & (queries < num_queries)[None, :]
    z = tl.load(z_ptr + queries[None, :] * num_columns + columns[:, None], mask=z_mask, other=0.0)
    z = query_values(z).to(tl.float16)

    lanes = tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_C // 16)[None, :]
    group = word * 16 // GROUP_SIZE
    offsets = word * 16 - group * GROUP_SIZE
    best = tl.full([BLOCK_N, BLOCK_Q], NOTHING, dtype=tl.float32)
    tiles = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.int32)
    # The words and exponents of the next tile are read before this tile is multiplied. A code past the last is read as the last.
    row = tl.minimum(begin * BLOCK_N + lanes.to(tl.int64), num_codes - 1)[:, None]
    words = tl.load(words_ptr + row * row_words + word, mask=word < row_words, other=0)
    l0, l1, l2, l3 = word_levels(exponents_ptr + row * row_groups, group, row_groups, SPAN)
    for tile in range(begin, end):
        e0, e1, e2, e3 = code_exponents(l0), code_exponents(l1), code_exponents(l2), code_exponents(l3)
        values = weight_tile(
            words, half_bits(e0), half_bits(e1), half_bits(e2), half_bits(e3), offsets,
            BLOCK_N, BLOCK_C, GROUP_SIZE, RUN, tl.float16,
        )  # fmt: skip
        squares = tl.sum(word_squares(words, e0, e1, e2, e3, offsets, GROUP_SIZE, SPAN), axis=1)
        row = tl.minimum((tile + 1) * BLOCK_N + lanes.to(tl.int64), num_codes - 1)[:, None]
        words = tl.load(words_ptr + row * row_words + word, mask=word < row_words, other=0)
        l0, l1, l2, l3 = word_levels(exponents_ptr + row * row_groups, group, row_groups, SPAN)
        inside = tile * BLOCK_N + lanes.to(tl.int64) < num_codes
        scores = tl.dot(values, z) - tl.where(inside, 8.0 * squares, -NOTHING)[:, None]
        # At equal scores the earlier tile stays, because it has the lower codes.
        better = scores > best
        best = tl.where(better, scores, best)
        tiles = tl.where(better, tile - begin, tiles)
    top = tl.max(best, axis=0)
    places = tl.where(best == top[None, :], tiles * BLOCK_N + lanes[:, None], 2147483647)
    code = begin.to(tl.int64) * BLOCK_N + tl.min(places, axis=0)
    slots = part * num_queries + queries
    tl.store(scores_ptr + slots, top, mask=queries < num_queries)
    tl.store(ids_ptr + slots, code, mask=queries < num_queries)


@triton.jit(do_not_specialize=["num_candidates", "row_groups", "row_words", "num_queries", "num_parts"])
def _nearest_candidates_kernel(
    z_ptr, words_ptr, exponents_ptr, candidates_ptr, scores_ptr, ids_ptr,
    num_candidates, num_columns, row_groups, row_words, num_queries, num_parts,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    query = (tl.program_id(0) // num_parts).to(tl.int64)
    part = (tl.program_id(0) % num_parts).to(tl.int64)
    begin, end = part * num_candidates // num_parts, (part + 1) * num_candidates // num_parts
    columns = tl.arange(0, BLOCK_C)
    z = tl.load(z_ptr + query * num_columns + columns, mask=columns < num_columns, other=0.0)
    z = query_values(z)[None, :]
    best = tl.full([BLOCK_M], NOTHING, dtype=tl.float32)
    found = tl.full([BLOCK_M], NO_ID, dtype=tl.int64)
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        codes = tl.load(candidates_ptr + query * num_candidates + places, mask=places < end, other=-1)
        mask = (codes >= 0)[:, None] & (columns < num_columns)[None, :]
        words = tl.load(words_ptr + codes[:, None] * row_words + (columns // 16)[None, :], mask=mask, other=0)
        levels = tl.load(
            exponents_ptr + codes[:, None] * row_groups + (columns // GROUP_SIZE)[None, :], mask=mask, other=0
        )
        values = code_values(words, (columns % 16)[None, :], levels).to(tl.float32)
        scores = tl.sum(values * z - 8.0 * (values * values), axis=1)
        better = (codes >= 0) & ((scores > best) | ((scores == best) & (codes < found)))
        best = tl.where(better, scores, best)
        found = tl.where(better, codes, found)
    top = tl.max(best, axis=0)
    tl.store(scores_ptr + part * num_queries + query, top)
    tl.store(ids_ptr + part * num_queries + query, tl.min(tl.where(best == top, found, NO_ID), axis=0))


@triton.jit(do_not_specialize=["num_queries", "num_parts"])
def _best_of_parts_kernel(
    scores_ptr, ids_ptr, out_ptr, num_queries, num_parts, BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr
):
    queries = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    best = tl.full([BLOCK_S, BLOCK_Q], NOTHING, dtype=tl.float32)
    found = tl.full([BLOCK_S, BLOCK_Q], NO_ID, dtype=tl.int64)
    for start in range(0, num_parts, BLOCK_S):
        parts = start + tl.arange(0, BLOCK_S)
        mask = (parts < num_parts)[:, None] & (queries < num_queries)[None, :]
        slots = parts.to(tl.int64)[:, None] * num_queries + queries[None, :]
        scores = tl.load(scores_ptr + slots, mask=mask, other=NOTHING)
        codes = tl.load(ids_ptr + slots, mask=mask, other=NO_ID)
        better = (scores > best) | ((scores == best) & (codes < found))
        best = tl.where(better, scores, best)
        found = tl.where(better, codes, found)
    top = tl.max(best, axis=0)
    code = tl.min(tl.where(best == top[None, :], found, NO_ID), axis=0)
    tl.store(out_ptr + queries, tl.where(code == NO_ID, -1, code), mask=queries < num_queries)


@triton.jit(do_not_specialize=["num_codes", "num_probes", "bucket", "slot_blocks"])
def _candidate_codes_kernel(
    z_ptr, probes_ptr, out_ptr, num_codes, num_columns, num_probes, bucket, slot_blocks,
    SIGN_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    probe_of_query = (tl.program_id(0) // slot_blocks).to(tl.int64)
    query, probe = probe_of_query // num_probes, probe_of_query % num_probes
    column, other = tl.arange(0, 32), tl.arange(0, 32)[None, :]
    z = query_values(tl.load(z_ptr + query * num_columns + column, mask=column < SIGN_BITS, other=0.0))
    others = query_values(tl.load(z_ptr + query * num_columns + other, mask=other < SIGN_BITS, other=0.0))
    mine, theirs = tl.abs(z)[:, None], tl.abs(others)
    before = (theirs < mine) | ((theirs == mine) & (other < column[:, None]))
    rank = tl.sum(tl.where(before & (other < SIGN_BITS), 1, 0), axis=1)
    flip = (tl.load(probes_ptr + probe) >> rank) & 1
    bit = tl.where(z > 0.0, 1, 0) ^ flip
    number = tl.sum(tl.where(column < SIGN_BITS, bit << column, 0), axis=0).to(tl.int64)
    begin = (number * num_codes + ((1 << SIGN_BITS) - 1)) >> SIGN_BITS
    end = ((number + 1) * num_codes + ((1 << SIGN_BITS) - 1)) >> SIGN_BITS
    slots = (tl.program_id(0) % slot_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.where(begin + slots < end, begin + slots, -1)
    tl.store(out_ptr + probe_of_query * bucket + slots, codes, mask=slots < bucket)


@functools.cache
def probe_sets(sign_bits: int, num_probes: int, device: torch.device) -> Tensor:
    """Return the first sets of ranks as int32 masks: by the sum of (rank + 1), then by the mask.

    They stay on the device, because a copy from the host waits and cannot be recorded. None is ever dropped, as a recorded graph
    reads them at each replay.
    """
    found: list[int] = []
    queue = [(0, 0)]
    while len(found) < num_probes:
        total, mask = heapq.heappop(queue)
        found.append(mask)
        # Each set comes from one other set, so it comes once. If the rank below its largest rank is taken, or there is none, that
        # is the set without its largest rank. Else it is the set with its largest rank one lower.
        # `largest` is the largest rank, plus 1.
        largest = mask.bit_length()
        if largest < sign_bits:
            heapq.heappush(queue, (total + largest + 1, mask | 1 << largest))
            if mask:
                heapq.heappush(queue, (total + 1, mask ^ (3 << (largest - 1))))
    return torch.tensor(found, dtype=torch.int32, device=device)


def parts_of_codes(query_tiles: int, most: int, device: torch.device) -> int:
    """Return the number of parts, at most `most`, for which the codes of a search fill the device.

    Few tiles of queries get one wave of programs. Many tiles get several waves, of which the last may be short.
    """
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    )
    at_once = PROGRAMS_PER_SM * processors
    wanted = at_once // query_tiles if 2 * query_tiles <= at_once else -(-4 * at_once // query_tiles)
    return max(1, min(wanted, most, MAX_PROGRAMS // query_tiles))


def block_columns(num_columns: int) -> int:
    """Return the columns of a tile: a power of two that holds a code, and at least what one product takes."""
    return max(16, triton.next_power_of_2(num_columns))


def nearest(z_QC: Tensor, weight: DeviceWeight) -> Tensor:
    """Launch `nearest_codes`; returns int64 [Q]."""
    runs_here(z_QC)
    (num_queries, num_columns), num_codes = z_QC.shape, weight.shape[0]
    block_q = next(size for size in TILES if num_queries <= size or size == max(TILES))
    block_n, warps, stages = TILES[block_q]
    query_tiles, code_tiles = triton.cdiv(num_queries, block_q), triton.cdiv(num_codes, block_n)
    if num_queries == 0:
        return torch.empty(0, dtype=torch.int64, device=z_QC.device)
    parts = parts_of_codes(query_tiles, code_tiles, z_QC.device)
    scores, ids = _slots(parts, num_queries, z_QC.device)
    _nearest_codes_kernel[(query_tiles * parts,)](
        z_QC.contiguous(), weight.words, weight.exponents, scores, ids,
        num_queries, num_codes, num_columns, weight.exponents.shape[1], weight.words.shape[1],
        query_tiles, code_tiles, parts,
        GROUP_SIZE=weight.group_size, RUN=run_of(weight.group_size), SPAN=span_of(weight.group_size),
        BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_C=block_columns(num_columns),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return _best_of(scores, ids)


def nearest_of(z_QC: Tensor, weight: DeviceWeight, candidates_QM: Tensor) -> Tensor:
    """Launch `nearest_candidates`; returns int64 [Q]."""
    runs_here(z_QC)
    (num_queries, num_columns), num_candidates = z_QC.shape, candidates_QM.shape[1]
    if num_queries == 0:
        return torch.empty(0, dtype=torch.int64, device=z_QC.device)
    parts = parts_of_codes(num_queries, triton.cdiv(num_candidates, BLOCK_CANDIDATES), z_QC.device)
    scores, ids = _slots(parts, num_queries, z_QC.device)
    _nearest_candidates_kernel[row_grid(num_queries, parts)](
        z_QC.contiguous(), weight.words, weight.exponents, candidates_QM.contiguous(), scores, ids,
        num_candidates, num_columns, weight.exponents.shape[1], weight.words.shape[1], num_queries, parts,
        GROUP_SIZE=weight.group_size, BLOCK_M=BLOCK_CANDIDATES, BLOCK_C=block_columns(num_columns),
    )  # fmt: skip
    return _best_of(scores, ids)


def candidates(z_QC: Tensor, num_codes: int, sign_bits: int, num_probes: int) -> Tensor:
    """Launch `candidate_codes`; returns int64 [Q, probes * bucket]."""
    runs_here(z_QC)
    bucket = -(-num_codes // 2**sign_bits)
    out = torch.empty(z_QC.shape[0], num_probes * bucket, dtype=torch.int64, device=z_QC.device)
    if out.numel():
        slot_blocks = triton.cdiv(bucket, BLOCK_SLOTS)
        _candidate_codes_kernel[row_grid(z_QC.shape[0] * num_probes, slot_blocks)](
            z_QC.contiguous(), probe_sets(sign_bits, num_probes, z_QC.device), out,
            num_codes, z_QC.shape[1], num_probes, bucket, slot_blocks,
            SIGN_BITS=sign_bits, BLOCK=BLOCK_SLOTS,
        )  # fmt: skip
    return out


def _slots(parts: int, num_queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return room for the best score and code of each part."""
    return (
        torch.empty(parts, num_queries, dtype=torch.float32, device=device),
        torch.empty(parts, num_queries, dtype=torch.int64, device=device),
    )


def _best_of(scores_SQ: Tensor, ids_SQ: Tensor) -> Tensor:
    """Return the best code of all parts, -1 where there is none."""
    parts, num_queries = scores_SQ.shape
    out = torch.empty(num_queries, dtype=torch.int64, device=scores_SQ.device)
    _best_of_parts_kernel[(triton.cdiv(num_queries, BLOCK_PARTS),)](
        scores_SQ, ids_SQ, out, num_queries, parts, BLOCK_S=BLOCK_PARTS, BLOCK_Q=BLOCK_PARTS
    )
    return out
