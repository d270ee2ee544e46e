"""Mixture of experts with a shared projection. Experts modulate one hidden vector, where others have a hidden vector each.

Legend: B batch, P positions, D width, I shared inner width, E experts, k experts of a position, r expert rank.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from arbitor.reference.constants import HANDICAP_MAX
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import TernaryLinear, fan_out, plain
from arbitor.reference.graph.tables import TableModule, when_voting

LOAD_MAX = 2**63 - 1
"""Most choices that an expert's load can count, the largest int64."""

MODULATION_GAIN = 0.25
"""Scale of the experts' modulation at the start, where 1 would give m_e the variance of x."""


DENSE_RANKS = 1024
"""Most ranks of all experts together for which products of all of them cost less than the slots of the chosen ones."""

FEW_POSITIONS = 64
"""Positions up to which the matrices of the chosen experts alone are read, however small all of them are."""


class SharedProjectionMoE(TableModule):
    """A SwiGLU whose hidden vector the chosen experts modulate, each by a matrix of rank r.

    Math:    h = silu(W_gate x) * (W_up x); m_e = B_e A_e x; the k experts are those of `choose_experts`, by logits less handicaps
             p = softmax of the router's logits W_router x over the chosen experts, or for k = 1 over all experts
             y = W_down (h * (1 + sum over the chosen e of p_e m_e))
    Shapes:  [B, P, D] -> [B, P, D]
    Ties:    of experts with equal rows, the one of lowest index is chosen
    Paths:   grouped, with a slot for each of a position's k experts; or dense, with products of all experts, and p_e = 0 for
             experts that were not chosen. Dense is taken for up to `dense_dispatch_max_tokens` positions, and for more than
             FEW_POSITIONS where all experts have at most DENSE_RANKS ranks together. Both have fixed shapes, and differ by
             rounding. Ranks that keep experts for each other take the grouped path: slots travel to the ranks of their experts
    Tables:  load int64 [E], how often each expert was chosen in backward passes that voted; handicap int16 [E], at least 0
             after a step: h_e <- h_e + min(trunc(16 (E n_e - n) / n), 16), n_e of n choices being of expert e; then the least
             h is taken off all, so that it is 0
    Source:  REFACTOR7 (dense dispatch), REFACTOR12 (grouped); docs/spec/experts.md, docs/spec/graph.md for 1 + m; the share of
             a single expert as in Fedus et al., "Switch Transformers", 2021
    """

    def __init__(self, context: GraphContext, *, output_gain: float = 1.0) -> None:
        super().__init__(context)
        config = context.config
        self.num_experts, self.top_k, self.expert_rank = config.num_experts, config.top_k, config.expert_rank
        self.dense_max = config.dense_dispatch_max_tokens
        self.router = TernaryLinear(context, config.width, config.num_experts)
        self.gate = TernaryLinear(context, config.width, config.shared_inner)
        self.up = TernaryLinear(context, config.width, config.shared_inner)
        self.expert_down = TernaryGroupedLinear(context, config.num_experts, config.width, config.expert_rank)
        self.expert_up = TernaryGroupedLinear(
            context, config.num_experts, config.expert_rank, config.shared_inner, gain=MODULATION_GAIN
        )
        self.down = TernaryLinear(context, config.shared_inner, config.width, gain=output_gain)
        zeros_E = torch.zeros(config.num_experts, dtype=torch.int64, device=context.device)
        self.add_table("load", zeros_E, 0, LOAD_MAX)
        self.add_table("handicap", zeros_E.to(torch.int16), 0, HANDICAP_MAX)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return the output of the chosen experts."""
        takes_all = self.takes_all(x_BPD.shape[:-1].numel())
        read = (self.gate, self.up, self.router, *([self.expert_down] if takes_all else []))
        experts_BPk, products = self.voting.alongside(
            partial(self.chosen, x_BPD), partial(fan_out, x_BPD, *read)
        )
        gate_BPI, up_BPI, logits_BPE = products[:3]
        if takes_all:
            terms_BPkI = self.all_modulations(products[3], logits_BPE, experts_BPk).unsqueeze(-2)
        else:
            terms_BPkI = self.modulations(x_BPD, logits_BPE, experts_BPk)
        y_BPD = self.down(self.ops.gated(gate_BPI, up_BPI, terms_BPkI))
        return when_voting(y_BPD, self, experts_BPk)

    def chosen(self, x_BPD: Tensor) -> Tensor:
        """Return the experts that each position takes, int64 [B, P, k]."""
        handicap_E = self.get_buffer("handicap")
        x_BPD, weight = x_BPD.detach(), self.router.weight
        return self.ops.choose_experts(x_BPD, weight, top_k=self.top_k, handicap_E=handicap_E)

    def takes_all(self, num_positions: int) -> bool:
        """Return whether a pass of so many positions takes products of all experts.

        An adapter asks for those chosen, and so do ranks that keep experts for each other.
        """
        if not plain(self.expert_down, self.expert_up) or self.expert_down.spread is not None:
            return False
        is_cheap = self.num_experts * self.expert_rank <= DENSE_RANKS and num_positions > FEW_POSITIONS
        return is_cheap or num_positions <= self.dense_max

    def modulations(self, x_BPD: Tensor, logits_BPE: Tensor, experts_BPk: Tensor) -> Tensor:
        """Return share times m_e of each expert that a position takes, [B, P, k, I]."""
        x_BPkD = x_BPD.unsqueeze(-2).expand(*experts_BPk.shape, -1)
        ranks_BPkr = self.expert_down(x_BPkD, experts_BPk)
        weighed_BPR = self.ops.weigh_ranks(ranks_BPkr.flatten(-2), logits_BPE, experts_BPk, chosen_only=True)
        return self.expert_up(weighed_BPR.view_as(ranks_BPkr), experts_BPk)

    def all_modulations(self, ranks_BPR: Tensor, logits_BPE: Tensor, experts_BPk: Tensor) -> Tensor:
        """Return the sum of share times m_e over the chosen experts, [B, P, I], for A_e x of all experts, R = E r."""
        return self.expert_up.side_by_side(self.ops.weigh_ranks(ranks_BPR, logits_BPE, experts_BPk))

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        """Add to the load how often some passes chose each expert, and move the handicaps towards an even load."""
        chosen = [experts_BPk.reshape(-1) for (experts_BPk,) in passes]
        tables = (self.get_buffer("load"), self.get_buffer("handicap"))
        self.ops.balance_experts(chosen[0] if len(chosen) == 1 else torch.cat(chosen), *tables, out=tables)

    def load_shares(self) -> Tensor:
        """Return each expert's part of all choices counted so far, float64 [E]; zeros before the first step."""
        load_E = self.get_buffer("load")
        return load_E / load_E.sum().clamp(min=1).to(torch.float64)
