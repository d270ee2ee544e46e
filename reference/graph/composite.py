"""Composites: codes of a second table, which the stream of a position proposes for its code, and which codes keep.

Legend: B batch, P positions, D width, C code width, N codes of the graph, J slots of a code, R = B P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.dtypes import wide_dtype, widened
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.module import ArbModule
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.graph.tables import when_voting
from arbitor.reference.graph.ternary_graph import EdgeTable, edge_sum

COMPOSITES_PER_CODE = 4
"""J, the number of composites that a code keeps."""


class CompositeProposalHead(ArbModule):
    """A head that proposes a composite for a position's code. A composite is trained to foretell the next motif.

    Math:    n = RMSNorm(h), h held; z = RMSNorm(W_code silu(W_inner n)); id = nearest composite, c = its vector
             open where w . n > 0. There the pair (code of the position, id) is counted after the step, and read from then on
             read: sum over the slots of a code of a_j * composite_j, a_j the learned sign of a slot
             composite_prediction: mean of (c - motif of the next position)^2, straight through to z
             composite_commitment, composite_codebook: mean of (z - c)^2 over open positions, c or z held
             composite_gate: mean over positions of open * (error of the prediction - mean error), straight through to
             sigmoid(w . n), errors held
    Shapes:  h [B, P, D], codes int64 [B, P] of N in all, motifs [B, P, C], the vectors of the codes -> losses, float32 or
             better, []; read: codes int64 [B, P] -> [B, P, C]
    Source:  docs/spec/memory.md, also for why h is held; REFACTOR14 (CompositeProposalHead, 5 M composites)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        self.norm = TernaryRMSNorm(context, config.width)
        self.inner = TernaryLinear(context, config.width, config.composite_inner)
        self.code = TernaryLinear(context, config.composite_inner, config.code_dim)
        self.code_norm = TernaryRMSNorm(context, config.code_dim)
        self.gate = TernaryLinear(context, config.width, 1)
        self.codebook = TernaryVQCodebook(context, config.composite_codes, config.code_dim)
        num_codes = config.num_codes + config.image_codes + config.audio_codes
        self.edges = EdgeTable(
            context, num_codes, COMPOSITES_PER_CODE, num_targets=config.composite_codes, allow_loops=True
        )

    def read(self, codes_BP: Tensor) -> Tensor:
        """Return the sum of the composites that each position's code keeps, in code space; zeros for a code that keeps none.

        Each composite counts with the sign of its slot. In a backward pass both signs and composites vote.
        """
        codes_R = codes_BP.flatten()
        kept_RJ = self.edges.neighbours_of(codes_R)
        # Only the composites that the codes keep are decoded, not the whole table.
        c_RJC = self.codebook.rows_or_zeros(kept_RJ.to(torch.int64))
        places_RJ = torch.arange(kept_RJ.numel(), dtype=torch.int32, device=kept_RJ.device).view_as(kept_RJ)
        slots_RJ = torch.where(kept_RJ >= 0, places_RJ, -1)
        sums_RC = edge_sum(c_RJC.flatten(0, 1), slots_RJ, self.edges(codes_R), self.ops)
        return sums_RC.unflatten(0, codes_BP.shape)

    def forward(self, h_BPD: Tensor, codes_BP: Tensor, motifs_BPC: Tensor) -> dict[str, Tensor]:
        """Return the losses of the proposals by name. An accepted backward pass through the losses leaves its pairs."""
        checks.last_dim("motifs_BPC", motifs_BPC, self.codebook.weight.shape[1])
        n_BPD = self.norm(h_BPD.detach())
        logits_BP = self.gate(n_BPD).squeeze(-1)
        open_BP = logits_BP.detach() > 0
        z_BPC = self.code_norm(self.code(F.silu(self.inner(n_BPD))))
        ids_BP = self.codebook.search(z_BPC)
        kept_BP = torch.where(open_BP, ids_BP, -1)
        z_BPC = when_voting(z_BPC, self.codebook, self.codebook.seen(z_BPC), kept_BP)
        z_BPC = when_voting(z_BPC, self.edges, codes_BP, kept_BP)
        c_BPC = self.codebook.decoded(ids_BP, self.codebook.weight)
        through_BPC = c_BPC + (z_BPC - z_BPC.detach())
        # The last position's next motif is not known.
        errors_BP = _distances(through_BPC[:, :-1], motifs_BPC[:, 1:].detach())
        rows_BPC, ranks = self.codebook.rows_or_zeros(kept_BP), self.voting.ranks
        return {
            "composite_commitment": _mean_of(_distances(z_BPC, c_BPC), open_BP, ranks),
            "composite_codebook": _mean_of(_distances(rows_BPC, z_BPC.detach()), open_BP, ranks),
            "composite_prediction": _mean_of(errors_BP, torch.ones_like(open_BP[:, 1:]), ranks),
            "composite_gate": gate_loss(logits_BP[:, :-1], errors_BP.detach(), ranks),
        }


def gate_loss(logits: Tensor, errors: Tensor, ranks: Ranks) -> Tensor:
    """Return the loss that opens a gate where the error is below the mean, and closes it where the error is above.

    Math:    mean of open * (error - mean error), open = 1 where logit > 0, else 0; its gradient is that of sigmoid(logit).
             The mean error is that of all ranks
    Shapes:  logits and errors [...], held -> [], float32 or better; 0 for no positions
    """
    p = widened(logits).sigmoid()
    opened = (logits.detach() > 0).to(p.dtype) + (p - p.detach())
    count = max(errors.numel(), 1)
    return (opened * (errors - ranks.mean(errors.sum()) / count)).sum() / count


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference over the last dimension, in float32 or better."""
    wide = wide_dtype(a)
    return (a.to(wide) - b.to(wide)).square().mean(dim=-1)


def _mean_of(values: Tensor, chosen: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean of the chosen values, or 0 if no value is chosen; with several ranks their mean is that of all values."""
    return torch.where(chosen, values, 0.0).sum() / ranks.divisor(chosen)
