"""Rows of the family linear."""

from __future__ import annotations

from arbitor.reference.op_table.row import TWICE, OpRow, sums
from arbitor.reference.op_table.work import elements, linear_activations, linear_ops, sizes, values

LINEAR = sizes(
    tiny={"M": 256, "N": 256, "K": 256, "G": 12, "float_bytes": 2},
    _3072={"M": 4096, "N": 3072, "K": 3072, "G": 12, "float_bytes": 2},
    _7168={"M": 4096, "N": 7168, "K": 7168, "G": 12, "float_bytes": 2},
    _7168_decode={"M": 1, "N": 7168, "K": 7168, "G": 12, "float_bytes": 2},
)

# fmt: off
OPS = (
    OpRow(
        "linear", "linear", TWICE, LINEAR,
        bytes_min=lambda s: linear_activations(s) + values(s),
        ops_min=linear_ops,
        like=lambda x, weight, num_groups: x.new_empty((*x.shape[:-1], weight.shape[0] // num_groups)),
    ),
    OpRow(
        "linear_input_grad", "linear", TWICE, LINEAR,
        bytes_min=lambda s: linear_activations(s) + values(s),
        ops_min=linear_ops,
        like=lambda grad, weight, num_groups: grad.new_empty((*grad.shape[:-1], num_groups * weight.shape[1])),
    ),
    OpRow(
        "linear_weight_grad", "linear", TWICE, LINEAR,
        bytes_min=lambda s: linear_activations(s) + 4 * elements(s),
        ops_min=linear_ops,
        like=lambda grad, x, num_groups, dtype: sums(
            x, num_groups * grad.shape[-1], x.shape[-1] // num_groups, dtype=dtype
        ),
    ),
)
# fmt: on
