"""Products with a packed weight, or with the matrix of each slot's expert in a stack, which is unpacked on the way.

Legend: E experts, N outputs of an expert, K inputs, M slots, S parts of a sum; KW words a row, KG groups a row.

Slots are cut into tiles that share a matrix. Slots of a single matrix keep their order. Many slots of several experts are sorted by
expert (`Plan`). Few slots get a tile each. A launch has a program for every tile that there could be, and programs without a tile
return at once. For few rows or slots the sums are cut into parts (`parts`), because few tiles alone would not occupy a GPU. All
cuts follow from shapes, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.kernels.parts import add_parts, parts_of
from arbitor.optimized.kernels.slots import Plan, group_of_tile
from arbitor.optimized.kernels.tiles import run_of, scale_bits, span_of, weight_tile, word_levels
from arbitor.optimized.layouts import DeviceWeight

PROGRAMS = 528
"""Programs up to which a sum is cut into parts: four for each multiprocessor of an H100 or H200."""

IN_ORDER, ONE_EACH, SORTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""How slots are cut into tiles."""


@triton.jit
def _bfloat16_tile(
    words, l0, l1, l2, l3, offsets, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, MANTISSA_BITS: tl.constexpr,
):  # fmt: skip
    """Return the bfloat16 weights [ROWS, COLUMNS] of words [ROWS, COLUMNS / 16] and of the levels of their groups.

    Exact: a scale has two mantissa bits at most, and the exponents of bfloat16 are those of float32.
    """
    s0, s1 = scale_bits(l0, MANTISSA_BITS), scale_bits(l1, MANTISSA_BITS)
    s2, s3 = scale_bits(l2, MANTISSA_BITS), scale_bits(l3, MANTISSA_BITS)
    return weight_tile(words, s0, s1, s2, s3, offsets, ROWS, COLUMNS, GROUP_SIZE, RUN, tl.bfloat16)


