"""Rows of the family orthogonal. A round has two products with the gradient, S = X X^T and Q X. All others are of its smaller side.

All but Q X are symmetric, so the least work computes half of each.
"""

from __future__ import annotations

from arbitor.reference.constants import orthogonal_rounds
from arbitor.reference.op_table.row import EXACT, TWICE, OpRow, Shape
from arbitor.reference.op_table.work import elements, sizes


def orthogonal_ops(s: Shape) -> int:
    """Return the least operations of all steps: half of each product but that with X. The first P Q of a round is P."""
    rows, columns = s["N"] // s["E"], s["K"]
    side = min(rows, columns)
    # A step that is not the last of its round has two more products, and one that is not the first has one more.
    rounds = orthogonal_rounds(s["iterations"])
    return s["E"] * sum(3 * rows * columns * side + (4 * length - 3) * side**3 for length in rounds)


# Sizes: the gradients of a stack of E matrices of N / E rows.
GRADIENTS = sizes(
    tiny={"N": 256, "K": 256, "E": 1, "iterations": 3, "float_bytes": 2},
    small={"N": 1024, "K": 384, "E": 1, "iterations": 3, "float_bytes": 2},
    _3072={"N": 3072, "K": 3072, "E": 1, "iterations": 3, "float_bytes": 2},
    _1408_e64={"N": 64 * 1408, "K": 2048, "E": 64, "iterations": 3, "float_bytes": 2},
    _7168={"N": 7168, "K": 7168, "E": 1, "iterations": 3, "float_bytes": 2},
    _7168x21216={"N": 7168, "K": 21216, "E": 1, "iterations": 3, "float_bytes": 2},
)

# Sizes: a gradient of N rows and its mean.
MEANS = sizes(
    tiny={"N": 256, "K": 256, "float_bytes": 2},
    small={"N": 1024, "K": 384, "float_bytes": 2},
    _7168={"N": 7168, "K": 7168, "float_bytes": 2},
)

# fmt: off
OPS = (
    OpRow(
        "average_gradient", "orthogonal", EXACT, MEANS,
        bytes_min=lambda s: (2 * s["float_bytes"] + 2) * elements(s) + 2 * s["N"],
        ops_min=lambda s: 8 * elements(s),
    ),
    OpRow(
        "orthogonalize", "orthogonal", TWICE, GRADIENTS,
        bytes_min=lambda s: 2 * s["float_bytes"] * elements(s),
        ops_min=orthogonal_ops,
        like=lambda grad_NK, iterations, num_groups: grad_NK.new_empty(grad_NK.shape),
    ),
)
# fmt: on
