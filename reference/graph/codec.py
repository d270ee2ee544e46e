"""AudioCodec: the audio encoder, the matrix that trains it, and a table of sounds. Sound becomes tokens, tokens become sound.

Legend: B batch, T samples, F = T / 160 frames, W = 320 samples of a window, S = 161 bins of a spectrum, V = 289 codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph.audio import AUDIO_CODES, CODE_WIDTH, SAMPLES_PER_FRAME, AudioVQEncoder
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.graph.stateful import Stateful
from arbitor.reference.graph.tables import TableModule

WINDOW = 2 * SAMPLES_PER_FRAME
"""W: samples of the window whose spectrum a frame is. Windows overlap by half, and the middles of frame and window agree."""

BINS = WINDOW // 2 + 1
"""S: bins of a spectrum, 50 Hz apart at 16 kHz."""

FLOOR = 0.05
"""What is added to a magnitude before its logarithm, so that silence is finite and faint noise counts little."""

PHASE_ROUNDS = 32
"""Rounds in which phases are found that the overlapping windows agree on."""

SPECTRUM_UNIT = 1024
"""Steps of the table's integers in a unit of a spectrum. Spectra of samples in [-1, 1] lie between -1 and 4."""

COMMITMENT = 0.25
"""Weight of the commitment, as in the model's loss."""


def spectra(audio_BT: Tensor) -> Tensor:
    """Return the logarithmic spectrum of each frame.

    Math:    X = FFT(hann * window), windows of 320 samples whose middles are those of the frames, silence beyond the ends;
             spectrum = (log(|X| + 0.05) + 1) / 2, which is of order 1 for speech
    Shapes:  float [B, T], T = 160 F -> float32 [B, F, 161]
    """
    return (torch.log(_transformed(audio_BT.float()).abs() + FLOOR) + 1) / 2


def sound_of(spectra_BFS: Tensor) -> Tensor:
    """Return sounds whose spectra are near those that are given.

    A spectrum has no phases. They begin as those of steady tones in the middles of the bins. In each of 32 rounds the windows are
    added up, and the phases become those of the sum (Griffin and Lim 1984). Nothing is drawn.

    Shapes:  float32 [B, F, 161] -> float32 [B, 160 F] in [-1, 1]
    """
    loud_BFS = ((2 * spectra_BFS.float() - 1).exp() - FLOOR).clamp(min=0)
    turns_FS = torch.arange(loud_BFS.shape[1])[:, None] * torch.arange(BINS) * math.pi
    phases = torch.polar(torch.ones_like(turns_FS), turns_FS).to(loud_BFS.device)
    audio_BT = _added_up(loud_BFS * phases)
    for _ in range(PHASE_ROUNDS):
        found = _transformed(audio_BT)
        audio_BT = _added_up(loud_BFS * found / found.abs().clamp(min=1e-9))
    return audio_BT.clamp(-1, 1)


def _transformed(audio_BT: Tensor) -> Tensor:
    """Return the complex spectrum of each window, [B, F, S]."""
    beside = SAMPLES_PER_FRAME // 2
    windows_BFW = F.pad(audio_BT, (beside, beside)).unfold(1, WINDOW, SAMPLES_PER_FRAME)
    return torch.fft.rfft(windows_BFW * _hann(audio_BT))


def _added_up(transformed_BFS: Tensor) -> Tensor:
    """Return the sound whose windows are nearest to some spectra in the sense of least squares, [B, T]."""
    windows_BFW = torch.fft.irfft(transformed_BFS, WINDOW)
    hann_W, frames = _hann(windows_BFW), windows_BFW.shape[1]
    length, beside = (frames + 1) * SAMPLES_PER_FRAME, SAMPLES_PER_FRAME // 2
    shape = {"output_size": (1, length), "kernel_size": (1, WINDOW), "stride": (1, SAMPLES_PER_FRAME)}
    parts = torch.stack([hann_W * windows_BFW, hann_W.square().expand_as(windows_BFW)])
    total, weight = F.fold(parts.flatten(0, 1).transpose(1, 2), **shape).reshape(2, -1, length)
    # Only a first and a last sample have windows of no weight.
    return (total / weight.clamp(min=1e-3))[:, beside : length - beside]


def _hann(like: Tensor) -> Tensor:
    return torch.hann_window(WINDOW, device=like.device)


class TokenSpectra(TableModule):
    """The spectrum that each token stands for when it is spoken, int16 [V, S] in steps of 1 / 1024."""

    spectra: Tensor

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        limits = torch.iinfo(torch.int16)
        self.add_table(
            "spectra",
            torch.zeros(AUDIO_CODES, BINS, dtype=torch.int16, device=context.device),
            limits.min,
            limits.max,
        )


