"""Rows of the family update."""

from __future__ import annotations

from collections.abc import Callable

from arbitor.reference.op_table.row import EXACT, OpRow, Shape
from arbitor.reference.op_table.work import (
    MATRIX,
    dither_ops,
    elements,
    groups,
    packed,
    sizes,
    state,
    vote_ops,
)


def accumulate_ops(s: Shape) -> int:
    """Return the operations of counting votes: add, saturate, multiply, sum the score; then the exponents."""
    return 4 * elements(s) + dither_ops(groups(s), s["G"]) + 5 * groups(s)


def gradient_bytes(s: Shape) -> int:
    """Return the bytes of a gradient in float32 and of the counts that it changes."""
    return packed(s) + 6 * elements(s) + 2 * groups(s)


def gradient_ops(s: Shape) -> int:
    """Return the operations of votes and of counting them, which share their dither."""
    return vote_ops(s) + accumulate_ops(s) - dither_ops(groups(s), s["G"])


def step_bytes(s: Shape) -> int:
    """Return the bytes of a state that is read and written."""
    return 2 * state(s)


def step_ops(s: Shape) -> int:
    """Return the operations of a step."""
    return 5 * elements(s) + 4 * groups(s)


def of_all(work: Callable[[Shape], int]) -> Callable[[Shape], int]:
    """Return the work on W weights."""
    return lambda s: s["W"] * work(s)


# W weights of one shape: those of small that have the largest stack, and the stack of its experts.
SEVERAL = sizes(
    tiny={"W": 3, "N": 192, "K": 144, "G": 12},
    small={"W": 14, "N": 1024, "K": 512, "G": 12},
    small_experts={"W": 6, "N": 32_768, "K": 24, "G": 12},
)

# fmt: off
OPS = (
    OpRow(
        "accumulate", "update", EXACT, MATRIX,
        bytes_min=lambda s: packed(s) + 3 * elements(s) + 2 * groups(s),
        ops_min=accumulate_ops,
    ),
    OpRow(
        "apply_step", "update", EXACT, MATRIX,
        bytes_min=step_bytes,
        ops_min=step_ops,
    ),
    OpRow(
        "accumulate_gradient", "update", EXACT, MATRIX,
        bytes_min=gradient_bytes,
        ops_min=gradient_ops,
    ),
    OpRow(
        "accumulate_gradients", "update", EXACT, SEVERAL,
        bytes_min=of_all(gradient_bytes),
        ops_min=of_all(gradient_ops),
    ),
    OpRow(
        "apply_steps", "update", EXACT, SEVERAL,
        bytes_min=of_all(step_bytes),
        ops_min=of_all(step_ops),
    ),
    OpRow(
        "count_nonfinite_rows", "update", EXACT, MATRIX,
        bytes_min=lambda s: 4 * elements(s) + 8,
        ops_min=elements,
    ),
    OpRow(
        "count_changed_trits", "update", EXACT, MATRIX,
        bytes_min=lambda s: 2 * packed(s) + 8,
        ops_min=lambda s: 2 * elements(s),
    ),
    OpRow(
        "count_state", "update", EXACT, MATRIX,
        bytes_min=lambda s: packed(s) + elements(s) + groups(s),
        ops_min=lambda s: 5 * elements(s) + 2 * groups(s),
    ),
)
# fmt: on
