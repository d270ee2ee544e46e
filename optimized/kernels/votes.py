"""Vote kernels: row exponents, and gradients as votes.

Legend: N rows, K columns, KG groups a row, R rows of the gradient, V row exponent.
A tile is BLOCK groups of one row by PLACES lanes, PLACES the power of two that holds a group, so that a group's dither is
one Philox call and its score a sum along the lanes. Rows address in 64 bits, columns within a row in 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import (
    clock_step,
    known_columns,
    philox_words,
    round_half_even,
    widen,
    word_bytes,
)
from arbitor.optimized.kernels.launch import (
    Clock,
    column_step,
    gradient_columns,
    row_grid,
    row_tile,
    runs_here,
    warps_of,
)
from arbitor.reference.constants import SILENT_ROW, groups_per_row

SILENT = tl.constexpr(SILENT_ROW)
BLOCK_COLUMNS = 1024
TILE = 2048
"""Lanes of a tile of groups. docs/log.md says why."""


@triton.jit(do_not_specialize=["num_rows"])
def _row_exponents_kernel(
    grad_ptr, exponents_ptr, faults_ptr, num_rows, num_columns,
    COUNT_FAULTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    squares = tl.zeros([ROWS, BLOCK], dtype=tl.float64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        address = grad_ptr + rows[:, None] * num_columns + columns[None, :]
        mask = inside[:, None] & (columns < num_columns)[None, :]
        grad = widen(tl.load(address, mask=mask, other=0.0)).to(tl.float64)
        squares += grad * grad
    # The squares of float32 numbers and their sums neither overflow nor vanish in float64. So a mean square that is not finite
    # comes from an element that is not, and the exponent can be read off the bits of a normal number.
    mean_square = tl.sum(squares, axis=1) / num_columns
    bits = mean_square.to(tl.int64, bitcast=True)
    # A NaN may carry a sign.
    biased = ((bits >> 52) & 0x7FF).to(tl.int32)
    finite = biased < 2047
    exponent = (biased - 1022) >> 1
    tl.store(exponents_ptr + rows, tl.where(finite & (bits != 0), exponent, SILENT), mask=inside)
    if COUNT_FAULTS:
        # The counts are integers, so their order cannot matter.
        faults = tl.sum((biased == 2047).to(tl.int32), axis=0)
        tl.atomic_add(faults_ptr, faults, mask=faults > 0)


@triton.jit
def power_of_two(exponents):
    """Return float32 2**exponents for int32 exponents in [-126, 127]."""
    return ((exponents + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gradient_votes(grad, row_exponents, rate, dither):
    """Return int32 votes of float32 gradients; row exponents and dither bytes broadcast against them.

    2**(8 - V) is too large for float32 where gradients are tiny, so it is applied in two factors. Both are exact, unless the
    result is so small that its vote is 0 anyhow. Only the product with the rate rounds.
    """
    speaks = row_exponents != SILENT
    power = tl.where(speaks, 8 - row_exponents, 0)
    first = tl.minimum(power, 100)
    scaled = grad * power_of_two(first) * power_of_two(power - first) * rate
    scaled = tl.minimum(tl.maximum(tl.where(speaks, scaled, 0.0), -32768.0), 32767.0)
    votes = (round_half_even(scaled).to(tl.int32) + dither) >> 8
    return tl.minimum(tl.maximum(votes, -127), 127)


@triton.jit
def group_tile(block, num_columns, GROUP_SIZE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile of one row: int32 group ids [BLOCK] within the row, and columns and mask [BLOCK, PLACES]."""
    groups = block * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, PLACES)[None, :]
    columns = groups[:, None] * GROUP_SIZE + lanes
    return groups, columns, (lanes < GROUP_SIZE) & (columns < num_columns)


