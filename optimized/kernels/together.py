"""Kernels that update several weights in one launch: the votes of weights of one shape, and the steps of weights of any shapes.

A table on the device says where the tensors of each weight lie. A model has dozens of weights, most of them so small that the
launch takes longer than its work.

Legend: W weights, N rows, K columns, KG groups a row, KW words a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import clock_step, known_columns, lane_trits, widen
from arbitor.optimized.kernels.launch import (
    Clock,
    announce_written,
    column_step,
    is_recorded,
    row_grid,
    runs_here,
    warps_of,
)
from arbitor.optimized.kernels.update import full_count, saturate
from arbitor.optimized.kernels.votes import (
    exponents_of_rows,
    gradient_votes,
    group_dither,
    rate_argument,
)
from arbitor.optimized.layouts import TRITS_PER_WORD, DeviceWeight
from arbitor.reference.constants import SCORE_SHIFT, level_range

MOST_ELEMENTS = 2**24
"""Most elements of a weight that is updated together with others. A larger one fills a GPU by itself."""

BLOCK_WORDS, BLOCK_GROUPS = 128, 1024
"""Words, and groups, of a program of the step."""

TILE = 2048
"""Lanes of a tile of groups that count votes."""

NARROW_COLUMNS = 128
"""Columns up to which rows are narrow."""

ALIGNED = 16
"""Bytes that an address is a multiple of where kernels may read so many at once."""

MOST_TABLES = 4096
"""Most tables that are kept, beside those that recorded graphs read."""


@dataclass
class _Sent:
    """A tensor of the host on its way to a device.

    Attributes:
        tensor: on the device.
        arrived: event of its arrival, None where the host knows that it is there.
    """

    tensor: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def to(cls, device: torch.device, made: Tensor) -> _Sent:
        """Send a tensor. The host does not wait for it."""
        if device.type != "cuda":
            return cls(made.to(device))
        # Other memory would make the host wait for the device.
        sent = made.pin_memory().to(device, non_blocking=True)
        return cls(sent, torch.cuda.current_stream(device).record_event())

    def before_launch(self) -> Tensor:
        """Let the current stream wait until the tensor has arrived, if another stream may still be sending it; return it."""
        # Another thread may take it away meanwhile.
        arrived = self.arrived
        if arrived is not None:
            if arrived.query():
                self.arrived = None
            else:
                torch.cuda.current_stream(self.tensor.device).wait_event(arrived)
        return self.tensor


_TABLES: dict[tuple[int, ...], _Sent] = {}
"""Tables by their content."""

_RECORDED: set[tuple[int, ...]] = set()
"""The tables that recorded graphs read at each replay. They are never dropped, as torch does not say when a graph is gone."""


@triton.jit
def tensor_at(table_ptr, place, like_ptr, IS_ALIGNED: tl.constexpr):
    """Return the pointer at a place of a table, to elements as those of `like_ptr`."""
    found = tl.load(table_ptr + place).to(like_ptr.dtype)
    return tl.multiple_of(found, 16) if IS_ALIGNED else found


@triton.jit
def place_of_program(table_ptr, num_weights, WEIGHT_BLOCK: tl.constexpr):
    """Return the row of this program in a table of eight columns, and its number among the programs of that row.

    The last column says where the programs of each row end.
    """
    program = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, WEIGHT_BLOCK)
    ends = tl.load(table_ptr + numbers * 8 + 7, mask=numbers < num_weights, other=2**62)
    number = tl.sum((ends <= program).to(tl.int32), axis=0)
    begin = tl.max(tl.where(ends <= program, ends, 0), axis=0)
    return number, (program - begin).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "rate",
        "num_rows",
        "row_groups",
        "row_words",
        "weight_blocks",
        "seed_low",
        "seed_high",
        "step",
    ]
)
def _count_together_kernel(
    table_ptr, grad_ptr, row_exponents_ptr, words_like, counts_like, rate, num_rows, num_columns, row_groups, row_words,
    weight_blocks, seed_low, seed_high, step,
    RATE_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr, EXPONENT_RULE: tl.constexpr, SHIFT: tl.constexpr,
    GROUP_SIZE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    num_columns = known_columns(num_columns, COLUMN_STEP)
    number = (tl.program_id(0) // weight_blocks).to(tl.int64)
    # A weight that is small enough has places of 32 bits, whose divisions are cheap.
    groups = (tl.program_id(0) % weight_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = groups < num_rows * row_groups
    rows = groups // row_groups
    lanes = tl.arange(0, PLACES)[None, :]
    columns = (groups - rows * row_groups)[:, None] * GROUP_SIZE + lanes
    mask = inside[:, None] & (lanes < GROUP_SIZE) & (columns < num_columns)
    words_ptr = tensor_at(table_ptr, number * 4, words_like, IS_ALIGNED)
    trit_accum_ptr = tensor_at(table_ptr, number * 4 + 1, counts_like, IS_ALIGNED)
    exponent_accum_ptr = tensor_at(table_ptr, number * 4 + 2, counts_like, IS_ALIGNED)
    tensor_id = tl.load(table_ptr + number * 4 + 3).to(tl.int32)

    if RATE_ON_DEVICE:
        rate = tl.load(rate)
    row_exponents = tl.load(row_exponents_ptr + number * num_rows + rows, mask=inside, other=0)
    places = rows[:, None] * num_columns + columns
    grad = tl.load(grad_ptr + number * num_rows * num_columns + places, mask=mask, other=0.0)
    place_bytes, exponent_byte = group_dither(
        groups, clock_step(step, STEP_ON_DEVICE), tensor_id, seed_low, seed_high, GROUP_SIZE, PLACES
    )
    votes = gradient_votes(widen(grad), row_exponents[:, None], rate, place_bytes)
    votes = tl.where(mask, votes, 0)
    counts = tl.load(trit_accum_ptr + places, mask=mask, other=0).to(tl.int32)
    tl.store(trit_accum_ptr + places, saturate(counts + votes), mask=mask)
    if EXPONENT_RULE != "frozen":
        words = tl.load(words_ptr + rows[:, None] * row_words + columns // 16, mask=mask, other=0)
        score = tl.sum(votes * lane_trits(words, columns % 16), axis=1)
        if EXPONENT_RULE == "score":
            vote = (score + (exponent_byte >> (8 - SHIFT))) >> SHIFT
        else:
            vote = tl.where(score > 0, 1, 0) - tl.where(score < 0, 1, 0)
        count = tl.load(exponent_accum_ptr + groups, mask=inside, other=0).to(tl.int32)
        tl.store(exponent_accum_ptr + groups, saturate(count + vote), mask=inside)


@triton.jit(do_not_specialize=["num_weights", "theta", "theta_e"])
def _step_together_kernel(
    table_ptr, words_like, counts_like, num_weights, theta, theta_e,
    WHOLE: tl.constexpr, CARRY: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, IS_ALIGNED: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    number, block = place_of_program(table_ptr, num_weights, WEIGHT_BLOCK)
    row_ptr = table_ptr + number * 8
    words_ptr = tensor_at(row_ptr, 0, words_like, IS_ALIGNED)
    trit_accum_ptr = tensor_at(row_ptr, 1, counts_like, IS_ALIGNED)
    # A weight that is small enough has places of 32 bits, whose divisions are cheap.
    num_words, num_columns = tl.load(row_ptr + 4).to(tl.int32), tl.load(row_ptr + 6).to(tl.int32)
    word_blocks = (num_words + WORDS - 1) // WORDS
    if block < word_blocks:
        word_ids = block * WORDS + tl.arange(0, WORDS)
        lanes = tl.arange(0, 16)[None, :]
        if WHOLE:
            accum = trit_accum_ptr + word_ids[:, None] * 16 + lanes
            mask = (word_ids < num_words)[:, None] & (lanes < 16)
        else:
            row_words = (num_columns + 15) // 16
            columns = (word_ids % row_words * 16)[:, None] + lanes
            accum = trit_accum_ptr + (word_ids // row_words * num_columns)[:, None] + columns
            mask = (word_ids < num_words)[:, None] & (columns < num_columns)
        count = tl.load(accum, mask=mask, other=0).to(tl.int32)
        full = full_count(count, theta)
        kept = count - full * theta if CARRY else tl.where(full != 0, 0, count)
        tl.store(accum, kept.to(tl.int8), mask=mask)
        words = tl.load(words_ptr + word_ids, mask=word_ids < num_words, other=0)
        trits = lane_trits(words[:, None], lanes) - full
        trits = tl.minimum(tl.maximum(trits, -1), 1)
        tl.store(
            words_ptr + word_ids, tl.xor_sum((trits & 3) << (2 * lanes), axis=1), mask=word_ids < num_words
        )
    else:
        exponents_ptr = tensor_at(row_ptr, 2, counts_like, IS_ALIGNED)
        exponent_accum_ptr = tensor_at(row_ptr, 3, counts_like, IS_ALIGNED)
        groups = (block - word_blocks) * GROUPS + tl.arange(0, GROUPS)
        inside = groups < tl.load(row_ptr + 5).to(tl.int32)
        of_group = tl.load(exponent_accum_ptr + groups, mask=inside, other=0).to(tl.int32)
        full_e = full_count(of_group, theta_e)
        levels = tl.load(exponents_ptr + groups, mask=inside, other=0).to(tl.int32) - full_e
        tl.store(exponents_ptr + groups, tl.minimum(tl.maximum(levels, LOW), HIGH).to(tl.int8), mask=inside)
        tl.store(exponent_accum_ptr + groups, (of_group - full_e * theta_e).to(tl.int8), mask=inside)


def is_narrow(weight: DeviceWeight) -> bool:
    """Return whether the rows of a weight are so narrow that a program should count in several of them."""
    return weight.shape[1] <= NARROW_COLUMNS and weight.shape[0] > 1


@dataclass(frozen=True)
class Table:
    """A table for a launch: its rows, and the tensor of them on the device."""

    rows: list[list[int]]
    tensor: Tensor

    def is_aligned(self, num_addresses: int) -> bool:
        """Return whether the addresses, which come first in each row, are multiples of ALIGNED."""
        return all(address % ALIGNED == 0 for row in self.rows for address in row[:num_addresses])


def table_of(rows: list[list[int]], device: torch.device) -> Table | None:
    """Return the table of some rows, kept for later calls.

    A recording takes only a table that is there, else it is given None: its graph would copy another one at each replay.
    """
    key = (-1 if device.index is None else device.index, len(rows), *(value for row in rows for value in row))
    recorded, sent = is_recorded(device), _TABLES.get(key)
    if sent is None:
        if recorded:
            return None
        if len(_TABLES) - len(_RECORDED) >= MOST_TABLES:
            drop_tables()
        sent = _Sent.to(device, torch.tensor(rows, dtype=torch.int64, device="cpu"))
    if recorded:
        _RECORDED.add(key)
    # Anew if another thread has dropped it since.
    _TABLES[key] = sent
    # A recording may not wait for what is outside of it. torch.cuda.graph has waited for the device before a recording begins.
    return Table(rows, sent.tensor if recorded else sent.before_launch())


def drop_tables() -> None:
    """Drop the tables that no recorded graph reads, when no kernel reads them any more.

    Otherwise those of weights that come and go would take all places, and a recording would find no table of later weights.
    """
    kept = dict(_TABLES)
    for device in {sent.tensor.device for sent in kept.values() if sent.tensor.is_cuda}:
        torch.cuda.synchronize(device)
    for key in kept.keys() - _RECORDED:
        _TABLES.pop(key, None)


def count_table(weights: Sequence[DeviceWeight], tensor_ids: Sequence[int]) -> Table | None:
    """Return the table with which `count_together_` takes weights of one shape, or None if it does not."""
    if weights[0].trit_accum.numel() > MOST_ELEMENTS:
        return None
    return table_of(_count_rows(weights, tensor_ids), weights[0].device)


def count_together_(
    weights: Sequence[DeviceWeight],
    table: Table,
    grad_NK: Tensor,
    rate: float | Tensor,
    clock: Clock,
    exponent_rule: str,
    faults: Tensor | None,
) -> None:
    """Launch `accumulate_gradients`, in place, for weights and their `count_table`; `clock` is of any of them."""
    runs_here(grad_NK)
    first, grad_NK = weights[0], grad_NK.contiguous()
    (num_rows, num_columns), row_groups = first.shape, first.exponents.shape[1]
    row_exponents = exponents_of_rows(grad_NK, faults)
    places = triton.next_power_of_2(first.group_size)
    block = max(1, TILE // places)
    weight_blocks = triton.cdiv(num_rows * row_groups, block)
    _count_together_kernel[row_grid(len(weights), weight_blocks)](
        table.tensor, grad_NK, row_exponents, first.words, first.trit_accum, rate_argument(rate),
        num_rows, num_columns, row_groups, first.words.shape[1], weight_blocks,
        clock.seed_low, clock.seed_high, clock.step,
        RATE_ON_DEVICE=isinstance(rate, Tensor), STEP_ON_DEVICE=clock.step_on_device, EXPONENT_RULE=exponent_rule,
        SHIFT=SCORE_SHIFT, GROUP_SIZE=first.group_size, PLACES=places, BLOCK=block, IS_ALIGNED=table.is_aligned(3),
        COLUMN_STEP=column_step(num_columns), num_warps=warps_of(places * block),
    )  # fmt: skip


def steps_together(weights: Sequence[DeviceWeight]) -> list[tuple[list[int], Table]]:
    """Return the places of the weights that `step_together_` takes at once, those of one kind in a list, with their table."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for place, weight in enumerate(weights):
        if weight.trit_accum.numel() <= MOST_ELEMENTS:
            kinds.setdefault((weight.mantissa_bits, _is_whole(weight)), []).append(place)
    found = [
        (places, table_of(_step_rows([weights[place] for place in places]), weights[0].device))
        for places in kinds.values()
    ]
    return [(places, table) for places, table in found if table is not None]


