"""Multi-head latent attention (MLA): keys and values of a position are made from one small latent.

Legend: B batch, P positions, D width, H heads, C head width, R rotary width, Q query latent, L key-value latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.state import GraphContext

ROTARY_BASE = 10_000.0
"""Base of the geometric series of rotary wavelengths, in positions."""


class LatentAttention(nn.Module):
    """Causal attention whose cache is one latent and one rotary key a position, shared by all heads.

    Math:    [l_p; k^R_p] = W_latent_down x_p; l^_p = RMSNorm(l_p)
             q_p = W_query_up RMSNorm(W_query_down x_p), H heads of C
             each head: its first R query columns and k^R are turned by the position; the other C - R key columns and the
             C value columns are rows of W_latent_up l^_p
             y_p = W_output [softmax over s <= p of (q_p . k_s / sqrt(C)) v_s, all heads]
    Shapes:  [B, P, D] -> [B, P, D]
    Source:  DeepSeek-V2 (2024), section 2.1; keys and values of one width C, so that fused attention kernels apply
    """

    def __init__(self, context: GraphContext, *, output_gain: float = 1.0) -> None:
        super().__init__()
        config = context.config
        self.num_heads, self.head_dim, self.rotary_dim = config.num_heads, config.head_dim, config.rotary_dim
        self.kv_latent = config.kv_latent
        heads_width = config.num_heads * config.head_dim
        keys_values = config.num_heads * (2 * config.head_dim - config.rotary_dim)
        self.query_down = TernaryLinear(context, config.width, config.query_latent)
        self.query_norm = TernaryRMSNorm(context, config.query_latent)
        self.query_up = TernaryLinear(context, config.query_latent, heads_width)
        self.latent_down = TernaryLinear(context, config.width, config.kv_latent + config.rotary_dim)
        self.latent_norm = TernaryRMSNorm(context, config.kv_latent)
        self.latent_up = TernaryLinear(context, config.kv_latent, keys_values)
        self.output = TernaryLinear(context, heads_width, config.width, gain=output_gain)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return what each position gathers from itself and the positions before it."""
        batch, positions, _ = x_BPD.shape
        plain_dim = self.head_dim - self.rotary_dim
        q_BPHC = self.query_up(self.query_norm(self.query_down(x_BPD))).unflatten(
            -1, (self.num_heads, self.head_dim)
        )
        latent_BPL, rotary_key_BPR = self.latent_down(x_BPD).split([self.kv_latent, self.rotary_dim], dim=-1)
        keys_values = self.latent_up(self.latent_norm(latent_BPL)).unflatten(-1, (self.num_heads, -1))
        plain_key, v_BPHC = keys_values.split([plain_dim, self.head_dim], dim=-1)

        q_rotary, q_plain = q_BPHC.split([self.rotary_dim, plain_dim], dim=-1)
        turns = rotary_turns(positions, self.rotary_dim, device=x_BPD.device)
        q_BPHC = torch.cat([rotate(q_rotary, turns), q_plain], dim=-1)
        rotary_key = rotate(rotary_key_BPR[:, :, None], turns).expand(-1, -1, self.num_heads, -1)
        k_BPHC = torch.cat([rotary_key, plain_key], dim=-1)

        heads_BHPC = F.scaled_dot_product_attention(
            q_BPHC.transpose(1, 2), k_BPHC.transpose(1, 2), v_BPHC.transpose(1, 2), is_causal=True
        )
        return self.output(heads_BHPC.transpose(1, 2).reshape(batch, positions, -1))


def rotary_turns(positions: int, rotary_dim: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles, float32 [P, 1, R / 2].

    Math:    angle[p, i] = p * base**(-2 i / R)
    """
    wavelengths = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * ROTARY_BASE**-wavelengths
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x_BPHR: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with its column pairs (i, i + R / 2) turned by the angles of their position, in the dtype of x.

    Math:    (a, b) -> (a cos - b sin, a sin + b cos)
    """
    cosine, sine = turns
    a, b = x_BPHR.to(torch.promote_types(x_BPHR.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1).to(x_BPHR.dtype)