class AudioCodec(Stateful):
    """An `AudioVQEncoder`, a matrix that reads the spectrum of a frame off its code, and a table of what tokens sound like.

    The matrix trains the encoder (`losses`). Then `tabulate` sets the spectrum of each token to the mean of the frames that have
    the token, which is nearer to them than what a ternary matrix of a code can be. The encoder's tokens are what a talker head
    learns to say, and `speak` makes sound of tokens.

    Args:
        config: rules of the votes, as of the model that has the talker head.
        ops:    op set that computes.
        device: device of the weights.
        seed:   64-bit seed of the starting weights and of the dither.

    Math:    trained: spectrum = W_decode code; spoken: spectrum = table(token), and `sound_of` finds the phases
    Range:   404,864 weights of the encoder, 161 * 128 of the decoder, and 289 * 161 integers of the table
    Source:  docs/spec/heads.md
    """

    def __init__(
        self,
        config: ArbConfig,
        *,
        ops: ModuleType = reference_ops,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        context = GraphContext(ops, config, device=device, dtype=torch.float32, seed=seed)
        super().__init__(context)
        self.encoder = AudioVQEncoder(context)
        self.decoder = TernaryLinear(context, CODE_WIDTH, BINS, orthogonal=False)
        self.spoken = TokenSpectra(context)

    def tokens(self, audio: Tensor) -> Tensor:
        """Return the token of each frame, int64 [B, F]; `AudioVQEncoder` says which audio is allowed."""
        with torch.no_grad():
            return self.encoder.coded(audio)[1]

    def tabulate(self, clips: Iterable[Tensor]) -> None:
        """Set the spectrum of each token to the mean of the frames of some sounds that have the token.

        A token without a frame gets what the decoder makes of its code.

        Args:
            clips: sounds float [B, T] with T = 160 F, batch by batch.

        Raises TypeError or ValueError as `losses`.
        """
        device = self.spoken.spectra.device
        sums_VS = torch.zeros(AUDIO_CODES, BINS, dtype=torch.float64, device=device)
        counts_V = torch.zeros(AUDIO_CODES, dtype=torch.int64, device=device)
        for audio_BT in clips:
            _check_frames(audio_BT)
            ids_R = self.tokens(audio_BT).flatten()
            sums_VS.index_add_(0, ids_R, spectra(audio_BT).flatten(0, 1).double())
            counts_V += torch.bincount(ids_R, minlength=AUDIO_CODES)
        with torch.no_grad():
            decoded_VS = self.decoder(
                self.encoder.codebook(torch.arange(AUDIO_CODES, device=device))
            ).double()
        mean_VS = torch.where(counts_V[:, None] > 0, sums_VS / counts_V.clamp(min=1)[:, None], decoded_VS)
        limits = torch.iinfo(torch.int16)
        steps_VS = (mean_VS * SPECTRUM_UNIT).round().clamp(limits.min, limits.max)
        self.spoken.spectra.copy_(steps_VS.to(torch.int16))

    def spectra_of(self, tokens_BF: Tensor) -> Tensor:
        """Return the spectra that stand for tokens, float32 [B, F, 161], of the table.

        Raises TypeError or ValueError for tokens that are no int64 [B, F] in 0 .. 288.
        """
        checks.dtype_in("tokens_BF", tokens_BF, (torch.int64,))
        if tokens_BF.ndim != 2 or tokens_BF.shape[1] == 0:
            raise ValueError(
                f"tokens_BF has shape {tuple(tokens_BF.shape)}, but must be [batch, frames] with at least one frame"
            )
        checks.values_between("tokens_BF", tokens_BF, 0, AUDIO_CODES - 1)
        return self.spoken.spectra[tokens_BF].float() / SPECTRUM_UNIT

    def speak(self, tokens_BF: Tensor) -> Tensor:
        """Return the sound of tokens, float32 [B, 160 F] at 16 kHz in [-1, 1].

        Raises TypeError or ValueError as `spectra_of`.
        """
        return sound_of(self.spectra_of(tokens_BF))

    def losses(self, audio_BT: Tensor) -> dict[str, Tensor]:
        """Return the components of the loss by name, float32 [].

        `spectrum` is the mean squared error of the spectra, and reaches every weight of the encoder but `out`, straight through
        the choice of a code. `next` is the mean cross-entropy, in nats, of each frame's logits as a guess at the next frame's
        token. It moves `out` alone: an encoder that makes its own tokens easy to guess makes worse ones. `codebook` and
        `commitment` are those of `TernaryVQCodebook.quantize`.

        Raises TypeError or ValueError for audio that is no float [B, T] with T = 160 F and F >= 2.
        """
        _check_frames(audio_BT)
        code_BFC, ids_BF, of_codes = self.encoder.coded(audio_BT)
        error = self.decoder(code_BFC) - spectra(audio_BT)
        logits_BFV = self.encoder.out(code_BFC.detach())
        guessed = F.cross_entropy(logits_BFV[:, :-1].flatten(0, 1), ids_BF[:, 1:].flatten())
        return {"spectrum": error.square().mean(), "next": guessed, **of_codes}

    def learn(self, audio_BT: Tensor, *, rate: float, step: int) -> dict[str, float]:
        """Take one training step, and return the components of the loss before it.

        Args:
            audio_BT: as for `losses`.
            rate:     schedule rate times gain, 0 .. 127.
            step:     number of the step, a coordinate of the dither.

        Raises TypeError or ValueError as `losses`.
        """
        losses = self.losses(audio_BT)
        weights = {"commitment": COMMITMENT}
        total = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
        self.backward(total, rate=rate, step=step, undo=False)
        self.step()
        return {name: value.item() for name, value in losses.items()}


def _check_frames(audio_BT: Tensor) -> None:
    """Refuse audio that is no float [B, T] of at least two whole frames."""
    checks.dtype_in("audio_BT", audio_BT, checks.FLOAT_DTYPES)
    if audio_BT.ndim != 2 or audio_BT.shape[1] % SAMPLES_PER_FRAME or audio_BT.shape[1] < WINDOW:
        raise ValueError(
            f"audio_BT has shape {tuple(audio_BT.shape)}, but must be [batch, samples] with a multiple of "
            f"{SAMPLES_PER_FRAME} samples, at least {WINDOW}"
        )
