"""Rows of the family attention."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, TWICE, OpRow, Shape
from arbitor.reference.op_table.work import sizes

# B sequences, H heads, S slots of L latent and R rotary columns. A window of 512 sees 727 slots.
SLOTS = sizes(
    tiny={"B": 2, "H": 4, "S": 64, "L": 32, "R": 16, "float_bytes": 2},
    _3072={"B": 16, "H": 24, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _7168_decode={"B": 1, "H": 56, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _7168={"B": 16, "H": 56, "S": 4096, "L": 512, "R": 64, "float_bytes": 2},
    r14_decode={"B": 1, "H": 128, "S": 727, "L": 512, "R": 64, "float_bytes": 2},
    _8192_h16={"B": 64, "H": 16, "S": 8192, "L": 512, "R": 64, "float_bytes": 2},
    _8192_h128={"B": 64, "H": 128, "S": 8192, "L": 512, "R": 64, "float_bytes": 2},
)

# B sequences whose Q next positions look back on S - Q + 1 of their own and on 8 levels of blocks, with the window of the presets.
VIEWS = sizes(
    tiny={"B": 2, "Q": 1, "w": 512, "b": 64, "N": 16},
    decode={"B": 64, "Q": 1, "w": 512, "b": 64, "N": 16},
    prompt={"B": 1, "Q": 512, "w": 512, "b": 64, "N": 16},
)


def slots_seen(s: Shape) -> int:
    """Return S, but for the few blocks of levels that a long piece adds."""
    return s["w"] + s["b"] + s["Q"] - 2 + 8 * (s["N"] + 3)


# fmt: off
OPS = (
    OpRow(
        "decode_attention", "attention", TWICE, SLOTS,
        bytes_min=lambda s: s["B"] * (
            s["float_bytes"] * (s["H"] * (2 * s["L"] + s["R"]) + s["S"] * (s["L"] + s["R"])) + 4 * s["S"]
        ),
        ops_min=lambda s: s["B"] * s["H"] * s["S"] * (2 * (2 * s["L"] + s["R"]) + 5),
    ),
    OpRow(
        "visible_slots", "attention", EXACT, VIEWS,
        bytes_min=lambda s: s["B"] * (8 * slots_seen(s) + s["Q"] * (4 * slots_seen(s) + 8)),
        ops_min=lambda s: s["B"] * slots_seen(s) * (16 + 2 * s["Q"]),
    ),
)
# fmt: on
