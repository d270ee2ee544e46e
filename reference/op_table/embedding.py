"""Rows of the family embedding. They count the table rows that a batch touches, not the whole table."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, TWICE, OpRow
from arbitor.reference.op_table.work import sizes, values

TABLE = sizes(
    tiny={"M": 256, "N": 297, "K": 256, "G": 12, "float_bytes": 2},
    _3072={"M": 4096, "N": 65536, "K": 3072, "G": 12, "float_bytes": 2},
    _7168={"M": 4096, "N": 65536, "K": 7168, "G": 12, "float_bytes": 2},
)

# fmt: off
OPS = (
    OpRow(
        "embedding", "embedding", EXACT, TABLE,
        bytes_min=lambda s: s["M"] * (8 + values({**s, "N": 1}) + s["float_bytes"] * s["K"]),
        ops_min=lambda s: 4 * s["M"] * s["K"],
        like=lambda ids, weight, dtype: ids.new_empty((*ids.shape, weight.shape[1]), dtype=dtype),
    ),
    OpRow(
        "embedding_row_grads", "embedding", TWICE, TABLE,
        bytes_min=lambda s: s["M"] * (8 + 8 + (s["float_bytes"] + 4) * s["K"]),
        ops_min=lambda s: s["M"] * s["K"],
    ),
)
# fmt: on
