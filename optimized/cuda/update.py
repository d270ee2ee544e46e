"""Counting the votes of a gradient, and moving trits: the host's side of `votes.cu` and `step.cu`.

Legend: N rows, K columns, KW words a row, KG groups a row.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.cuda.launch import aligned, launch
from arbitor.optimized.kernels.launch import (
    MAX_PROGRAMS,
    Clock,
    announce_written,
    gradient_columns,
    signed_word,
)
from arbitor.optimized.kernels.update import step_exponents_
from arbitor.optimized.kernels.votes import exponents_of_rows
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.constants import EXPONENT_RULES, SCORE_SHIFT, SILENT_ROW

CHUNK = 48
"""Columns of a row that a thread takes. They must be whole groups."""

THREADS = 256
"""Threads of a block."""


def fits_count(weight: DeviceWeight, grad_NK: Tensor) -> bool:
    """Return whether `count_votes_` takes a gradient: one of whole pieces of a row, and of groups that fit."""
    num_columns = weight.shape[1]
    return (
        CHUNK % weight.group_size == 0
        and num_columns % _piece(num_columns) == 0
        and aligned(weight.trit_accum, 16)
        and grad_NK.is_contiguous()
        and aligned(grad_NK, 16)
        and grad_NK.shape[0] * math.ceil(num_columns / CHUNK) <= MAX_PROGRAMS * THREADS
    )


def count_votes_(
    weight: DeviceWeight,
    grad_NK: Tensor,
    rate: float | Tensor,
    clock: Clock,
    exponent_rule: str,
    rows: Tensor | None,
    faults: Tensor | None,
    first_row: int,
) -> None:
    """Count the votes of a gradient in the accumulators of `weight`, in place, for a gradient that `fits_count`."""
    num_slots, num_columns = grad_NK.shape
    gradient_columns(num_columns)
    row_exponents = exponents_of_rows(grad_NK, faults)
    if num_slots == 0:
        return
    groups, row_groups = CHUNK // weight.group_size, weight.exponents.shape[1]
    whole_words = groups % 4 == 0 and row_groups % 4 == 0 and aligned(weight.exponent_accum, 4)
    kernel = Kernel.of(
        "votes",
        "count_votes",
        GROUP_SIZE=weight.group_size,
        GRADIENT_BYTES=grad_NK.element_size(),
        EXPONENT_RULE=EXPONENT_RULES.index(exponent_rule),
        SCORE_SHIFT=SCORE_SHIFT,
        COUNT_BYTES=4 if whole_words else 1,
        SILENT_ROW=SILENT_ROW,
        PIECE=_piece(num_columns),
        HAS_ROWS=int(rows is not None),
    )
    row_chunks = math.ceil(num_columns / CHUNK)
    num_chunks = num_slots * row_chunks
    first_group = signed_word(first_row * row_groups)
    rate_at, rate_value = (rate, 0.0) if isinstance(rate, Tensor) else (None, rate)
    step_at, step_value = (clock.step, 0) if isinstance(clock.step, Tensor) else (None, clock.step)
    launch(
        kernel,
        (
            grad_NK,
            row_exponents,
            None if rows is None else rows.contiguous(),
            weight.words,
            weight.trit_accum,
            weight.exponent_accum,
            rate_at,
            np.float32(rate_value),
            step_at,
            *map(np.int32, (step_value, clock.tensor_id, clock.seed_low, clock.seed_high, first_group)),
            np.int64(num_chunks),
            *map(np.int32, (row_chunks, num_columns, weight.words.shape[1], row_groups)),
        ),
        blocks=math.ceil(num_chunks / THREADS),
        threads=THREADS,
        device=weight.device,
    )


def fits_step(weight: DeviceWeight, rows: Tensor | None) -> bool:
    """Return whether `step_` takes a weight: all rows of it, which are whole pieces. Words are counted in 32 bits."""
    num_columns, piece = weight.shape[1], _piece(weight.shape[1])
    whole_pieces = num_columns % piece == 0 and aligned(weight.trit_accum, piece)
    return rows is None and whole_pieces and weight.words.numel() < 2**32


def step_(weight: DeviceWeight, theta: int, theta_e: int, carry: bool) -> None:
    """Move exponents and trits whose count is full, in place, of a weight that `fits_step`."""
    step_exponents_(weight, theta_e, None)
    num_words, num_columns = weight.words.numel(), weight.shape[1]
    launch(
        Kernel.of("step", "step_trits", CARRY=int(carry), PIECE=_piece(num_columns)),
        (
            weight.words,
            weight.trit_accum,
            np.int64(num_words),
            *map(np.int32, (theta, weight.words.shape[1], num_columns)),
        ),
        blocks=math.ceil(num_words / THREADS),
        threads=THREADS,
        device=weight.device,
    )
    announce_written(weight.words, weight.exponents)


def _piece(num_columns: int) -> int:
    """Return the columns of a row that a thread reads at once. A row that is no multiple of them has none."""
    return 16 if num_columns % 16 == 0 else 8
