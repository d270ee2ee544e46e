"""Attention. See `arbitor.reference.ops.attention`."""

from __future__ import annotations

from torch import Tensor

from arbitor.optimized.kernels import attention as kernels
from arbitor.optimized.kernels.launch import may_look_at_values
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = ["decode_attention"]


@op()
def decode_attention(
    q_BHK: Tensor, keys_BSK: Tensor, bias_BS: Tensor, *, value_width: int, scale: float
) -> Tensor:
    """See reference; float64 is not supported."""
    checks.dtype_in("q_BHK", q_BHK, DTYPES)
    checks.decode_slots(q_BHK, keys_BSK, bias_BS, value_width=value_width, scale=scale)
    if may_look_at_values(bias_BS):
        checks.slot_bias(bias_BS)
    return kernels.attended(q_BHK, keys_BSK, bias_BS, value_width, float(scale))
