"""Rows of the family layout. They count the canonical side of a conversion, because the device side differs between op sets."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import MATRIX, elements, state

# fmt: off
OPS = (
    OpRow(
        "from_spec", "layout", EXACT, MATRIX,
        bytes_min=lambda s: 2 * state(s),
        ops_min=lambda s: 3 * elements(s),
    ),
    OpRow(
        "to_spec", "layout", EXACT, MATRIX,
        bytes_min=lambda s: 2 * state(s),
        ops_min=lambda s: 3 * elements(s),
    ),
)
# fmt: on
