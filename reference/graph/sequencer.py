"""From bytes to positions: the byte embedding and the trigram sequencer.

Legend: B batch, T bytes, P = T - 2 positions, E_b embedding width (`embed_dim`; Eb in suffixes), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arbitor.reference.config import NGRAM, VOCABULARY_SIZE
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.state import GraphContext


class ByteEmbedding(nn.Module):
    """A table of 297 rows: 256 bytes, 32 specials, 9 modality marks.

    Math:    e_t = W[id_t]
    Shapes:  ids int64 [B, T], each in 0 .. 296 -> [B, T, E_b]
    Source:  REFACTOR7, REFACTOR9 (297 rows)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__()
        self.table = TernaryEmbedding(context, VOCABULARY_SIZE, context.config.embed_dim)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the embedding of each id."""
        return self.table(ids_BT)


class TrigramSequencer(nn.Module):
    """Three neighbouring bytes become one position; position p predicts byte p + 3.

    Math:    s_p = RMSNorm(W [e_p; e_{p+1}; e_{p+2}])
    Shapes:  [B, T, E_b] -> [B, P, D]
    Source:  REFACTOR14 (text sequencer)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__()
        config = context.config
        self.project = TernaryLinear(context, NGRAM * config.embed_dim, config.width)
        self.norm = TernaryRMSNorm(context, config.width)

    def forward(self, e_BTEb: Tensor) -> Tensor:
        """Return one vector for each run of three bytes."""
        positions = e_BTEb.shape[1] - NGRAM + 1
        windows = torch.cat([e_BTEb[:, place : place + positions] for place in range(NGRAM)], dim=-1)
        return self.norm(self.project(windows))