@triton.jit
def group_dither(
    group_ids, step_word, tensor_id, seed_low, seed_high, GROUP_SIZE: tl.constexpr, PLACES: tl.constexpr
):
    """Return the dither of whole groups: int32 bytes [BLOCK, PLACES] for the places, [BLOCK] for the exponent."""
    BLOCK: tl.constexpr = group_ids.shape[0]
    lanes = tl.arange(0, PLACES)[None, :]
    place_bytes = tl.zeros([BLOCK, PLACES], dtype=tl.int32)
    exponent_byte = tl.zeros([BLOCK], dtype=tl.int32)
    for block in tl.static_range(GROUP_SIZE // 16 + 1):
        w0, w1, w2, w3 = philox_words(
            group_ids, tl.full([BLOCK], block, tl.int32), step_word, tensor_id, seed_low, seed_high
        )
        values = word_bytes(w0[:, None], w1[:, None], w2[:, None], w3[:, None], lanes)
        place_bytes = tl.where(lanes // 16 == block, values, place_bytes)
        if block == GROUP_SIZE // 16:
            exponent_byte = word_bytes(w0, w1, w2, w3, tl.full([BLOCK], GROUP_SIZE, tl.int32))
    return place_bytes, exponent_byte


@triton.jit(
    do_not_specialize=["rate", "row_groups", "row_blocks", "seed_low", "seed_high", "step", "tensor_id"]
)
def _stochastic_votes_kernel(
    grad_ptr, exponents_ptr, rows_ptr, rate, votes_ptr, num_columns, row_groups, row_blocks,
    seed_low, seed_high, step, tensor_id,
    HAS_ROWS: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    slot = (tl.program_id(0) // row_blocks).to(tl.int64)
    groups, columns, mask = group_tile(tl.program_id(0) % row_blocks, num_columns, GROUP_SIZE, PLACES, BLOCK)
    row = slot
    exponent = tl.load(exponents_ptr + slot)
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot)
        exponent = tl.where(row >= 0, exponent, SILENT)
    if RATE_ON_DEVICE:
        rate = tl.load(rate)
    grad = tl.load(grad_ptr + slot * num_columns + columns, mask=mask, other=0.0)
    dither, _ = group_dither(
        row * row_groups + groups, clock_step(step, STEP_ON_DEVICE), tensor_id, seed_low, seed_high,
        GROUP_SIZE, PLACES,
    )  # fmt: skip
    votes = gradient_votes(widen(grad), exponent, rate, dither)
    tl.store(votes_ptr + slot * num_columns + columns, votes.to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["row_blocks", "step_size"])
def _sign_votes_kernel(
    grad_ptr, exponents_ptr, votes_ptr, num_columns, row_blocks, step_size, BLOCK: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    grad = widen(tl.load(grad_ptr + row * num_columns + columns, mask=mask, other=0.0))
    # A silent row has no sign to cast: it is zero everywhere, or holds an infinity or a NaN.
    speaks = tl.load(exponents_ptr + row) != SILENT
    sign = tl.where(grad > 0, 1, 0) - tl.where(grad < 0, 1, 0)
    votes = tl.where(speaks, sign * step_size, 0).to(tl.int8)
    tl.store(votes_ptr + row * num_columns + columns, votes, mask=mask)


def tile_of(group_size: int, row_groups: int) -> tuple[int, int, int]:
    """Return the lanes that hold a group, the groups of a tile, and the tiles of a row."""
    places = triton.next_power_of_2(group_size)
    block = min(TILE // places, triton.next_power_of_2(row_groups))
    return places, block, triton.cdiv(row_groups, block)


def exponents_of_rows(grad_NK: Tensor, faults: Tensor | None = None) -> Tensor:
    """Launch `row_exponents`; returns int32 [N] and adds the rows that are not finite to `faults`, if given."""
    runs_here(grad_NK)
    num_rows, num_columns = grad_NK.shape
    gradient_columns(num_columns)
    exponents = torch.empty(num_rows, dtype=torch.int32, device=grad_NK.device)
    if num_rows:
        block, _ = row_tile(num_columns, BLOCK_COLUMNS)
        # Narrow rows share a program.
        rows = max(1, BLOCK_COLUMNS // block)
        _row_exponents_kernel[row_grid(1, triton.cdiv(num_rows, rows))](
            grad_NK.contiguous(), exponents, exponents if faults is None else faults, num_rows, num_columns,
            COUNT_FAULTS=faults is not None, ROWS=rows, BLOCK=block, COLUMN_STEP=column_step(num_columns),
            num_warps=warps_of(rows * block),
        )  # fmt: skip
    return exponents


def votes_of_gradient(
    grad_NK: Tensor, rate: float | Tensor, group_size: int, clock: Clock, rows: Tensor | None
) -> Tensor:
    """Launch `stochastic_votes`; returns int8 [N, K]."""
    grad_NK = grad_NK.contiguous()
    exponents = exponents_of_rows(grad_NK)
    num_rows, num_columns = grad_NK.shape
    votes = torch.empty(num_rows, num_columns, dtype=torch.int8, device=grad_NK.device)
    groups = groups_per_row(num_columns, group_size)
    places, block, row_blocks = tile_of(group_size, groups)
    if num_rows:
        _stochastic_votes_kernel[row_grid(num_rows, row_blocks)](
            grad_NK, exponents, exponents if rows is None else rows.contiguous(), rate_argument(rate), votes,
            num_columns, groups, row_blocks, clock.seed_low, clock.seed_high, clock.step, clock.tensor_id,
            HAS_ROWS=rows is not None, RATE_ON_DEVICE=isinstance(rate, Tensor), STEP_ON_DEVICE=clock.step_on_device,
            GROUP_SIZE=group_size, PLACES=places, BLOCK=block, COLUMN_STEP=column_step(num_columns),
        )  # fmt: skip
    return votes


def votes_of_sign(grad_NK: Tensor, step_size: int) -> Tensor:
    """Launch `sign_votes`; returns int8 [N, K]."""
    grad_NK = grad_NK.contiguous()
    exponents = exponents_of_rows(grad_NK)
    num_rows, num_columns = grad_NK.shape
    votes = torch.empty(num_rows, num_columns, dtype=torch.int8, device=grad_NK.device)
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    if num_rows:
        _sign_votes_kernel[row_grid(num_rows, row_blocks)](
            grad_NK, exponents, votes, num_columns, row_blocks, step_size, BLOCK=block, COLUMN_STEP=column_step(num_columns),
        )  # fmt: skip
    return votes


def rate_argument(rate: float | Tensor) -> float | Tensor:
    """Return a rate as a kernel takes it. An integer becomes a float, since its type would ask for a compilation of its own."""
    return rate if isinstance(rate, Tensor) else float(rate)
