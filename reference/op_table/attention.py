"""Rows of the family attention."""

from __future__ import annotations

from arbitor.reference.op_table.row import TWICE, OpRow
from arbitor.reference.op_table.work import sizes

# B sequences, H heads, S slots of L latent and R rotary columns. A window of 512 sees 727 slots.
SLOTS = sizes(
    tiny={"B": 2, "H": 4, "S": 64, "L": 32, "R": 16, "float_bytes": 2},
    _3072={"B": 16, "H": 24, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _7168_decode={"B": 1, "H": 56, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _7168={"B": 16, "H": 56, "S": 4096, "L": 512, "R": 64, "float_bytes": 2},
    r14_decode={"B": 1, "H": 128, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
)

# fmt: off
OPS = (
    OpRow(
        "decode_attention", "attention", TWICE, SLOTS,
        bytes_min=lambda s: s["B"] * (
            s["float_bytes"] * (s["H"] * (2 * s["L"] + s["R"]) + s["S"] * (s["L"] + s["R"])) + 4 * s["S"]
        ),
        ops_min=lambda s: s["B"] * s["H"] * s["S"] * (2 * (2 * s["L"] + s["R"]) + 5),
    ),
)
# fmt: on
