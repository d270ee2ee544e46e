"""Rows of the family update."""

from __future__ import annotations

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
        bytes_min=lambda s: 2 * state(s),
        ops_min=lambda s: 5 * elements(s) + 4 * groups(s),
    ),
    OpRow(
        "accumulate_gradient", "update", EXACT, MATRIX,
        bytes_min=lambda s: packed(s) + 6 * elements(s) + 2 * groups(s),
        ops_min=lambda s: vote_ops(s) + accumulate_ops(s) - dither_ops(groups(s), s["G"]),
    ),
    OpRow(
        "accumulate_gradients", "update", EXACT, SEVERAL,
        bytes_min=lambda s: s["W"] * (packed(s) + 6 * elements(s) + 2 * groups(s)),
        ops_min=lambda s: s["W"] * (vote_ops(s) + accumulate_ops(s) - dither_ops(groups(s), s["G"])),
    ),
    OpRow(
        "apply_steps", "update", EXACT, SEVERAL,
        bytes_min=lambda s: s["W"] * 2 * state(s),
        ops_min=lambda s: s["W"] * (5 * elements(s) + 4 * groups(s)),
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
)
# fmt: on
