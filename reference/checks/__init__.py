"""Refusals of bad arguments: each is one sentence that names the argument, its value and what is allowed.

`reference` and `optimized` share them, so that both refuse the same inputs with the same exception. No arithmetic is here.
Callers write `checks.<name>`. Each file holds the checks of one subject.
"""

from __future__ import annotations

from arbitor.reference.checks.activations import gate_inputs, head_columns, key_columns, turns
from arbitor.reference.checks.arguments import (
    flag,
    group_size,
    integer,
    mantissa_bits,
    matrix_shape,
    normal_number,
    number,
    one_of,
    threshold,
)
from arbitor.reference.checks.attention import decode_slots, slot_bias
from arbitor.reference.checks.codebooks import (
    buckets,
    code_columns,
    code_window,
    codebook,
    revivals,
    usage_of,
)
from arbitor.reference.checks.conv import conv_columns, conv_gradient, conv_input, conv_positions
from arbitor.reference.checks.denoise import denoise_loop
from arbitor.reference.checks.edges import (
    edge_gradient,
    edge_pairs,
    edge_signs,
    edge_slots,
    neighbour_tables,
    node_matrix,
)
from arbitor.reference.checks.experts import (
    expert_matrix,
    expert_pair,
    expert_rows,
    expert_slots,
    router,
    stacked_rows,
)
from arbitor.reference.checks.memory import ngrams, strength_rule, strengths_of
from arbitor.reference.checks.tensors import (
    FLOAT_DTYPES,
    GRADIENT_DTYPES,
    averages,
    dtype_in,
    gradient_matrix,
    is_tensor,
    last_dim,
    last_dim_not_empty,
    matrix,
    names,
    same_device,
    same_dtype,
    same_shape,
    tensor,
    values_between,
)
from arbitor.reference.checks.votes import MAX_RATE, fault_counter, gradient_of, vote_clock, vote_rate
from arbitor.reference.checks.weights import (
    Weight,
    group_ids_fit,
    one_row,
    out_weight,
    row_ids,
    row_values,
    rows_of,
    weight_values,
)

__all__ = [
    "FLOAT_DTYPES",
    "GRADIENT_DTYPES",
    "MAX_RATE",
    "Weight",
    "averages",
    "buckets",
    "code_columns",
    "code_window",
    "codebook",
    "conv_columns",
    "conv_gradient",
    "conv_input",
    "conv_positions",
    "decode_slots",
    "denoise_loop",
    "dtype_in",
    "edge_gradient",
    "edge_pairs",
    "edge_signs",
    "edge_slots",
    "expert_matrix",
    "expert_pair",
    "expert_rows",
    "expert_slots",
    "fault_counter",
    "flag",
    "gate_inputs",
    "gradient_matrix",
    "gradient_of",
    "group_ids_fit",
    "group_size",
    "head_columns",
    "integer",
    "is_tensor",
    "key_columns",
    "last_dim",
    "last_dim_not_empty",
    "mantissa_bits",
    "matrix",
    "matrix_shape",
    "names",
    "neighbour_tables",
    "ngrams",
    "node_matrix",
    "normal_number",
    "number",
    "one_of",
    "one_row",
    "out_weight",
    "revivals",
    "router",
    "row_ids",
    "row_values",
    "rows_of",
    "same_device",
    "same_dtype",
    "same_shape",
    "slot_bias",
    "stacked_rows",
    "strength_rule",
    "strengths_of",
    "tensor",
    "threshold",
    "turns",
    "usage_of",
    "values_between",
    "vote_clock",
    "vote_rate",
    "weight_values",
]
