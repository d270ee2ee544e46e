"""Rows of the family scale. The makers of weights run once, before any graph is recorded."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import MATRIX, dither_ops, elements, groups, state, values

# fmt: off
OPS = (
    OpRow(
        "group_scales", "scale", EXACT, MATRIX,
        bytes_min=lambda s: 5 * groups(s),
        ops_min=groups,
    ),
    OpRow(
        "dequantize", "scale", EXACT, MATRIX,
        bytes_min=lambda s: values(s) + 4 * elements(s),
        ops_min=lambda s: 4 * elements(s),
        like=lambda weight, dtype, rows: weight.exponents.new_empty(
            (weight.shape[0] if rows is None else rows.shape[0], weight.shape[1]), dtype=dtype
        ),
    ),
    OpRow(
        "initial_weight", "scale", EXACT, MATRIX,
        bytes_min=state,
        ops_min=lambda s: dither_ops(groups(s), s["G"]) + 4 * elements(s),
        capturable=False,
    ),
    OpRow(
        "constant_weight", "scale", EXACT, MATRIX,
        bytes_min=state,
        ops_min=lambda s: 0,
        capturable=False,
    ),
)
# fmt: on
