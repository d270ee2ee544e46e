"""From bytes, patches and frames to positions: the byte embedding and the sequencers.

Legend: B batch, T bytes or samples, P = T - 2 positions, N vectors, F their features, D width,
E_b embedding width (`embed_dim`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import NGRAM, VOCABULARY_SIZE
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.module import ArbModule


class ByteEmbedding(ArbModule):
    """A table of 297 rows, for 256 bytes, 32 specials and 9 modality marks.

    Math:    e_t = W[id_t]
    Shapes:  ids int64 [B, T], each in 0 .. 296 -> [B, T, E_b]
    Source:  REFACTOR7, REFACTOR9 (297 rows)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        self.table = TernaryEmbedding(context, VOCABULARY_SIZE, context.config.embed_dim)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the embedding of each id."""
        return self.table(ids_BT)


class WindowSequencer(ArbModule):
    """A sequencer that makes one position of three neighbouring vectors.

    Math:    s_p = RMSNorm(W [x_p; x_{p+1}; x_{p+2}])
    Shapes:  [B, N, F] with N >= 3 -> [B, N - 2, D]
    """

    def __init__(self, context: GraphContext, num_features: int) -> None:
        super().__init__(context)
        width = context.config.width
        self.num_features = num_features
        self.project = TernaryLinear(context, NGRAM * num_features, width)
        self.norm = TernaryRMSNorm(context, width)

    def forward(self, x_BNF: Tensor) -> Tensor:
        """Return one vector for each run of three."""
        positions = x_BNF.shape[1] - NGRAM + 1
        windows = torch.cat([x_BNF[:, place : place + positions] for place in range(NGRAM)], dim=-1)
        return self.norm(self.project(windows))

    def check_features(self, name: str, x_BNF: Tensor) -> Tensor:
        """Return features in the model's dtype; refuse features that are not [B, N, F] with three vectors or more."""
        checks.dtype_in(name, x_BNF, checks.FLOAT_DTYPES)
        if x_BNF.ndim != 3 or x_BNF.shape[2] != self.num_features or x_BNF.shape[1] < NGRAM:
            raise ValueError(
                f"{name} has shape {tuple(x_BNF.shape)}, but must be [batch, vectors, {self.num_features}] "
                f"with at least {NGRAM} vectors"
            )
        return x_BNF.to(self.dtype)


class TrigramSequencer(WindowSequencer):
    """A sequencer that makes one position of three neighbouring bytes. Position p predicts byte p + 3.

    Shapes:  [B, T, E_b] -> [B, P, D]
    Source:  REFACTOR14 (text sequencer)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context, context.config.embed_dim)


class ImageSequencer(WindowSequencer):
    """A sequencer that makes one position of three neighbouring patches of an image, in reading order.

    Shapes:  features of patches [B, N, image_features] -> [B, N - 2, D]; 256 patches are 254 positions
    Raises:  TypeError or ValueError for features that do not fit
    Source:  docs/spec/heads.md; the widths 384 and 254 of the original's image path
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context, context.config.image_features)

    def forward(self, image_BNF: Tensor) -> Tensor:
        """Return one vector for each run of three patches."""
        return super().forward(self.check_features("image_BNF", image_BNF))


class AudioSequencer(WindowSequencer):
    """A sequencer that makes one position of three neighbouring frames of audio.

    Args:
        features: function from raw audio [B, T] to frames [B, N, audio_features]; with None, raw audio is refused.

    Shapes:  frames [B, N, audio_features] -> [B, N - 2, D]; 38 frames are 36 positions. Raw audio may be [T], [B, T] or [B, 1, T]
    Raises:  TypeError or ValueError for frames that do not fit, or raw audio without `features`
    Source:  docs/spec/heads.md; REFACTOR11 (shapes of raw audio)
    """

    def __init__(self, context: GraphContext, features: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(context, context.config.audio_features)
        self.features = features

    def forward(self, audio: Tensor) -> Tensor:
        """Return one vector for each run of three frames."""
        checks.dtype_in("audio", audio, checks.FLOAT_DTYPES)
        # [B, 1, T] is raw audio, because one frame would be no run of three.
        if audio.ndim < 3 or (audio.ndim == 3 and audio.shape[1] == 1):
            if self.features is None:
                raise ValueError(
                    f"audio has shape {tuple(audio.shape)}, which is raw audio, but must be frames "
                    f"[batch, frames, {self.num_features}]: this sequencer was built without features of its own"
                )
            audio = self.features(audio_batch(audio))
        return super().forward(self.check_features("audio", audio))


def audio_batch(audio: Tensor) -> Tensor:
    """Return raw audio [T], [B, T] or [B, 1, T] as [B, T]; refuse other shapes, and audio without a sample."""
    checks.dtype_in("audio", audio, checks.FLOAT_DTYPES)
    fits = audio.ndim in (1, 2) or (audio.ndim == 3 and audio.shape[1] == 1)
    if not fits or audio.shape[-1] == 0:
        raise ValueError(
            f"audio has shape {tuple(audio.shape)}, but must be [T], [batch, T] or [batch, 1, T] with at least one sample"
        )
    if audio.ndim == 1:
        return audio[None]
    return audio if audio.ndim == 2 else audio[:, 0]
