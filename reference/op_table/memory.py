"""Rows of the family memory. Mixing a word is three shifts, three exclusive ors and two products."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import sizes

# Sizes: M positions of B sequences, n-grams of `order` codes, N rows.
NGRAMS = sizes(
    tiny={"M": 252, "B": 2, "order": 3, "N": 512},
    small={"M": 16256, "B": 64, "order": 8, "N": 16384},
    _10M={"M": 16384, "B": 16, "order": 8, "N": 10_000_000},
)

# Sizes: M named rows out of N, `window` rows that decay.
STRENGTHS = sizes(
    tiny={"M": 64, "N": 512, "window": 32},
    small={"M": 32512, "N": 16384, "window": 16256},
    _10M={"M": 32768, "N": 10_000_000, "window": 16384},
)

# fmt: off
OPS = (
    OpRow(
        "ngram_rows", "memory", EXACT, NGRAMS,
        bytes_min=lambda s: 16 * s["M"],
        ops_min=lambda s: s["M"] * (10 * s["order"] + 1),
    ),
    OpRow(
        "touch_strengths", "memory", EXACT, STRENGTHS,
        bytes_min=lambda s: 8 * s["M"] + 2 * min(s["M"], s["N"]) + 2 * s["window"],
        ops_min=lambda s: 3 * s["M"] + 3 * s["window"],
    ),
)
# fmt: on
