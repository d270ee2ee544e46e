"""MoEGraph, which follows attention in a layer: experts, the nodes of the graph, and in the last layer a loop around both.

Legend: B batch, P positions, D width, I turns of the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference.config import HALT_THRESHOLD
from arbitor.reference.dtypes import widened
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm, add_norm
from arbitor.reference.graph.module import ArbModule, used
from arbitor.reference.graph.moe import SharedProjectionMoE
from arbitor.reference.graph.tables import TableModule
from arbitor.reference.ops.denoise import Halting

LEAK_SHIFTS = (1, 2, 3, 4)
"""Values of k, which channels take in turn. A channel keeps 1 - 2**-k of its state from one turn to the next."""


class MoEGraph(ArbModule):
    """Experts that read the stream and the node of each position's code.

    Math:    one turn: g = h + node; h <- h + MoE(RMSNorm(g)); without experts h <- g
    Shapes:  e [B, P, D], nodes [B, P, D] or None -> [B, P, D]
    Source:  REFACTOR14 (MoEGraph); docs/spec/graph.md
    """

    def __init__(self, context: GraphContext, *, output_gain: float = 1.0) -> None:
        super().__init__(context)
        self.has_moe = context.config.use_moe
        if self.has_moe:
            self.moe_norm = TernaryRMSNorm(context, context.config.width)
            self.moe = SharedProjectionMoE(context, output_gain=output_gain)

    def forward(
        self, e_BPD: Tensor, nodes_BPD: Tensor | None = None, read_BPD: Tensor | None = None
    ) -> Tensor:
        """Return the stream after one turn. Stream and what the experts read of it may come from `joined`."""
        if read_BPD is None:
            e_BPD, read_BPD = self.joined(e_BPD, None, nodes_BPD)
        return self.turn(e_BPD, read_BPD)

    def joined(
        self, h_BPD: Tensor, branch_BPD: Tensor | None, nodes_BPD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the stream with a branch added if there is one, and what a turn reads: RMSNorm(g), without experts g."""
        if self.has_moe and nodes_BPD is None:
            return add_norm(h_BPD, branch_BPD, self.moe_norm)
        h_BPD = h_BPD if branch_BPD is None else h_BPD + branch_BPD
        g_BPD = h_BPD if nodes_BPD is None else h_BPD + nodes_BPD
        return h_BPD, self.moe_norm(g_BPD) if self.has_moe else g_BPD

    def turn(self, h_BPD: Tensor, read_BPD: Tensor) -> Tensor:
        """Return the stream after the experts have read it."""
        return h_BPD + self.moe(read_BPD) if self.has_moe else read_BPD


class RecurrentMoEGraph(MoEGraph, TableModule):
    """The last layer's MoEGraph: the same weights for several turns, as many as each position asks for.

    Math:    h_0 = e; turn i: h~ = a h + (1 - a) e with a = 1 - 2**-k per channel (linear time-invariant injection), then
             the turn of MoEGraph on h~. Halting p_i = sigmoid(w . RMSNorm(h_i)). A position halts at the first turn at which its p
             add up to HALT_THRESHOLD, or at the last turn. The share of a turn is its p, and at the halting turn what is left of 1.
             The output is the sum of h_i times its share
    Range:   k int8 in LEAK_SHIFTS, a table of the model that nothing changes; shares add up to 1
    Source:  adaptive computation time (Graves 2016); REFACTOR12 (4 turns, 0.99), REFACTOR14 (LTI)
    """

    def __init__(self, context: GraphContext, *, output_gain: float = 1.0) -> None:
        super().__init__(context, output_gain=output_gain)
        self.max_turns = context.config.max_moe_iters if self.has_moe else 1
        if self.max_turns > 1:
            # On the CPU first: arithmetic on the meta device would import torch's compiler.
            shifts = torch.arange(context.config.width, device="cpu") % len(LEAK_SHIFTS) + LEAK_SHIFTS[0]
            self.add_table(
                "leak_shifts", shifts.to(context.device, torch.int8), LEAK_SHIFTS[0], LEAK_SHIFTS[-1]
            )
            self.halt_norm = TernaryRMSNorm(context, context.config.width)
            used(self.moe, self.max_turns)
            # With zeros a position starts undecided. Random trits would mix its turns at random, noise that it must unlearn.
            self.halt = TernaryLinear(context, context.config.width, 1, gain=0.0)
            used(self.halt, self.max_turns - 1)

    def forward(
        self, e_BPD: Tensor, nodes_BPD: Tensor | None = None, read_BPD: Tensor | None = None
    ) -> Tensor:
        """Return the mean of the streams after all turns, weighted for each position by its halting."""
        if self.max_turns == 1:
            return super().forward(e_BPD, nodes_BPD, read_BPD)
        if read_BPD is None:
            e_BPD, read_BPD = self.joined(e_BPD, None, nodes_BPD)
        shifts_D = self.get_buffer("leak_shifts")
        keep_D = kept_shares(shifts_D).to(e_BPD.dtype)
        halting, h_BPD = Halting(e_BPD, HALT_THRESHOLD), e_BPD
        for turn in range(self.max_turns):
            if turn:
                h_BPD, read_BPD = self.joined(e_BPD, keep_D * (h_BPD - e_BPD), nodes_BPD)
            h_BPD = halting.live(self.turn(h_BPD, read_BPD))
            is_last = turn + 1 == self.max_turns
            h_BPD = halting.add(h_BPD, None if is_last else self.halt_probability(h_BPD))
        return halting.mean.to(e_BPD.dtype)

    def halt_probability(self, h_BPD: Tensor) -> Tensor:
        """Return each position's probability of halting after a turn, [B, P, 1] in float32 or better."""
        return widened(self.halt(self.halt_norm(h_BPD))).sigmoid()


def kept_shares(shifts_D: Tensor) -> Tensor:
    """Return the share of its state that a channel keeps, 1 - 2**-k, for k int8 in LEAK_SHIFTS; float32, exact.

    Shifts of integers compute it. On a GPU that is not the current one, `torch.ldexp` of torch 2.11 gives zeros or reads foreign
    memory.
    """
    whole_D = torch.full_like(shifts_D, 1 << LEAK_SHIFTS[-1])
    return (whole_D - (whole_D >> shifts_D)).to(torch.float32) / (1 << LEAK_SHIFTS[-1])
