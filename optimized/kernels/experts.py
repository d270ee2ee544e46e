"""Expert kernels: products of slots with the matrix of their expert, which is read as packed words.

Legend: E experts, N outputs of an expert, K inputs, M slots, S parts of a sum; KW words a row, KG groups a row.

Slots come in any order. Where there are many, they are sorted by expert (`Plan`) and cut into tiles of one expert each: a launch
has as many programs as tiles there could be, and those without a tile leave. Where there are few, each reads the packed rows
of its own expert. Which of the two, and every grid, follow from shapes alone, so that nothing waits for the device.

Both unpack on their way into the product. For `tl.dot` a thread takes a word and makes its sixteen weights, so that they lie in
a row and go to shared memory sixteen bytes at a time. Left to itself, Triton spreads the lanes of a word over threads, and the
tile then costs more to lay out than to multiply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_weights, level_scales, narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.layouts import TRITS_PER_WORD, DeviceWeight

FEW_OUTPUTS, FEW_INPUTS = 8, 256
"""Tile of a weight, rows and columns, when few slots read packed rows and sum over columns."""

FEW_SUMMED, FEW_COLUMNS, PART = 16, 128, 512
"""Tile of a weight when few slots sum over its rows, and the rows of a part, which is summed by one program."""

MOST_PARTS = 64


@triton.jit
def _lane_pairs(
    words, s0, s1, s2, s3, offsets, LANE: tl.constexpr, STEP: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return two weights each, as bfloat16 in the halves of an int32, of the lanes LANE, LANE + STEP, ... of words.

    Their axes of two come after those of `words`, the lane's highest bit first, and stay in the thread that has the word.
    s0 .. s3: bits of the scales of a word's groups, as bfloat16; offsets: columns of the first that lie before the word.
    """
    if STEP < 16:
        even = _lane_pairs(words, s0, s1, s2, s3, offsets, LANE, 2 * STEP, GROUP_SIZE, RUN)
        odd = _lane_pairs(words, s0, s1, s2, s3, offsets, LANE + STEP, 2 * STEP, GROUP_SIZE, RUN)
        return tl.join(even, odd)
    else:
        # A group starts every RUN lanes at most, and before a word at most GROUP_SIZE - RUN columns.
        first: tl.constexpr = LANE // RUN * RUN
        scales = s0
        if first + GROUP_SIZE - RUN >= GROUP_SIZE:
            scales = tl.where(offsets + first >= GROUP_SIZE, s1, scales)
        if first + GROUP_SIZE - RUN >= 2 * GROUP_SIZE:
            scales = tl.where(offsets + first >= 2 * GROUP_SIZE, s2, scales)
        if first + GROUP_SIZE - RUN >= 3 * GROUP_SIZE:
            scales = tl.where(offsets + first >= 3 * GROUP_SIZE, s3, scales)
        # The lanes' low bits, that say nonzero, go to bits 0 and 16, their high bits, the signs, to bits 1 and 17.
        codes = ((words >> (2 * LANE)) & 15) * 0x4001
        return (codes & 0x10001) * scales + ((codes & 0x20002) << 14)


@triton.jit
def _weight_tile(
    words, l0, l1, l2, l3, offsets, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, MANTISSA_BITS: tl.constexpr,
):  # fmt: skip
    """Return the bfloat16 weights [ROWS, COLUMNS] of words [ROWS, COLUMNS / 16] and of the levels of their groups.

    Exact: a scale has two mantissa bits at most, and the exponents of bfloat16 are those of float32.
    """
    s0, s1 = _scale_bits(l0, MANTISSA_BITS), _scale_bits(l1, MANTISSA_BITS)
    s2, s3 = _scale_bits(l2, MANTISSA_BITS), _scale_bits(l3, MANTISSA_BITS)
    pairs = _lane_pairs(words, s0, s1, s2, s3, offsets, 0, 2, GROUP_SIZE, RUN)
    bits = tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), [ROWS, COLUMNS])
    # After the reshape, which Triton 3.6 cannot move past the copy to shared memory and would try to.
    return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def _scale_bits(levels, MANTISSA_BITS: tl.constexpr):
    """Return the bits of int8 levels' scales as bfloat16, in int32: `level_scales`, sixteen bits lower."""
    return (levels.to(tl.int32) + (127 << MANTISSA_BITS)) << (7 - MANTISSA_BITS)


