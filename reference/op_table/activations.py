"""Rows of the family activations."""

from __future__ import annotations

from arbitor.reference.op_table.row import TWICE, OpRow
from arbitor.reference.op_table.work import sizes

# M rows of K columns with J terms each: the hidden vectors of presets, and of a head, which has no terms.
GATES = sizes(
    tiny={"M": 256, "K": 192, "J": 2, "float_bytes": 2},
    small={"M": 16_256, "K": 1024, "J": 2, "float_bytes": 2},
    head={"M": 16_256, "K": 1024, "J": 0, "float_bytes": 2},
)

# M positions with H heads of C columns, R of which are turned.
TURNS = sizes(
    tiny={"M": 256, "H": 4, "C": 36, "R": 12, "float_bytes": 2},
    small={"M": 16_256, "H": 8, "C": 64, "R": 32, "float_bytes": 2},
    r14={"M": 1024, "H": 128, "C": 128, "R": 64, "float_bytes": 2},
)

# fmt: off
OPS = (
    OpRow(
        "gated", "activations", TWICE, GATES,
        bytes_min=lambda s: (3 + s["J"]) * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: (5 + s["J"]) * s["M"] * s["K"],
        like=lambda gate, up, terms: gate.new_empty(gate.shape),
    ),
    OpRow(
        "gated_grads", "activations", TWICE, GATES,
        bytes_min=lambda s: (5 + s["J"] + min(s["J"], 1)) * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: (11 + s["J"]) * s["M"] * s["K"],
        like=lambda grad, gate, up, terms: [gate.new_empty(gate.shape) for _ in range(2 if terms is None else 3)],
    ),
    OpRow(
        "head_keys", "activations", TWICE, TURNS,
        bytes_min=lambda s: s["float_bytes"] * s["M"] * (s["R"] + s["H"] * (2 * s["C"] - s["R"])),
        ops_min=lambda s: 0,
        like=lambda shared, own: own.new_empty((*own.shape[:-1], shared.shape[-1] + own.shape[-1])),
    ),
    OpRow(
        "head_keys_grads", "activations", TWICE, TURNS,
        bytes_min=lambda s: s["float_bytes"] * s["M"] * (s["R"] + s["H"] * (2 * s["C"] - s["R"])),
        ops_min=lambda s: s["M"] * s["H"] * s["R"],
        like=lambda grad, num_shared: (
            grad.new_empty((*grad.shape[:-2], num_shared)),
            grad.new_empty((*grad.shape[:-1], grad.shape[-1] - num_shared)),
        ),
    ),
    OpRow(
        "rotate", "activations", TWICE, TURNS,
        bytes_min=lambda s: 2 * s["float_bytes"] * s["M"] * s["H"] * s["C"] + 4 * s["M"] * s["R"],
        ops_min=lambda s: 3 * s["M"] * s["H"] * s["R"],
        like=lambda x, cosine, sine: x.new_empty(x.shape),
    ),
)
# fmt: on
