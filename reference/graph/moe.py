"""Mixture of experts with a shared projection: experts modulate one hidden vector instead of each having its own.

Legend: B batch, P positions, D width, I shared inner width, E experts, r expert rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.graph.state import GraphContext

MODULATION_GAIN = 0.25
"""Scale of the experts' modulation at the start, where 1 would give m_e the variance of x."""


class SharedProjectionMoE(nn.Module):
    """A SwiGLU whose hidden vector the chosen experts modulate, each by a matrix of rank r.

    Math:    h = silu(W_gate x) * (W_up x); m_e = B_e A_e x; p = softmax of the router's logits over the top k experts
             y = W_down (h * (1 + sum over the top k of p_e m_e))
    Shapes:  [B, P, D] -> [B, P, D]
    Ties:    of experts with equal logits, the one of lowest index is chosen
    Path:    dense and of fixed shape: all A_e are one weight [E r, D], all B_e one weight [I, E r], and an expert that a
             position did not choose enters with p_e = 0
    Source:  REFACTOR7 (dense dispatch); docs/spec/graph.md, also for why 1 + m
    """

    def __init__(self, context: GraphContext, *, output_gain: float = 1.0) -> None:
        super().__init__()
        config = context.config
        self.num_experts, self.top_k, self.expert_rank = config.num_experts, config.top_k, config.expert_rank
        stacked_rank = config.num_experts * config.expert_rank
        self.router = TernaryLinear(context, config.width, config.num_experts)
        self.gate = TernaryLinear(context, config.width, config.shared_inner)
        self.up = TernaryLinear(context, config.width, config.shared_inner)
        self.expert_down = TernaryLinear(context, config.width, stacked_rank)
        self.expert_up = TernaryLinear(
            context, stacked_rank, config.shared_inner, gain=MODULATION_GAIN, fan_in=config.expert_rank
        )
        self.down = TernaryLinear(context, config.shared_inner, config.width, gain=output_gain)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return the output of the chosen experts."""
        p_BPE = expert_shares(self.router(x_BPD), self.top_k)
        ranks_BPEr = self.expert_down(x_BPD).unflatten(-1, (self.num_experts, self.expert_rank))
        modulation_BPI = self.expert_up((ranks_BPEr * p_BPE[..., None]).flatten(-2))
        h_BPI = F.silu(self.gate(x_BPD)) * self.up(x_BPD)
        return self.down(h_BPI * (1 + modulation_BPI))


def expert_shares(logits_BPE: Tensor, top_k: int) -> Tensor:
    """Return each expert's share: a softmax over the `top_k` largest logits, zero for the others.

    Ties:    lowest index first
    Returns: dtype of the logits; the softmax runs in float32 or better
    """
    order = logits_BPE.detach().sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(logits_BPE, dtype=torch.bool).scatter(-1, order[..., :top_k], True)
    wide = logits_BPE.to(torch.promote_types(logits_BPE.dtype, torch.float32))
    return wide.masked_fill(~chosen, -torch.inf).softmax(dim=-1).to(logits_BPE.dtype)
