"""AudioVQEncoder, which makes tokens of raw audio for the talker head to learn, and the convolution that it is made of.

Legend: B batch, T samples, C channels in, L length, N channels out, J taps, F frames, V = 289 codes.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.dtypes import widened
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.graph.module import ArbModule, TernaryModule, as_it_is
from arbitor.reference.graph.rule import Rule
from arbitor.reference.graph.sequencer import audio_batch
from arbitor.reference.graph.units import unit_rows
from arbitor.reference.types import LaidOutWeight

AUDIO_CODES = 289
"""V: entries of the encoder's codebook, and tokens of the talker head that learns from it."""

CODE_WIDTH = 128
"""Width of a code."""

CHANNELS = (128, 256)
"""Channels out of the two convolutions."""

FIRST = {"kernel_size": 25, "stride": 20, "padding": 3}
SECOND = {"kernel_size": 9, "stride": 8, "padding": 1}
"""The two convolutions. Together they give a frame for each 160 samples, 10 ms at 16 kHz. Their kernels are a little longer than
their strides."""

SAMPLES_PER_FRAME = FIRST["stride"] * SECOND["stride"]
"""Samples of a frame: 160 n samples give n frames."""


class TernaryConv1d(TernaryModule):
    """One-dimensional convolution. No bias.

    Shapes:  [B, C, L] -> [B, N, floor((L + 2 padding - J) / stride) + 1]; the weight is [N, C J]
    Start:   standard deviation gain * (C J)^-1/2
    Source:  REFACTOR9 (TernaryConv1d)
    """

    def __init__(
        self,
        context: GraphContext,
        num_inputs: int,
        num_outputs: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        gain: float = 1.0,
    ) -> None:
        shape = (num_outputs, num_inputs * kernel_size)
        std = gain / math.sqrt(shape[1])
        super().__init__(
            context, lambda tensor_id: context.random_weight(shape, std=std, tensor_id=tensor_id)
        )
        self.geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}

    def forward(self, x_BCL: Tensor) -> Tensor:
        """Return `ops.conv1d` of x, in the dtype of x."""
        return self.run(_CONV, x_BCL)


def _convolved(module: TernaryConv1d, weight: LaidOutWeight, x: Tensor) -> Tensor:
    return module.ops.conv1d(x, weight, **module.geometry)


def _conv_learns(
    module: TernaryConv1d, weight: LaidOutWeight, grad: Tensor, x: Tensor, *, asked: bool
) -> Tensor | None:
    grad_x, geometry = None, module.geometry
    if asked:
        grad_x = module.ops.conv1d_input_grad(grad, weight, length=x.shape[2], **geometry)
    if module.moves:
        module.vote(module.ops.conv1d_weight_grad(grad, x, **geometry))
    return grad_x


_CONV = Rule(_convolved, _conv_learns)


class AudioVQEncoder(ArbModule):
    """An encoder of raw audio to tokens. It is no part of the model's forward pass, but makes the targets of its talker head.

    Args:
        channels: channels out of the two convolutions; tests take fewer.

    Math:    h = silu(conv2(silu(conv1(audio)))); z = unit(W_project h) per frame; token = nearest code
             logits = W_out code, straight through (the gradient that reaches the code goes on to z)
    Shapes:  audio [T], [B, T] or [B, 1, T], at least 160 samples -> logits float32 [B, F, 289], tokens int64 [B, F]
    Range:   404,864 weights: 3,200 + 294,912 + 32,768 + 36,992 + 36,992
    Raises:  TypeError or ValueError for audio that is not allowed
    Source:  REFACTOR9 (404,864 weights), REFACTOR12 (logits, tokens); docs/spec/heads.md
    """

    def __init__(self, context: GraphContext, *, channels: tuple[int, int] = CHANNELS) -> None:
        super().__init__(context)
        self.first = TernaryConv1d(context, 1, channels[0], **FIRST)
        self.second = TernaryConv1d(context, channels[0], channels[1], **SECOND)
        self.project = TernaryLinear(context, channels[1], CODE_WIDTH)
        self.codebook = TernaryVQCodebook(context, AUDIO_CODES, CODE_WIDTH)
        self.out = TernaryLinear(context, CODE_WIDTH, AUDIO_CODES, orthogonal=False)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and tokens of each frame."""
        logits_BFV, ids_BF, _ = self.encode(audio)
        return logits_BFV, ids_BF

    @as_it_is
    def encode(self, audio: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return logits and tokens of each frame, and the two losses of the codebook by name."""
        code_BFC, ids_BF, losses = self.coded(audio)
        return widened(self.out(code_BFC)), ids_BF, losses

    @as_it_is
    def coded(self, audio: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the code of each frame, straight through to z, float [B, F, 128]; its token; and the losses of the codebook."""
        audio_BT = audio_batch(audio)
        if audio_BT.shape[1] < SAMPLES_PER_FRAME:
            raise ValueError(
                f"audio has {audio_BT.shape[1]} samples, but must have at least {SAMPLES_PER_FRAME}, for one frame"
            )
        h_BCL = F.silu(self.first(audio_BT[:, None].to(self.dtype)))
        h_BCF = F.silu(self.second(h_BCL))
        z_BFC = unit_rows(self.project(h_BCF.transpose(1, 2)))
        ids_BF, code_BFC, losses = self.codebook.quantize(z_BFC)
        return code_BFC, ids_BF, losses
