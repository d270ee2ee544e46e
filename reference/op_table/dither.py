"""Rows of the family dither."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import dither_ops, sizes

DITHER = sizes(
    tiny={"groups": 256 * 22, "G": 12},
    _3072={"groups": 3072 * 256, "G": 12},
    _7168={"groups": 7168 * 598, "G": 12},
)

# fmt: off
OPS = (
    OpRow(
        "dither_bytes", "dither", EXACT, DITHER,
        bytes_min=lambda s: s["groups"] * (8 + s["G"] + 1),
        ops_min=lambda s: dither_ops(s["groups"], s["G"]),
    ),
)
# fmt: on
