"""Heads: from positions to the output of the model.

Legend: B batch, P positions, D width, V = 297 vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from arbitor.reference.config import VOCABULARY_SIZE
from arbitor.reference.dtypes import widened
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm, add_norm, fan_out
from arbitor.reference.graph.module import ArbModule


class ByteHead(ArbModule):
    """Logits of the next byte.

    Math:    n = RMSNorm(x); u = x + W_down (silu(W_gate n) * (W_up n)); logits = W_vocabulary RMSNorm(u)
    Shapes:  [B, P, D] -> float32 [B, P, V] (float64 for float64 inputs)
    Source:  REFACTOR9 (297 logits); docs/spec/graph.md
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        self.norm = TernaryRMSNorm(context, config.width)
        self.gate = TernaryLinear(context, config.width, config.head_inner)
        self.up = TernaryLinear(context, config.width, config.head_inner)
        self.down = TernaryLinear(context, config.head_inner, config.width)
        self.vocabulary_norm = TernaryRMSNorm(context, config.width)
        self.vocabulary = TernaryLinear(context, config.width, VOCABULARY_SIZE, orthogonal=False)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return the logits of each position's next byte."""
        x_BPD, n_BPD = add_norm(x_BPD, None, self.norm)
        u_BPD = x_BPD + self.down(self.ops.gated(*fan_out(n_BPD, self.gate, self.up)))
        logits_BPV = self.vocabulary(self.vocabulary_norm(u_BPD))
        return widened(logits_BPV)
