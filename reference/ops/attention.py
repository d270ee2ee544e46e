"""Attention of one position over a cache of latents, in the absorbed form: no head has keys and values of its own.

Legend: B batch, H heads, S slots (the rows of the cache that are read), K columns of a slot, L value width. The first L columns
of a slot are the latent, and the other K - L are the rotary key.
Products and sums run in float32, or float64 for float64 inputs, and are rounded once to the dtype that comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.promises import op

__all__ = ["decode_attention"]


@op
def decode_attention(
    q_BHK: Tensor, keys_BSK: Tensor, bias_BS: Tensor, *, value_width: int, scale: float
) -> Tensor:
    """Return each head's weighted mean of the visible slots, which all heads share.

    Math:    a[b, h, s] = softmax over s of (scale * sum_k q[b, h, k] * keys[b, s, k] + bias[b, s])
             y[b, h, l] = sum_s a[b, h, s] * keys[b, s, l], l < L
    Shapes:  q float32, bfloat16 or float64 [B, H, K], keys of the same dtype [B, S, K]; bias float32 (float64 for float64
             inputs) [B, S], each finite or -inf. A slot of bias -inf is not visible. A slot of bias ln n stands for n slots
             with its key. L = value_width in 1 .. K; B, H and S may be 0
    Returns: dtype of q, [B, H, L]; zeros for a sequence that sees no slot
    Raises:  TypeError or ValueError for a dtype, shape, device, width, scale or bias that is not allowed
    Laws:    an invisible slot is not read, so not even a NaN in it shows; a single visible slot gives its value exactly;
             n equal slots give the same as one slot of bias ln n
    Source:  docs/spec/attention.md; DeepSeek-V2 (2024), section 2.1 (absorbed form)
    """
    checks.decode_slots(q_BHK, keys_BSK, bias_BS, value_width=value_width, scale=scale)
    checks.slot_bias(bias_BS)
    wide = wide_dtype(q_BHK)
    visible_BS1 = (bias_BS > -torch.inf)[:, :, None]
    keys_BSK = torch.where(visible_BS1, keys_BSK.to(wide), 0.0)
    scores_BHS = q_BHK.to(wide) @ keys_BSK.transpose(1, 2) * scale + bias_BS[:, None, :]
    # Where nothing is visible the softmax is 0 / 0.
    shares_BHS = torch.where(visible_BS1.transpose(1, 2), scores_BHS.softmax(dim=-1), 0.0)
    return (shares_BHS @ keys_BSK[:, :, :value_width]).to(q_BHK.dtype)
