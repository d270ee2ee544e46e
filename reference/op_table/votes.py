"""Rows of the family votes."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import MATRIX, elements, sizes, vote_ops

SCALAR = sizes(scalar={})

# fmt: off
OPS = (
    OpRow(
        "row_exponents", "votes", EXACT, MATRIX,
        bytes_min=lambda s: 4 * elements(s) + 4 * s["N"],
        ops_min=lambda s: 2 * elements(s),
    ),
    OpRow(
        "stochastic_votes", "votes", EXACT, MATRIX,
        bytes_min=lambda s: 5 * elements(s),
        ops_min=vote_ops,
    ),
    OpRow(
        "sign_votes", "votes", EXACT, MATRIX,
        bytes_min=lambda s: 5 * elements(s),
        ops_min=lambda s: 2 * elements(s),
    ),
    # The op takes numbers and returns a number, and never touches a device.
    OpRow(
        "step_from_loss", "votes", EXACT, SCALAR,
        bytes_min=lambda s: 0,
        ops_min=lambda s: 5,
        capturable=False,
    ),
)
# fmt: on
