"""Attention over a cache of latents: what one position reads, in the absorbed form, without keys and values of a head.

Legend: B batch, H heads, S slots (rows of the cache that are looked at), K columns of a slot, L value width (the first L
columns of a slot: the latent; the other K - L are the rotary key).
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
    """Return what each head gathers from the slots that it can see, which all heads share.

    Math:    a[b, h, s] = softmax over s of (scale * sum_k q[b, h, k] * keys[b, s, k] + bias[b, s])
             y[b, h, l] = sum_s a[b, h, s] * keys[b, s, l], l < L
    Shapes:  q float32, bfloat16 or float64 [B, H, K], keys of the same dtype [B, S, K]; bias float32 (float64 for float64
             inputs) [B, S], each finite or -inf: a slot of bias -inf is not visible, one of bias ln n stands for n slots
             with its key; L = value_width in 1 .. K; B, H and S may be 0
    Returns: dtype of q, [B, H, L]; zeros for a sequence that sees no slot
    Raises:  TypeError or ValueError for a dtype, shape, device, width, scale or bias that is not allowed
    Laws:    what is not visible is not read: not even NaN shows; one visible slot gives its value exactly; n equal slots
             give what one with bias ln n gives
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
