"""Rows of the family edges."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, TWICE, OpRow, Shape, sums
from arbitor.reference.op_table.work import sizes

# Sizes: M rows gather from N nodes of K columns, each by J slots.
EDGES = sizes(
    tiny={"M": 64, "N": 48, "K": 48, "J": 10, "float_bytes": 2},
    _512={"M": 16384, "N": 4096, "K": 512, "J": 10, "float_bytes": 2},
    _512_n58684={"M": 16384, "N": 58684, "K": 512, "J": 10, "float_bytes": 2},
    _7168={"M": 1024, "N": 4096, "K": 7168, "J": 10, "float_bytes": 2},
    _7168_n58684={"M": 1024, "N": 58684, "K": 7168, "J": 10, "float_bytes": 2},
)

# Sizes: M pairs enter a table of N rows of J slots.
NEIGHBOURS = sizes(
    tiny={"M": 64, "N": 48, "J": 10, "G": 12},
    _4096={"M": 16384, "N": 4096, "J": 10, "G": 12},
    _10M={"M": 16384, "N": 10_000_000, "J": 10, "G": 12},
)


def edges(s: Shape) -> int:
    """Return the bytes of neighbours, signs and gathered sums, with the nodes that slots can name at most."""
    nodes = min(s["N"], s["M"] * s["J"])
    return s["M"] * s["J"] * (4 + s["float_bytes"]) + s["float_bytes"] * s["K"] * (s["M"] + nodes)


# fmt: off
OPS = (
    OpRow(
        "edge_sum", "edges", TWICE, EDGES,
        bytes_min=edges,
        ops_min=lambda s: 2 * s["M"] * s["J"] * s["K"],
        like=lambda h_ND, neighbours_RJ, signs_RJ: h_ND.new_empty((neighbours_RJ.shape[0], h_ND.shape[1])),
    ),
    OpRow(
        "edge_sum_input_grad", "edges", TWICE, EDGES,
        bytes_min=lambda s: s["M"] * s["J"] * (4 + s["float_bytes"]) + s["float_bytes"] * s["K"] * (s["M"] + s["N"]),
        ops_min=lambda s: 2 * s["M"] * s["J"] * s["K"],
        like=lambda grad_RD, neighbours_RJ, signs_RJ, num_nodes: grad_RD.new_empty((num_nodes, grad_RD.shape[1])),
    ),
    OpRow(
        "edge_sum_sign_grad", "edges", TWICE, EDGES,
        bytes_min=lambda s: edges(s) + s["M"] * s["J"] * (4 - s["float_bytes"]),
        ops_min=lambda s: 2 * s["M"] * s["J"] * s["K"],
        like=lambda grad_RD, h_ND, neighbours_RJ: sums(h_ND, *neighbours_RJ.shape),
    ),
    OpRow(
        "update_neighbours", "edges", EXACT, NEIGHBOURS,
        bytes_min=lambda s: 16 * s["M"] + min(s["M"], s["N"]) * 2 * s["J"] * (4 + 1 + 1),
        ops_min=lambda s: 4 * s["M"] * s["J"],
    ),
)
# fmt: on
