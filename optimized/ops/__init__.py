"""The ops of `arbitor.reference.ops` on Triton: same names, signatures, results and refusals.

They run on CUDA, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the import).
"""

from arbitor.optimized.ops.attention import decode_attention
from arbitor.optimized.ops.codebook import (
    age_codes,
    candidate_codes,
    count_codes,
    initial_codebook,
    nearest_candidates,
    nearest_codes,
    revive_codes,
)
from arbitor.optimized.ops.conv import conv1d, conv1d_input_grad, conv1d_weight_grad
from arbitor.optimized.ops.denoise import denoise_loop, denoise_step, denoise_step_backward
from arbitor.optimized.ops.dither import dither_bytes
from arbitor.optimized.ops.edges import edge_sum, edge_sum_input_grad, edge_sum_sign_grad, update_neighbours
from arbitor.optimized.ops.embedding import embedding, embedding_row_grads
from arbitor.optimized.ops.experts import (
    choose_experts,
    expert_load,
    grouped_linear,
    grouped_linear_input_grad,
    grouped_linear_weight_grad,
)
from arbitor.optimized.ops.layout import from_spec, to_spec
from arbitor.optimized.ops.linear import linear, linear_input_grad, linear_weight_grad
from arbitor.optimized.ops.memory import ngram_rows, touch_strengths
from arbitor.optimized.ops.norm import rms_norm, rms_norm_input_grad, rms_norm_weight_grad
from arbitor.optimized.ops.orthogonal import orthogonalize
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
    "age_codes",
    "apply_step",
    "candidate_codes",
    "choose_experts",
    "constant_weight",
    "conv1d",
    "conv1d_input_grad",
    "conv1d_weight_grad",
    "count_changed_trits",
    "count_codes",
    "count_nonfinite_rows",
    "decode_attention",
    "denoise_loop",
    "denoise_step",
    "denoise_step_backward",
    "dequantize",
    "dither_bytes",
    "edge_sum",
    "edge_sum_input_grad",
    "edge_sum_sign_grad",
    "embedding",
    "embedding_row_grads",
    "expert_load",
    "from_spec",
    "group_scales",
    "grouped_linear",
    "grouped_linear_input_grad",
    "grouped_linear_weight_grad",
    "initial_codebook",
    "initial_weight",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
    "nearest_candidates",
    "nearest_codes",
    "ngram_rows",
    "orthogonalize",
    "pack_trits",
    "revive_codes",
    "rms_norm",
    "rms_norm_input_grad",
    "rms_norm_weight_grad",
    "row_exponents",
    "sign_votes",
    "step_from_loss",
    "stochastic_votes",
    "to_spec",
    "touch_strengths",
    "unpack_trits",
    "update_neighbours",
]
