"""OutputRouter: the choice of the head that answers.

Legend: B batch, P positions, D width, R width inside the router.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.dtypes import widened
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.graph.module import ArbModule
from arbitor.reference.graph.units import unit_rows

MODALITIES = ("text", "video", "audio")
"""Modalities that a router chooses from, in the order of its logits."""


class OutputRouter(ArbModule):
    """Logits of the head that answers: text, video or audio.

    Math:    logits = W_out silu(W_in unit(x)), x the last position, which has read all other positions
    Shapes:  [B, P, D], P >= 1 -> float32 [B, 3] (float64 for float64 inputs)
    Source:  REFACTOR11 (OutputRouter), REFACTOR14 (12.9 M weights: D -> D/4 -> 3); docs/spec/heads.md
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        self.inner = TernaryLinear(context, config.width, config.router_inner)
        self.out = TernaryLinear(context, config.router_inner, len(MODALITIES))

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return a logit for each head."""
        if x_BPD.ndim != 3 or x_BPD.shape[1] == 0:
            raise ValueError(
                f"x_BPD has shape {tuple(x_BPD.shape)}, but must be [batch, positions, width] with at least one position"
            )
        return widened(self.out(F.silu(self.inner(unit_rows(x_BPD[:, -1])))))