@triton.jit
def _word_levels(rows_ptr, first, row_groups, SPAN: tl.constexpr):
    """Return the levels of the groups that a word can have a part of: `first` and SPAN - 1 more, of four in all."""
    l0 = _levels(rows_ptr, first, row_groups)
    l1, l2, l3 = l0, l0, l0
    if SPAN > 1:
        l1 = _levels(rows_ptr, first + 1, row_groups)
    if SPAN > 2:
        l2, l3 = _levels(rows_ptr, first + 2, row_groups), _levels(rows_ptr, first + 3, row_groups)
    return l0, l1, l2, l3


@triton.jit
def _levels(rows_ptr, group, row_groups):
    """Return the level of a group of each row, where there is one.

    Groups of neighbouring words are near each other, which Triton 3.6 does not see: the hint has it give levels to the threads
    that have the words. Loads stay single bytes, as nothing is known of a row's alignment (`row_groups` is not specialised).
    """
    return tl.load(tl.max_contiguous(rows_ptr + group, [1, 2]), mask=group < row_groups, other=0)


@triton.jit(do_not_specialize=["num_rows", "row_words", "row_groups", "column_blocks"])
def _grouped_product_kernel(
    x_ptr, words_ptr, exponents_ptr, out_ptr, order_ptr, starts_ptr, tile_ends_ptr,
    input_parts, output_parts, num_rows, row_words, row_groups, column_blocks,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, INPUT_PART: tl.constexpr, OUTPUT_PART: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, SPAN: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_inputs, num_outputs = input_parts * INPUT_PART, output_parts * OUTPUT_PART
    tile = tl.program_id(0) // column_blocks
    first_output = (tl.program_id(0) % column_blocks) * BLOCK_N
    outputs = first_output + tl.arange(0, BLOCK_N)
    groups = tl.arange(0, GROUP_BLOCK)
    tile_ends = tl.load(tile_ends_ptr + groups, mask=groups <= GROUPS, other=2147483647)
    group = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    if group > GROUPS:
        return
    # Tiles of a group follow each other: count from the end of the group before.
    first = tile - tl.max(tl.where(tile_ends <= tile, tile_ends, 0), axis=0)
    places = tl.load(starts_ptr + group) + first * BLOCK_M + tl.arange(0, BLOCK_M)
    used = places < tl.load(starts_ptr + group + 1)
    slots = tl.load(order_ptr + places, mask=used, other=0)
    sums = tl.zeros([BLOCK_N, BLOCK_M] if WEIGHT_FIRST else [BLOCK_M, BLOCK_N], dtype=tl.float32)
    if group < GROUPS:  # the group past the last holds the unused slots, whose output is zero
        inputs = tl.arange(0, BLOCK_K)
        x_tile_ptr = x_ptr + slots[:, None] * num_inputs + inputs[None, :]
        first_row = group.to(tl.int64) * num_rows
        # A tile of the weight has rows and columns as the weight has: summed over its columns, or over its rows.
        if TRANSPOSED:
            rows, word = inputs, first_output // 16 + tl.arange(0, BLOCK_N // 16)[None, :]
        else:
            rows, word = outputs, tl.arange(0, BLOCK_K // 16)[None, :]
        level = word * 16 // GROUP_SIZE
        offsets = word * 16 - level * GROUP_SIZE
        # Rows past the last are the last again: their sums are not stored, or their x is zero.
        row = first_row + tl.minimum(rows, num_rows - 1)[:, None]
        words_row_ptr, levels_row_ptr = words_ptr + row * row_words, exponents_ptr + row * row_groups
        # What the next tile unpacks is read before this one is multiplied.
        words = tl.load(words_row_ptr + word, mask=word < row_words, other=0)
        l0, l1, l2, l3 = _word_levels(levels_row_ptr, level, row_groups, SPAN)
        for start in range(0, num_inputs, BLOCK_K):
            if TRANSPOSED:
                w = _weight_tile(
                    words, l0, l1, l2, l3, offsets, BLOCK_K, BLOCK_N, GROUP_SIZE, RUN, MANTISSA_BITS
                )
                row = first_row + tl.minimum(start + BLOCK_K + rows, num_rows - 1)[:, None]
                words_row_ptr, levels_row_ptr = words_ptr + row * row_words, exponents_ptr + row * row_groups
                next_word = word
            else:
                w = _weight_tile(
                    words, l0, l1, l2, l3, offsets, BLOCK_N, BLOCK_K, GROUP_SIZE, RUN, MANTISSA_BITS
                )
                next_word = word + (start + BLOCK_K) // 16
                offsets += BLOCK_K % GROUP_SIZE
                over = offsets >= GROUP_SIZE
                level += tl.where(over, BLOCK_K // GROUP_SIZE + 1, BLOCK_K // GROUP_SIZE)
                offsets = tl.where(over, offsets - GROUP_SIZE, offsets)
            words = tl.load(words_row_ptr + next_word, mask=next_word < row_words, other=0)
            l0, l1, l2, l3 = _word_levels(levels_row_ptr, level, row_groups, SPAN)
            x_mask = used[:, None] & (start + inputs < num_inputs)[None, :]
            x = tl.load(x_tile_ptr + start, mask=x_mask, other=0.0)
            if WIDE:
                x, w = widen(x), widen(w)
            if WEIGHT_FIRST:
                if TRANSPOSED:
                    w = tl.trans(w)
                sums = tl.dot(w, tl.trans(x), sums)
            else:
                if not TRANSPOSED:
                    w = tl.trans(w)
                if WIDE:
                    sums += tl.dot(x, w, input_precision="ieee")
                else:
                    sums = tl.dot(x, w, sums)
    if WEIGHT_FIRST:
        sums = tl.trans(sums)
    out_mask = used[:, None] & (outputs < num_outputs)[None, :]
    values = narrow(sums, out_ptr.dtype.element_ty)
    tl.store(out_ptr + slots[:, None] * num_outputs + outputs[None, :], values, mask=out_mask)


@triton.jit(do_not_specialize=["row_blocks", "column_blocks"])
def _grouped_weight_grad_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, starts_ptr, num_outputs, num_inputs, row_blocks, column_blocks,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // column_blocks
    group = tile // row_blocks
    outputs = (tile % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        used = places < end
        slots = tl.load(order_ptr + places, mask=used, other=0)
        grad_mask = used[:, None] & (outputs < num_outputs)[None, :]
        grad = tl.load(grad_ptr + slots[:, None] * num_outputs + outputs[None, :], mask=grad_mask, other=0.0)
        x_mask = used[:, None] & (inputs < num_inputs)[None, :]
        x = tl.load(x_ptr + slots[:, None] * num_inputs + inputs[None, :], mask=x_mask, other=0.0)
        if WIDE:
            sums += tl.dot(tl.trans(widen(grad)), widen(x), input_precision="ieee")
        else:
            sums = tl.dot(tl.trans(grad), x, sums)
    rows = group.to(tl.int64) * num_outputs + outputs
    mask = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    tl.store(out_ptr + rows[:, None] * num_inputs + inputs[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["row_groups", "row_words", "row_blocks"])
def _few_slots_kernel(
    x_ptr, experts_ptr, words_ptr, exponents_ptr, out_ptr, num_outputs, num_inputs, row_groups, row_words, row_blocks,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot = (tl.program_id(0) // row_blocks).to(tl.int64)
    outputs = (tl.program_id(0) % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(experts_ptr + slot)
    used = outputs < tl.where(expert >= 0, num_outputs, 0)  # an unused slot reads nothing
    rows = expert * num_outputs + outputs
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        inside = inputs < tl.where(expert >= 0, num_inputs, 0)
        mask = used[:, None] & inside[None, :]
        words = tl.load(words_ptr + rows[:, None] * row_words + (inputs // 16)[None, :], mask=mask, other=0)
        at = rows[:, None] * row_groups + (inputs // GROUP_SIZE)[None, :]
        scales = level_scales(tl.load(exponents_ptr + at, mask=mask, other=0), MANTISSA_BITS)
        x = widen(tl.load(x_ptr + slot * num_inputs + inputs, mask=inside, other=0.0))
        sums += lane_weights(words, (inputs % 16)[None, :], scales) * x[None, :]
    values = narrow(tl.sum(sums, axis=1), out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot * num_outputs + outputs, values, mask=outputs < num_outputs)


@triton.jit(
    do_not_specialize=["num_slots", "row_groups", "row_words", "part_rows", "num_parts", "column_blocks"]
)
def _few_slots_grad_kernel(
    grad_ptr, experts_ptr, words_ptr, exponents_ptr, parts_ptr,
    num_slots, num_outputs, num_inputs, row_groups, row_words, part_rows, num_parts, column_blocks,
    GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    slot = (tl.program_id(0) // column_blocks // num_parts).to(tl.int64)
    part = tl.program_id(0) // column_blocks % num_parts
    inputs = (tl.program_id(0) % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.load(experts_ptr + slot)
    inside = inputs < tl.where(expert >= 0, num_inputs, 0)  # an unused slot reads nothing
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, part_rows, BLOCK_N):
        outputs = part * part_rows + start + tl.arange(0, BLOCK_N)
        used = outputs < tl.where(expert >= 0, num_outputs, 0)
        rows = expert * num_outputs + outputs
        mask = used[:, None] & inside[None, :]
        words = tl.load(words_ptr + rows[:, None] * row_words + (inputs // 16)[None, :], mask=mask, other=0)
        at = rows[:, None] * row_groups + (inputs // GROUP_SIZE)[None, :]
        scales = level_scales(tl.load(exponents_ptr + at, mask=mask, other=0), MANTISSA_BITS)
        grad = widen(tl.load(grad_ptr + slot * num_outputs + outputs, mask=used, other=0.0))
        sums += lane_weights(words, (inputs % 16)[None, :], scales) * grad[:, None]
    at = (part * num_slots.to(tl.int64) + slot) * num_inputs + inputs
    tl.store(parts_ptr + at, tl.sum(sums, axis=0), mask=inputs < num_inputs)


@dataclass(frozen=True)
class Plan:
    """Slots by expert, on the device.

    order:  int64 [M], slots in ascending order of their expert, the unused ones last.
    starts: int64 [E + 2], where each expert's slots begin in `order`; then the unused ones, then the end.
    """

    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, experts_M: Tensor, num_groups: int) -> Plan:
        """Return the plan of slots; sorting is stable, so sums run in an order that depends on the slots alone."""
        keys_M = torch.where(experts_M < 0, num_groups, experts_M).to(torch.int32)
        sorted_M, order = torch.sort(keys_M, stable=True)
        bounds = torch.arange(num_groups + 2, dtype=torch.int32, device=keys_M.device)
        return cls(order, torch.searchsorted(sorted_M, bounds))

    def tile_ends(self, block: int) -> Tensor:
        """Return where each expert's tiles of `block` slots end, int32 [E + 1], the unused slots' last."""
        tiles = (self.starts.diff() + (block - 1)) // block
        return tiles.cumsum(0, dtype=torch.int32)


@dataclass(frozen=True)
class Tiling:
    """Tile of a grouped product, how many warps work on it, and which operand comes first."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    weight_first: bool = False

    @classmethod
    def of(cls, num_slots: int, num_groups: int, *, transposed: bool, wide: bool) -> Tiling:
        """Return the tile for the slots that an expert has on average; widths of a matrix may be less.

        Each tile of slots unpacks its matrix again, so it is as high as the slots can fill. Of the tiles tried on an H100, with
        groups of 12, these were the fastest, or near it and far from spilling registers.
        """
        average = triton.cdiv(num_slots, num_groups)
        if wide:
            return cls(16 if average <= 16 else 32, 64, 32, 4)
        if average <= 16:  # the weight's rows fill the 64 of a warp group's product, which 16 slots would not
            return cls(16, 128, 64, 4, weight_first=True)
        if average <= 64:
            return cls(64, 128, 64, 8 if transposed else 4)
        return cls(128, 128, 64, 4) if average <= 128 else cls(256, 64, 64, 8)


def grouped_product(
    x: Tensor, weight: DeviceWeight, plan: Plan, num_groups: int, *, transposed: bool
) -> Tensor:
    """Return x W_e^T, or x W_e, of each slot, in the dtype of x [M, outputs]; zeros for unused slots. One launch."""
    runs_here(x)
    num_slots, num_inputs = x.shape
    num_rows, num_columns = weight.shape[0] // num_groups, weight.shape[1]
    num_outputs = num_columns if transposed else num_rows
    out = torch.empty(num_slots, num_outputs, dtype=x.dtype, device=x.device)
    wide = multiplies_wide(x)
    tiling = Tiling.of(num_slots, num_groups, transposed=transposed, wide=wide)
    # Four threads share the summed axis, and Triton 3.6 may give each 8 neighbours of it: of 16 columns, two threads would
    # have what the other two have, and the product would count that twice.
    least_k = 16 if wide else 32
    block_n, block_k = _block(num_outputs, tiling.block_n), _block(num_inputs, tiling.block_k, least=least_k)
    tiles, column_blocks = (
        triton.cdiv(num_slots, tiling.block_m) + num_groups + 1,
        triton.cdiv(num_outputs, block_n),
    )
    # Widths as parts of 16 bytes where they are: Triton would see that of multiples of 16 columns only.
    input_part, output_part = math.gcd(num_inputs, 8), math.gcd(num_outputs, 8)
    run = math.gcd(weight.group_size, TRITS_PER_WORD)
    _grouped_product_kernel[row_grid(tiles, column_blocks)](
        x, weight.words, weight.exponents, out, plan.order, plan.starts, plan.tile_ends(tiling.block_m),
        num_inputs // input_part, num_outputs // output_part, num_rows,
        weight.words.shape[1], weight.exponents.shape[1], column_blocks,
        GROUPS=num_groups, GROUP_BLOCK=triton.next_power_of_2(num_groups + 1),
        INPUT_PART=input_part, OUTPUT_PART=output_part, GROUP_SIZE=weight.group_size, RUN=run,
        SPAN=triton.cdiv(weight.group_size - run + TRITS_PER_WORD, weight.group_size),
        MANTISSA_BITS=weight.mantissa_bits, TRANSPOSED=transposed, WIDE=wide, WEIGHT_FIRST=tiling.weight_first,
        BLOCK_M=tiling.block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=tiling.num_warps, num_stages=3,
    )  # fmt: skip
    return out


def weight_grad(grad_MN: Tensor, x_MK: Tensor, plan: Plan, num_groups: int) -> Tensor:
    """Launch `grouped_linear_weight_grad`; returns float32 [E N, K]."""
    runs_here(grad_MN)
    num_outputs, num_inputs, wide = grad_MN.shape[1], x_MK.shape[1], multiplies_wide(x_MK)
    out = torch.empty(num_groups * num_outputs, num_inputs, dtype=torch.float32, device=x_MK.device)
    block_n, block_k = _block(num_outputs, 64 if wide else 128), _block(num_inputs, 64 if wide else 128)
    row_blocks, column_blocks = triton.cdiv(num_outputs, block_n), triton.cdiv(num_inputs, block_k)
    _grouped_weight_grad_kernel[row_grid(num_groups * row_blocks, column_blocks)](
        grad_MN, x_MK, out, plan.order, plan.starts, num_outputs, num_inputs, row_blocks, column_blocks,
        WIDE=wide, BLOCK_M=32, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return out


def few_slots(x_MK: Tensor, weight: DeviceWeight, experts_M: Tensor, num_rows: int) -> Tensor:
    """Launch `grouped_linear` for few slots, from the packed rows of their experts alone; returns the dtype of x [M, N]."""
    runs_here(x_MK)
    num_slots, num_columns = x_MK.shape
    out = torch.empty(num_slots, num_rows, dtype=x_MK.dtype, device=x_MK.device)
    row_blocks = triton.cdiv(num_rows, FEW_OUTPUTS)
    _few_slots_kernel[row_grid(num_slots, row_blocks)](
        x_MK, experts_M, weight.words, weight.exponents, out, num_rows, num_columns,
        weight.exponents.shape[1], weight.words.shape[1], row_blocks,
        GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits,
        BLOCK_N=FEW_OUTPUTS, BLOCK_K=_block(num_columns, FEW_INPUTS),
    )  # fmt: skip
    return out


def few_slots_grad(grad_MN: Tensor, weight: DeviceWeight, experts_M: Tensor) -> Tensor:
    """Launch `grouped_linear_input_grad` for few slots, likewise; returns the dtype of the gradient [M, K].

    The sum over an expert's many rows is cut into parts, which depend on shapes alone and are added in their order.
    """
    runs_here(grad_MN)
    num_slots, num_rows = grad_MN.shape
    num_columns = weight.shape[1]
    part_rows = max(PART, -(-triton.cdiv(num_rows, MOST_PARTS) // FEW_SUMMED) * FEW_SUMMED)
    num_parts = triton.cdiv(num_rows, part_rows)
    parts = torch.empty(num_parts, num_slots, num_columns, dtype=torch.float32, device=grad_MN.device)
    block_k = _block(num_columns, FEW_COLUMNS)
    column_blocks = triton.cdiv(num_columns, block_k)
    _few_slots_grad_kernel[row_grid(num_slots * num_parts, column_blocks)](
        grad_MN, experts_M, weight.words, weight.exponents, parts, num_slots, num_rows, num_columns,
        weight.exponents.shape[1], weight.words.shape[1], min(part_rows, num_rows), num_parts, column_blocks,
        GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK_N=FEW_SUMMED, BLOCK_K=block_k,
    )  # fmt: skip
    return (parts[0] if num_parts == 1 else parts.sum(dim=0)).to(grad_MN.dtype)


def multiplies_wide(x: Tensor) -> bool:
    """Whether `tl.dot` must have float32 operands: of float32, and in the interpreter, whose bfloat16 product is wrong."""
    return x.dtype is torch.float32 or x.device.type == "cpu"


def _block(size: int, most: int, *, least: int = 16) -> int:
    """Return the elements of a tile along `size`: a power of two from `least`, 16 of which `tl.dot` needs, to `most`."""
    return max(least, row_tile(size, most)[0])
