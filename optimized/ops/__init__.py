"""The ops of `arbitor.reference.ops` on Triton: same names, signatures, results and refusals.

They run on CUDA, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the import).
"""

from arbitor.optimized.ops.conv import conv1d, conv1d_input_grad, conv1d_weight_grad
from arbitor.optimized.ops.denoise import denoise_step, denoise_step_backward
from arbitor.optimized.ops.dither import dither_bytes
from arbitor.optimized.ops.embedding import embedding, embedding_row_grads
from arbitor.optimized.ops.layout import from_spec, to_spec
from arbitor.optimized.ops.linear import linear, linear_input_grad, linear_weight_grad
from arbitor.optimized.ops.norm import rms_norm, rms_norm_input_grad, rms_norm_weight_grad
from arbitor.optimized.ops.packing import pack_trits, unpack_trits
from arbitor.optimized.ops.scale import constant_weight, dequantize, group_scales, initial_weight
from arbitor.optimized.ops.update import (
    accumulate,
    accumulate_gradient,
    apply_step,
    count_changed_trits,
    count_nonfinite_rows,
)
from arbitor.optimized.ops.votes import row_exponents, sign_votes, step_from_loss, stochastic_votes

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
