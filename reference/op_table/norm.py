"""Rows of the family norm."""

from __future__ import annotations

from arbitor.reference.op_table.row import TWICE, OpRow, sums
from arbitor.reference.op_table.work import ROWS, values

# fmt: off
OPS = (
    OpRow(
        "rms_norm", "norm", TWICE, ROWS,
        bytes_min=lambda s: 2 * s["float_bytes"] * s["M"] * s["K"] + values(s),
        ops_min=lambda s: 4 * s["M"] * s["K"],
        like=lambda x, weight, eps: x.new_empty(x.shape),
    ),
    OpRow(
        "add_rms_norm", "norm", TWICE, ROWS,
        bytes_min=lambda s: 4 * s["float_bytes"] * s["M"] * s["K"] + values(s),
        ops_min=lambda s: 5 * s["M"] * s["K"],
        like=lambda x, y, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    ),
    OpRow(
        "rms_norm_input_grad", "norm", TWICE, ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"] + values(s),
        ops_min=lambda s: 9 * s["M"] * s["K"],
        like=lambda grad, x, weight, eps, added: x.new_empty(x.shape),
    ),
    OpRow(
        "rms_norm_weight_grad", "norm", TWICE, ROWS,
        bytes_min=lambda s: 2 * s["float_bytes"] * s["M"] * s["K"] + 4 * s["K"],
        ops_min=lambda s: 5 * s["M"] * s["K"],
        like=lambda grad, x, eps: sums(x, 1, x.shape[-1]),
    ),
)
# fmt: on