def step_together_(
    weights: Sequence[DeviceWeight], table: Table, theta: int, theta_e: int, carry: bool
) -> None:
    """Launch `apply_steps`, in place, for weights of one kind in `steps_together`, and their table."""
    first = weights[0]
    runs_here(first.words)
    low, high = level_range(first.mantissa_bits)
    _step_together_kernel[row_grid(1, table.rows[-1][-1])](
        table.tensor, first.words, first.trit_accum, len(weights), theta, theta_e,
        WHOLE=_is_whole(first), CARRY=carry, LOW=low, HIGH=high, IS_ALIGNED=table.is_aligned(4),
        WEIGHT_BLOCK=triton.next_power_of_2(len(weights)), WORDS=BLOCK_WORDS, GROUPS=BLOCK_GROUPS,
    )  # fmt: skip
    announce_written(*(tensor for weight in weights for tensor in (weight.words, weight.exponents)))


def _count_rows(weights: Sequence[DeviceWeight], tensor_ids: Sequence[int]) -> list[list[int]]:
    """Return the table of votes: addresses, and the tensor id."""
    return [
        [weight.words.data_ptr(), weight.trit_accum.data_ptr(), weight.exponent_accum.data_ptr(), tensor_id]
        for weight, tensor_id in zip(weights, tensor_ids, strict=True)
    ]


def _is_whole(weight: DeviceWeight) -> bool:
    """Return whether every word has sixteen trits."""
    return weight.shape[1] % TRITS_PER_WORD == 0


def _step_rows(weights: Sequence[DeviceWeight]) -> list[list[int]]:
    """Return the table of a step: addresses, sizes, and where the programs of each weight end."""
    rows, end = [], 0
    for weight in weights:
        num_words, num_groups = weight.words.numel(), weight.exponents.numel()
        end += triton.cdiv(num_words, BLOCK_WORDS) + triton.cdiv(num_groups, BLOCK_GROUPS)
        tensors = (weight.words, weight.trit_accum, weight.exponents, weight.exponent_accum)
        rows.append([*(tensor.data_ptr() for tensor in tensors), num_words, num_groups, weight.shape[1], end])
    return rows
