"""TalkerHead: from positions to audio tokens.

Legend: B batch, P positions, D width, V audio tokens to choose from.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.config import SPECIAL_IDS
from arbitor.reference.dtypes import widened
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.graph.module import ArbModule, as_it_is
from arbitor.reference.graph.units import unit_rows

SPOKEN_STRIDE = 5
"""Tokens that a mark behind a text answers with, all of them equal: 50 ms of sound."""

MAX_TOKENS = 2**31 - 1
"""Largest `length` and `stride`."""


def spoken_marks(tokens: int) -> list[int]:
    """Return the ids of the marks behind a text at which the talker answers with so many tokens.

    AUDIO_START comes first and is no mark. Mark k is the id k mod 256, so that each mark tells its time. Each mark has read all of
    the text, as no letter of the text has.
    """
    return [SPECIAL_IDS["AUDIO_START"], *(place % 256 for place in range(-(-tokens // SPOKEN_STRIDE)))]


class TalkerHead(ArbModule):
    """A head that makes the audio tokens of all positions at once.

    Math:    logits = W unit(x); token = argmax, repeated `stride` times, then cut or padded to `length`
    Shapes:  [B, P, D] -> int64 [B, length], or [B, P stride] without a length
    Ties:    the lowest token
    Source:  REFACTOR9 (one call, stride, pad and truncate), REFACTOR11 (token_logits); docs/spec/heads.md
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        self.tokens = TernaryLinear(
            context, context.config.width, context.config.talker_tokens, orthogonal=False
        )

    @as_it_is
    def token_logits(self, x_BPD: Tensor) -> Tensor:
        """Return the logits of each position's token, float32 [B, P, V], which cross-entropy trains."""
        return widened(self.tokens(unit_rows(x_BPD)))

    @staticmethod
    def stride(positions: int, tokens: int) -> int:
        """Return how often a position's token is repeated, ceil(tokens / positions), so that `positions` say `tokens` tokens."""
        return -(-tokens // positions)

    def forward(
        self, x_BPD: Tensor, *, stride: int = 1, length: int | None = None, pad_token: int = 0
    ) -> Tensor:
        """Return the likeliest token of each position.

        Args:
            stride:    how often each token is repeated.
            length:    number of tokens that come out; with None, all.
            pad_token: token that fills up to `length` after the last token.
        """
        checks.integer("stride", stride, 1, MAX_TOKENS)
        checks.integer("pad_token", pad_token, 0, self.tokens.weight.shape[0] - 1)
        ids_BP = self.token_logits(x_BPD).argmax(dim=-1).repeat_interleave(stride, dim=1)
        if length is None:
            return ids_BP
        checks.integer("length", length, 0, MAX_TOKENS)
        return F.pad(ids_BP[:, :length], (0, max(0, length - ids_BP.shape[1])), value=pad_token)
