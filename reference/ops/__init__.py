"""The rules: pure functions on tensors and ternary weights, one family a file. `arbitor.optimized.ops` mirrors every name."""

from arbitor.reference.ops.conv import conv1d, conv1d_input_grad, conv1d_weight_grad
from arbitor.reference.ops.denoise import denoise_step, denoise_step_backward
from arbitor.reference.ops.dither import dither_bytes
from arbitor.reference.ops.embedding import embedding, embedding_row_grads
from arbitor.reference.ops.layout import from_spec, to_spec
from arbitor.reference.ops.linear import linear, linear_input_grad, linear_weight_grad
from arbitor.reference.ops.norm import rms_norm, rms_norm_input_grad, rms_norm_weight_grad
from arbitor.reference.ops.packing import pack_trits, unpack_trits
from arbitor.reference.ops.scale import constant_weight, dequantize, group_scales, initial_weight
from arbitor.reference.ops.update import (
    accumulate,
    accumulate_gradient,
    apply_step,
    count_changed_trits,
    count_nonfinite_rows,
)
from arbitor.reference.ops.votes import row_exponents, sign_votes, step_from_loss, stochastic_votes

__all__ = [
    "accumulate",
    "accumulate_gradient",
    "apply_step",
    "constant_weight",
    "conv1d",
    "conv1d_input_grad",
    "conv1d_weight_grad",
    "count_changed_trits",
    "count_nonfinite_rows",
    "denoise_step",
    "denoise_step_backward",
    "dequantize",
    "dither_bytes",
    "embedding",
    "embedding_row_grads",
    "from_spec",
    "group_scales",
    "initial_weight",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
    "pack_trits",
    "rms_norm",
    "rms_norm_input_grad",
    "rms_norm_weight_grad",
    "row_exponents",
    "sign_votes",
    "step_from_loss",
    "stochastic_votes",
    "to_spec",
    "unpack_trits",
]
