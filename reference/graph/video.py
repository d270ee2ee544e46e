"""VideoHead. A few denoising steps draw a latent out of noise, and each step looks at the tokens of the graph.

Legend: B samples, L numbers of a latent, P tokens, D width, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.dtypes import widened
from arbitor.reference.graph.changed_rules import CHANGED_RULES, Ruled
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, as_built, plain
from arbitor.reference.graph.module import used
from arbitor.reference.graph.uncompiled import uncompiled
from arbitor.reference.graph.units import unit_rows
from arbitor.reference.ops.denoise import Halting, attended, signal_share
from arbitor.reference.promises import differentiable_once

FIRST_SIGNAL = 3 / 4
"""Share of signal in the energy of the first latent. The loop as a whole divides by its root, whatever the number of steps, and so
enlarges errors of the head by it. The measurement behind this number is in docs/spec/heads.md."""

LATENT_CHANNELS = 16
"""Channels of a latent of the autoencoder that decodes video. Its latent of a frame of 256 x 256 is [16, 1, 32, 32]."""

GAIN = 4.0
"""How many times what W_out gives a prediction is. Predictions are k_t times the noise (`noise_scales`). The root mean square of
k_t is 3.6 for three steps, and weights would take most of a short run to grow to that size. A power of two rounds nothing."""

NOISE_TENSOR = 2**32 - 1
"""Tensor id of the noise that latents start from. It is the last id, far from those of the weights."""

_BYTES = 12
"""Random bytes that are summed for one number of noise."""


def signal_shares(num_steps: int) -> tuple[float, ...]:
    """Return abar before each step and after the last: the share of signal in the energy of the latent, which ends at 1.

    Math:    abar(t) = cos^2 of an angle that falls evenly from arccos(sqrt(FIRST_SIGNAL)) to 0 over T steps
    Source:  Nichol and Dhariwal 2021, from a point where some signal is left, because at abar = 0 a step would divide by 0
    """
    most = math.acos(math.sqrt(FIRST_SIGNAL))
    return tuple(math.cos(most * (1 - step / num_steps)) ** 2 for step in range(num_steps + 1))


def cosine_alphas(num_steps: int) -> tuple[float, ...]:
    """Return alpha of each step.

    Math:    alpha_t = abar(t) / abar(t + 1), so that the product of all is FIRST_SIGNAL
    """
    abar = signal_shares(num_steps)
    return tuple(abar[step] / abar[step + 1] for step in range(num_steps))


def noise_scales(num_steps: int) -> tuple[float, ...]:
    """Return how many times the noise of a latent the prediction of each step must be.

    Math:    k_t = (sqrt(1 - abar(t)) - sqrt(alpha_t (1 - abar(t + 1)))) / (1 - alpha_t). With pred = k_t noise a step takes
             sqrt(abar(t)) x + sqrt(1 - abar(t)) noise to sqrt(abar(t + 1)) x + sqrt(1 - abar(t + 1)) noise, and the last to x
    Source:  the deterministic step of Song, Meng and Ermon 2021 (DDIM)
    """
    abar, scales = signal_shares(num_steps), []
    for step, alpha in enumerate(cosine_alphas(num_steps)):
        taken = math.sqrt(1 - abar[step]) - math.sqrt(alpha * (1 - abar[step + 1]))
        scales.append(taken / (1 - alpha))
    return tuple(scales)


def latent_shape(size: int) -> tuple[int, ...]:
    """Return the shape of a latent of `size` numbers: [16, 1, s, s] if size = 16 s^2, else [size]."""
    side = math.isqrt(size // LATENT_CHANNELS)
    return (LATENT_CHANNELS, 1, side, side) if LATENT_CHANNELS * side * side == size else (size,)


class VideoHead(Ruled):
    """Denoising steps with shared weights over one latent. `noise_errors` trains them, `forward` draws.

    Math:    u = unit(token) of each token
             step t: n = unit(W_in latent); q = W_query n + W_steps[t]; c = softmax(q . u / sqrt(D)) u over the tokens
             pred = GAIN W_out silu(n + c); latent <- (latent - (1 - alpha_t) pred) / sqrt(alpha_t)
             with a threshold: p_t = signal / (signal + noise), of latent and pred after the step, and halting by these p as in
             RecurrentMoEGraph
    Shapes:  tokens [B, P, D], latent [B, ...] of L numbers, any float dtype -> float32, shape of the latent
    Range:   2 D L + D^2 + T D weights. Norm and halting have none: REFACTOR9 counts T D beside the matrices, and its
             table of steps takes them all
    Source:  REFACTOR9 (17,040,896 weights), REFACTOR11 (the first latent requires a gradient); docs/spec/heads.md
    """

    rules = CHANGED_RULES["video_head"]

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        self.size, self.width, self.num_steps = config.video_latent, config.width, config.video_steps
        self.alphas = cosine_alphas(config.video_steps)
        self.shares, self.scales = signal_shares(config.video_steps), noise_scales(config.video_steps)
        self.latent_shape = latent_shape(config.video_latent)
        self.latent_in = TernaryLinear(context, self.size, self.width)
        self.query = TernaryLinear(context, self.width, self.width)
        self.steps = TernaryEmbedding(context, self.num_steps, self.width)
        self.latent_out = TernaryLinear(context, self.width, self.size)
        for module in (self.latent_in, self.query, self.latent_out):
            used(module, self.num_steps)

    def fitted(self, latent: Tensor, batch: int) -> Tensor:
        """Return target latents in the shape of the head's own latents, padded with zeros.

        Shapes:  float [B, L]; or [B, 16, K, h, w] with sides up to those of `latent_shape` -> float32 or better [B, *latent_shape]
        Raises:  TypeError or ValueError for another dtype, batch or shape
        """
        checks.dtype_in("latent", latent, checks.FLOAT_DTYPES)
        own = (batch, *self.latent_shape)
        if latent.shape == (batch, self.size):
            latent = latent.unflatten(1, self.latent_shape)
        fits = latent.ndim == len(own) and latent.shape[:2] == own[:2]
        if not fits or any(size > most for size, most in zip(latent.shape, own, strict=True)):
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}, but must be {(batch, self.size)}, or {own} with smaller sides at most"
            )
        beyond = [most - size for size, most in zip(latent.shape, own, strict=True)]
        return F.pad(widened(latent), [value for size in reversed(beyond) for value in (0, size)])

    def noise(self, samples: Tensor, *, draw: int | Tensor = 0) -> Tensor:
        """Return standard normal noise for each sample, float32 [B, L], the same on every device.

        Math:    (the sum of 12 bytes - 1530) / 256, of variance 1 to within 2^-16; bytes as `dither_bytes` gives them for
                 group = sample L + place, step = draw, and a tensor id of its own
        Shapes:  samples int64 [B], numbers of the samples, each below 2^32 / L; draw 0 .. 2^32 - 2, a number or int64 []
        """
        checks.dtype_in("samples", samples, (torch.int64,))
        groups_BL = samples[:, None] * self.size + torch.arange(self.size, device=samples.device)
        clock: dict[str, Any] = {"seed": self.seed, "step": draw, "tensor_id": NOISE_TENSOR}
        dither = self.ops.dither_bytes(groups_BL, group_size=_BYTES, **clock)
        sums = dither[..., :_BYTES].to(torch.int32).sum(dim=-1)
        return (sums - _BYTES * 255 // 2).to(torch.float32) / 256

    def forward(
        self,
        tokens_BPD: Tensor,
        latent: Tensor | None = None,
        *,
        draw: int | Tensor = 0,
        halt_threshold: float | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Return the latent that is left when the noise is out.

        Args:
            tokens_BPD:     tokens that the steps look at.
            latent:         latent that the loop starts from. None starts from noise, which is the same for every sample of the
                            batch, so that a sample does not depend on its place. `noise` gives a sample noise of its own.
            draw:           number of the draw, if `latent` is None. The head learns to draw from the first, 0.
            halt_threshold: halting probability at which a sample stops; with None, every sample takes all steps.
            steps:          number of steps that are taken, 1 .. T; None stands for all.
        """
        if steps is not None:
            checks.integer("steps", steps, 1, self.num_steps)
        if latent is None:
            latent = self._first(tokens_BPD, draw).unflatten(1, self.latent_shape)
        # Norm and steps scale with the latent, so that a loop over a part of it has that part of the prediction.
        flat_BL, alphas = widened(latent).flatten(1) / GAIN, self.alphas[:steps]
        read_BPD = unit_rows(tokens_BPD.to(flat_BL.dtype))
        reads_weights = plain(self.latent_in, self.query, self.latent_out) and as_built(self.steps)
        if torch.is_grad_enabled() or not reads_weights:
            out_BL = self._composed(flat_BL, read_BPD, alphas, halt_threshold)
        else:
            weights = (self.latent_in.weight, self.query.weight, self.steps.weight, self.latent_out.weight)
            out_BL = self.ops.denoise_loop(
                flat_BL, read_BPD, *weights, alphas=alphas, halt_threshold=halt_threshold
            )
        return (out_BL * GAIN).reshape(latent.shape)

    def noise_errors(self, tokens_BPD: Tensor, target_BL: Tensor) -> Tensor:
        """Return the mean squared error of the noise that the steps predict, for each sample, [B].

        The steps are judged each by itself, on the states of a perfect loop from the noise of draw 0 to the target.

        Math:    z the noise of draw 0, x the target, noise = (z - sqrt(abar(0)) x) / sqrt(1 - abar(0));
                 mean over t and the L numbers of (pred_t / k_t - noise)^2, with pred_t of the state before step t
                 (`noise_scales`)
        Shapes:  tokens [B, P, D], target float32 or better [B, L]
        """
        read_BPD = unit_rows(tokens_BPD.to(target_BL.dtype))
        first = self.shares[0]
        begin_BL = self._first(tokens_BPD, 0).to(target_BL.dtype)
        noise_BL = (begin_BL - math.sqrt(first) * target_BL) / math.sqrt(1 - first)
        rows_TD = self._rows(target_BL)
        errors = []
        for step, (share, scale) in enumerate(zip(self.shares[:-1], self.scales, strict=True)):
            state_BL = math.sqrt(share) * target_BL + math.sqrt(1 - share) * noise_BL
            found_BL = self._predicted(state_BL / GAIN, read_BPD, rows_TD[step]) * (GAIN / scale)
            errors.append((found_BL - noise_BL).square().mean(dim=1))
        return torch.stack(errors).mean(dim=0)

    def _first(self, tokens_BPD: Tensor, draw: int | Tensor) -> Tensor:
        """Return the noise of a draw for every sample of a batch, [B, L]."""
        one_L = self.noise(torch.zeros(1, dtype=torch.int64, device=tokens_BPD.device), draw=draw)
        return one_L.expand(tokens_BPD.shape[0], self.size)

    def _rows(self, like: Tensor) -> Tensor:
        """Return the rows of the steps, [T, D], in the dtype of a latent."""
        return self.steps(torch.arange(self.num_steps, device=like.device)).to(like.dtype)

    def _predicted(self, latent: Tensor, tokens: Tensor, row_D: Tensor) -> Tensor:
        """Return pred of one step of the loop over latent / GAIN under autograd, [B, L]."""
        n_BD = unit_rows(self.latent_in(latent))
        c_BD = attended(self.query(n_BD) + row_D, tokens)
        found: Tensor = self.latent_out(F.silu(n_BD + c_BD))
        return found

    def _composed(
        self, latent: Tensor, tokens: Tensor, alphas: Sequence[float], halt_threshold: float | None
    ) -> Tensor:
        """Return the result of `denoise_loop`, computed step by step under autograd, so that weights vote."""
        rows_TD = self._rows(latent)
        halting = None if halt_threshold is None else Halting(latent, halt_threshold)
        for step, alpha in enumerate(alphas):
            pred = self._predicted(latent, tokens, rows_TD[step])
            latent = uncompiled(_DenoiseStep.apply, latent, pred, self.ops, alpha)
            if halting is not None:
                latent, pred = halting.live(latent), halting.live(pred)
                is_last = step + 1 == len(alphas)
                latent = halting.add(latent, None if is_last else signal_share(latent, pred))
        return latent if halting is None else halting.mean


class _DenoiseStep(torch.autograd.Function):
    """`ops.denoise_step` with its backward pass."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, pred: Tensor, ops: Any, alpha: float) -> Tensor:
        ctx.ops, ctx.alpha = ops, alpha
        return ops.denoise_step(latent, pred, alpha=alpha)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_latent, grad_pred = ctx.ops.denoise_step_backward(grad, alpha=ctx.alpha)
        return grad_latent, grad_pred, None, None