@triton.jit
def _slots_of_tile(
    tile, experts_ptr, order_ptr, starts_ptr, num_slots,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return the group of a tile, its slots, and the mask of slots that count. Group E holds unused slots; above it is no tile."""
    lanes = tl.arange(0, BLOCK_M)
    if TILES == IN_ORDER:
        slots = tile.to(tl.int64) * BLOCK_M + lanes
        return 0, slots, slots < num_slots
    elif TILES == ONE_EACH:
        expert = tl.load(experts_ptr + tile).to(tl.int32)
        return tl.where(expert < 0, GROUPS, expert), tile.to(tl.int64) + lanes, lanes == 0
    else:
        group, first = group_of_tile(starts_ptr, tile, GROUPS + 1, GROUP_BLOCK, BLOCK_M)
        bounds_ptr = starts_ptr + tl.minimum(group, GROUPS)
        places = tl.load(bounds_ptr) + first * BLOCK_M + lanes
        used = places < tl.where(group > GROUPS, 0, tl.load(bounds_ptr + 1))
        return group, tl.load(order_ptr + places, mask=used, other=0), used


@triton.jit(
    do_not_specialize=[
        "num_slots",
        "num_rows",
        "row_words",
        "row_groups",
        "column_blocks",
        "num_parts",
        "part_steps",
    ]
)
def _packed_product_kernel(
    x_ptr, words_ptr, exponents_ptr, out_ptr, experts_ptr, order_ptr, starts_ptr,
    input_units, output_units, num_slots, num_rows, row_words, row_groups, column_blocks, num_parts, part_steps,
    TILES: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, INPUT_UNIT: tl.constexpr, OUTPUT_UNIT: tl.constexpr,
    SLOTS_OF_ROW: tl.constexpr,
    GROUP_SIZE: tl.constexpr, RUN: tl.constexpr, SPAN: tl.constexpr, MANTISSA_BITS: tl.constexpr,
    TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_inputs, num_outputs = input_units * INPUT_UNIT, output_units * OUTPUT_UNIT
    tile_of_part = tl.program_id(0) // column_blocks
    first_output = (tl.program_id(0) % column_blocks) * BLOCK_N
    outputs = first_output + tl.arange(0, BLOCK_N)
    # Sorted slots have uncut sums. The bounds are then constants, and the kernel computes nothing for them.
    if TILES == SORTED:
        tile, first_slot, begin, end = tile_of_part, 0, 0, num_inputs
    else:
        tile, part = tile_of_part // num_parts, tile_of_part % num_parts
        first_slot, begin = part.to(tl.int64) * num_slots, part * part_steps * BLOCK_K
        end = tl.minimum(begin + part_steps * BLOCK_K, num_inputs)
    group, slots, used = _slots_of_tile(
        tile,
        experts_ptr,
        order_ptr,
        starts_ptr,
        num_slots,
        GROUPS,
        GROUP_BLOCK,
        TILES,
        BLOCK_M,
    )
    if group > GROUPS:
        return
    sums = tl.zeros([BLOCK_N, BLOCK_M] if WEIGHT_FIRST else [BLOCK_M, BLOCK_N], dtype=tl.float32)
    # The group past the last holds the unused slots, whose output is zero.
    if group < GROUPS:
        inputs = tl.arange(0, BLOCK_K)
        x_tile_ptr = x_ptr + (slots // SLOTS_OF_ROW)[:, None] * num_inputs + inputs[None, :]
        first_row = tl.cast(group, tl.int64) * num_rows
        # A tile lies as the weight lies. The sum runs over its columns, or over its rows if transposed.
        if TRANSPOSED:
            rows, word = begin + inputs, first_output // 16 + tl.arange(0, BLOCK_N // 16)[None, :]
        else:
            rows, word = outputs, begin // 16 + tl.arange(0, BLOCK_K // 16)[None, :]
        level = word * 16 // GROUP_SIZE
        offsets = word * 16 - level * GROUP_SIZE
        # A row past the last is read as the last. Its sums are not stored, or its x is zero.
        row = first_row + tl.minimum(rows, num_rows - 1)[:, None]
        words_row_ptr, levels_row_ptr = words_ptr + row * row_words, exponents_ptr + row * row_groups
        # The words and levels of the next tile are read before this tile is multiplied.
        words = tl.load(words_row_ptr + word, mask=word < row_words, other=0)
        l0, l1, l2, l3 = word_levels(levels_row_ptr, level, row_groups, SPAN)
        for start in range(begin, end, BLOCK_K):
            if TRANSPOSED:
                w = _bfloat16_tile(
                    words, l0, l1, l2, l3, offsets, BLOCK_K, BLOCK_N, GROUP_SIZE, RUN, MANTISSA_BITS
                )
                row = first_row + tl.minimum(start + BLOCK_K + inputs, num_rows - 1)[:, None]
                words_row_ptr, levels_row_ptr = words_ptr + row * row_words, exponents_ptr + row * row_groups
                next_word = word
            else:
                w = _bfloat16_tile(
                    words, l0, l1, l2, l3, offsets, BLOCK_N, BLOCK_K, GROUP_SIZE, RUN, MANTISSA_BITS
                )
                next_word = word + (start - begin + BLOCK_K) // 16
                offsets += BLOCK_K % GROUP_SIZE
                over = offsets >= GROUP_SIZE
                level += tl.where(over, BLOCK_K // GROUP_SIZE + 1, BLOCK_K // GROUP_SIZE)
                offsets = tl.where(over, offsets - GROUP_SIZE, offsets)
            words = tl.load(words_row_ptr + next_word, mask=next_word < row_words, other=0)
            l0, l1, l2, l3 = word_levels(levels_row_ptr, level, row_groups, SPAN)
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
    out_slots = first_slot + slots
    tl.store(out_ptr + out_slots[:, None] * num_outputs + outputs[None, :], values, mask=out_mask)


@dataclass(frozen=True)
class Tiling:
    """Tile of a product, how many warps work on it, and which operand comes first."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    weight_first: bool = False

    @classmethod
    def of(cls, num_slots: int, num_groups: int, rank: int, *, transposed: bool, wide: bool) -> Tiling:
        """Return the tile for the slots that an expert has on average, and for the lesser width of its matrix.

        Each tile of slots unpacks its matrix again. So a tile is as high as the slots can fill, unless there is little to unpack.
        Among the tiles tried on an H100, with groups of 12, these were the fastest, or nearly so and far from spilling registers.
        """
        average = triton.cdiv(num_slots, num_groups)
        if wide:
            return cls(16 if average <= 16 else 32, 64, 32, 4)
        # The weight's rows fill the 64 rows of a warp group's product. 16 slots would not.
        if average <= 16:
            return cls(16, 128 if transposed else 64, 64 if transposed else 128, 4, weight_first=True)
        if average <= 64:
            return cls(64, 128, 64, 8 if transposed else 4)
        if rank <= 64:
            return cls(128, 64, 64, 4)
        return cls(128, 128, 64, 4) if average <= 128 else cls(256, 64, 64, 8)

    def within(self, num_outputs: int, num_inputs: int) -> Tiling:
        """Return the tile for a matrix of these widths."""
        # Four threads share the summed axis, and Triton 3.6 may give each thread 8 neighbours. Of 16 columns, two threads would
        # hold the columns of the other two, and the product would count them twice.
        block_k = max(32, row_tile(num_inputs, self.block_k)[0])
        return replace(self, block_n=tile_width(num_outputs, self.block_n), block_k=block_k)

    def parts(self, num_outputs: int, num_inputs: int) -> tuple[int, int]:
        """Return how many parts the sums of a tile of slots have, and the tiles along a part.

        Both follow from the widths and the tile alone. Among slots of one tile's height, the bits of one slot therefore do not
        depend on how many slots come with it. A part of a tall tile writes many sums, so a tall tile has fewer parts.
        """
        programs, steps = triton.cdiv(num_outputs, self.block_n), triton.cdiv(num_inputs, self.block_k)
        enough = PROGRAMS if self.block_m <= 16 else PROGRAMS // 2
        part_steps, num_parts = parts_of(steps, max(1, enough // programs))
        return num_parts, part_steps


def packed_product(
    x: Tensor,
    weight: DeviceWeight,
    *,
    transposed: bool,
    num_groups: int = 1,
    experts_M: Tensor | None = None,
    plan: Plan | None = None,
    slots_of_row: int = 1,
) -> Tensor:
    """Return x W^T, or x W, in the dtype of x [M, outputs]: with one matrix, or with that of each slot's expert in a stack.

    num_groups:   matrices of the stack; unused slots become zeros
    experts_M:    int64 [M], contiguous, for few slots, each of which reads its own matrix
    plan:         for many slots, the plan by which they share matrices
    slots_of_row: neighbouring slots that read one row of x, which has M / slots_of_row rows
    """
    runs_here(x)
    num_slots, num_inputs = x.shape[0] * slots_of_row, x.shape[1]
    num_rows, num_columns = weight.shape[0] // num_groups, weight.shape[1]
    num_outputs = num_columns if transposed else num_rows
    wide = multiplies_wide(x)
    of_slots, rank = 1 if experts_M is not None else num_slots, min(num_rows, num_columns)
    tiling = Tiling.of(of_slots, num_groups, rank, transposed=transposed, wide=wide)
    tiling = tiling.within(num_outputs, num_inputs)
    column_blocks = triton.cdiv(num_outputs, tiling.block_n)
    num_parts, part_steps = tiling.parts(num_outputs, num_inputs)
    if experts_M is not None:
        tiles, cut = num_slots, ONE_EACH
    elif plan is None:
        tiles, cut = triton.cdiv(num_slots, tiling.block_m), IN_ORDER
    else:
        tiles, cut = triton.cdiv(num_slots, tiling.block_m) + num_groups + 1, SORTED
        num_parts, part_steps = 1, triton.cdiv(num_inputs, tiling.block_k)
    out = torch.empty(num_slots, num_outputs, dtype=x.dtype, device=x.device)
    sums = out if num_parts == 1 else torch.empty(num_parts, *out.shape, dtype=torch.float32, device=x.device)
    # Widths that are multiples of 16 bytes come in that unit. By itself Triton would notice only multiples of 16 columns.
    input_unit, output_unit = math.gcd(num_inputs, 8), math.gcd(num_outputs, 8)
    _packed_product_kernel[row_grid(tiles * column_blocks, num_parts)](
        x, weight.words, weight.exponents, sums, experts_M,
        *((None, None) if plan is None else (plan.order, plan.starts)),
        num_inputs // input_unit, num_outputs // output_unit, num_slots, num_rows,
        weight.words.shape[1], weight.exponents.shape[1], column_blocks, num_parts, part_steps,
        TILES=cut.value, GROUPS=num_groups, GROUP_BLOCK=triton.next_power_of_2(num_groups + 1),
        INPUT_UNIT=input_unit, OUTPUT_UNIT=output_unit, SLOTS_OF_ROW=slots_of_row, GROUP_SIZE=weight.group_size,
        RUN=run_of(weight.group_size), SPAN=span_of(weight.group_size), MANTISSA_BITS=weight.mantissa_bits,
        TRANSPOSED=transposed, WIDE=wide, WEIGHT_FIRST=tiling.weight_first,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, num_warps=tiling.num_warps, num_stages=3,
    )  # fmt: skip
    return out if num_parts == 1 else add_parts(sums, out)


def multiplies_wide(x: Tensor) -> bool:
    """Return whether `tl.dot` must have float32 operands: for float32, and in the interpreter, whose bfloat16 product is wrong."""
    return x.dtype is torch.float32 or x.device.type == "cpu"


def tile_width(size: int, most: int) -> int:
    """Return the elements of a tile along `size`: a power of two from 16, which `tl.dot` needs, to `most`."""
    return max(16, row_tile(size, most)[0])
