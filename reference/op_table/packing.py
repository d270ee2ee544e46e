"""Rows of the family packing."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import MATRIX, elements, packed

# fmt: off
OPS = (
    OpRow(
        "pack_trits", "packing", EXACT, MATRIX,
        bytes_min=lambda s: elements(s) + packed(s),
        ops_min=lambda s: 2 * elements(s),
    ),
    OpRow(
        "unpack_trits", "packing", EXACT, MATRIX,
        bytes_min=lambda s: elements(s) + packed(s),
        ops_min=lambda s: 3 * elements(s),
    ),
)
# fmt: on
