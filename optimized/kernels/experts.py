"""Expert kernels: products of slots with the matrix of their expert, from packed words or from dense matrices.

Legend: E experts, N outputs of an expert, K inputs, M slots, S parts of a sum; KW words a row, KG groups a row.

Slots come in any order. Where there are many, they are sorted by expert (`Plan`) and cut into tiles of one expert each: a launch
has as many programs as tiles there could be, and those without a tile leave. Where there are few, each reads the packed rows
of its own expert. Which of the two, and every grid, follow from shapes alone, so that nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import lane_weights, level_scales, narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.layouts import DeviceWeight

BLOCK_COLUMNS = 1024
"""Columns of a tile when matrices are unpacked."""

FEW_OUTPUTS, FEW_INPUTS = 8, 256
"""Tile of a weight, rows and columns, when few slots read packed rows and sum over columns."""

FEW_SUMMED, FEW_COLUMNS, PART = 16, 128, 512
"""Tile of a weight when few slots sum over its rows, and the rows of a part, which is summed by one program."""

MOST_PARTS = 64


@triton.jit(do_not_specialize=["num_rows", "window_rows", "first_row", "first_column", "row_blocks"])
def _dense_window_kernel(
    words_ptr, exponents_ptr, out_ptr, num_rows, window_rows, first_row, first_column, window_columns,
    row_groups, row_words, row_blocks, GROUP_SIZE: tl.constexpr, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = slot // window_rows * num_rows + first_row + slot % window_rows
    places = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    columns = first_column + places
    mask = places < window_columns
    words = tl.load(words_ptr + row * row_words + columns // 16, mask=mask, other=0)
    levels = tl.load(exponents_ptr + row * row_groups + columns // GROUP_SIZE, mask=mask, other=0)
    values = lane_weights(words, columns % 16, level_scales(levels, MANTISSA_BITS))
    tl.store(out_ptr + slot * window_columns + places, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["column_blocks"])
def _grouped_product_kernel(
    x_ptr, w_ptr, out_ptr, order_ptr, starts_ptr, tile_ends_ptr, num_inputs, num_outputs, out_width, column_blocks,
    GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // column_blocks
    outputs = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if group < GROUPS:  # the group past the last holds the unused slots, whose output is zero
        matrix = w_ptr + group.to(tl.int64) * num_inputs * num_outputs
        for start in range(0, num_inputs, BLOCK_K):
            inputs = start + tl.arange(0, BLOCK_K)
            inside = inputs < num_inputs
            x_mask = used[:, None] & inside[None, :]
            x = tl.load(x_ptr + slots[:, None] * num_inputs + inputs[None, :], mask=x_mask, other=0.0)
            if TRANSPOSED:
                at = inputs[:, None].to(tl.int64) * num_outputs + outputs[None, :]
            else:
                at = outputs[None, :].to(tl.int64) * num_inputs + inputs[:, None]
            w = tl.load(matrix + at, mask=inside[:, None] & (outputs < num_outputs)[None, :], other=0.0)
            if WIDE:
                sums += tl.dot(widen(x), widen(w), input_precision="ieee")
            else:
                sums = tl.dot(x, w, sums)
    out_mask = used[:, None] & (outputs < num_outputs)[None, :]
    values = narrow(sums, out_ptr.dtype.element_ty)
    tl.store(out_ptr + slots[:, None] * out_width + outputs[None, :], values, mask=out_mask)


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
        return tiles.cumsum(0).to(torch.int32)


def dense_window(
    weight: DeviceWeight, num_groups: int, rows: range, columns: range, dtype: torch.dtype
) -> Tensor:
    """Return some rows and columns of every expert's matrix, `dtype` [E, rows, columns]."""
    runs_here(weight.words)
    num_rows = weight.shape[0] // num_groups
    out = torch.empty(num_groups, len(rows), len(columns), dtype=dtype, device=weight.device)
    block, row_blocks = row_tile(len(columns), BLOCK_COLUMNS)
    _dense_window_kernel[row_grid(num_groups * len(rows), row_blocks)](
        weight.words, weight.exponents, out, num_rows, len(rows), rows.start, columns.start, len(columns),
        weight.exponents.shape[1], weight.words.shape[1], row_blocks,
        GROUP_SIZE=weight.group_size, MANTISSA_BITS=weight.mantissa_bits, BLOCK=block,
    )  # fmt: skip
    return out


def grouped_product(x_MK: Tensor, w: Tensor, plan: Plan, out: Tensor, *, transposed: bool) -> None:
    """Write x W_e^T, or x W_e, of each slot into `out` [M, columns], a view of whole rows; unused slots become zero.

    w: [E, outputs, inputs], or [E, inputs, outputs] with `transposed`, in the dtype of x.
    """
    num_groups, num_inputs = w.shape[0], w.shape[1 if transposed else 2]
    num_outputs = w.shape[2 if transposed else 1]
    num_slots, wide = x_MK.shape[0], multiplies_wide(x_MK)
    block_m = 16 if num_slots <= 16 * num_groups else 32 if wide else 64
    block_n = _block(num_outputs, 64 if wide else 128)
    column_blocks = triton.cdiv(num_outputs, block_n)
    tiles = triton.cdiv(num_slots, block_m) + num_groups + 1
    _grouped_product_kernel[row_grid(tiles, column_blocks)](
        x_MK, w, out, plan.order, plan.starts, plan.tile_ends(block_m),
        num_inputs, num_outputs, out.stride(0), column_blocks,
        GROUPS=num_groups, GROUP_BLOCK=triton.next_power_of_2(num_groups + 1), TRANSPOSED=transposed, WIDE=wide,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_block(num_inputs, 32 if wide else 64),
    )  # fmt: skip


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


def _block(size: int, most: int) -> int:
    """Return the elements of a tile along `size`: a power of two from 16, which `tl.dot` needs, to `most`."""
    return max(16, row_tile(size, most)[0])
