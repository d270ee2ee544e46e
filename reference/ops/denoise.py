"""Denoise: one step of the video head's diffusion loop, its backward pass, and the whole loop.

Legend: B samples, L numbers of a latent, P tokens, D width; alpha the share of signal that a step keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_EPS
from arbitor.reference.dtypes import wide_dtype, widened
from arbitor.reference.ops.linear import linear
from arbitor.reference.ops.norm import tamed, unit_rows
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["denoise_loop", "denoise_step", "denoise_step_backward"]


@op
def denoise_step(latent: Tensor, pred: Tensor, *, alpha: float) -> Tensor:
    """Return the latent with a share of the predicted noise taken out.

    Math:    latent' = (latent - (1 - alpha) * pred) / sqrt(alpha)
    Shapes:  latent and pred of one shape and dtype, float32, bfloat16 or float64; alpha in (0, 1]
    Returns: dtype and shape of latent; arithmetic in float32 or better
    Raises:  TypeError or ValueError for dtypes, shapes, devices or an alpha that is not allowed
    Laws:    alpha = 1 returns the latent; linear in both tensors together
    Source:  REFACTOR9 (VideoHead)
    """
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    checks.dtype_in("latent", latent, checks.FLOAT_DTYPES)
    checks.same_dtype("pred", pred, "latent", latent)
    checks.same_shape("pred", pred, "latent", latent)
    checks.same_device(latent=latent, pred=pred)
    dtype = wide_dtype(latent)
    return ((latent.to(dtype) - (1.0 - alpha) * pred.to(dtype)) / math.sqrt(alpha)).to(latent.dtype)


@op
def denoise_step_backward(grad: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of the loss with respect to the latent and to the predicted noise.

    Math:    d latent = dy / sqrt(alpha); d pred = -(1 - alpha) / sqrt(alpha) * dy
    Shapes:  grad float32, bfloat16 or float64, any shape; alpha in (0, 1]
    Returns: two tensors of the dtype and shape of grad
    Raises:  TypeError or ValueError for a dtype or an alpha that is not allowed
    Laws:    the adjoint of `denoise_step`
    Source:  REFACTOR9 (VideoHead)
    """
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    checks.dtype_in("grad", grad, checks.FLOAT_DTYPES)
    grad_wide = widened(grad)
    factor = -(1.0 - alpha) / math.sqrt(alpha)
    return (grad_wide / math.sqrt(alpha)).to(grad.dtype), (grad_wide * factor).to(grad.dtype)


@op
def denoise_loop(
    latent_BL: Tensor,
    tokens_BPD: Tensor,
    latent_in: TernaryWeight,
    query: TernaryWeight,
    step_rows: TernaryWeight,
    latent_out: TernaryWeight,
    *,
    alphas: Sequence[float],
    halt_threshold: float | None = None,
) -> Tensor:
    """Return the latent after all steps of the video head, or the mean of the latents of all steps, weighted by halting.

    Math:    step t: n = W_in latent / rms; q = W_query n + W_steps[t]; c = sum over tokens of softmax(q . token / sqrt(D)) token
             pred = W_out silu(n + c); latent <- denoise_step(latent, pred, alpha_t)
             halting: p_t = signal / (signal + noise), of latent and pred after step t. A sample halts at the first step at
             which its p add up to halt_threshold, or at the last step. There p is what the earlier p leave of 1. The output
             is the sum of latents times p. With halt_threshold None, the output is the last latent
    Shapes:  latent_BL and tokens_BPD of one dtype, float32, bfloat16 or float64, P >= 1; latent_in (D, L), query (D, D),
             step_rows (at least one row a step, D), latent_out (L, D); alphas in (0, 1], at least one; halt_threshold in (0, 1]
    Returns: dtype of latent_BL, [B, L]; all steps run in float32 or better, so the output is rounded once
    Raises:  TypeError or ValueError for dtypes, shapes, devices, alphas or a threshold that are not allowed
    Laws:    with one step both forms agree; a prediction of zero halts at once; samples do not see one another; but for eps,
             p stays if latent and pred are both scaled by a power of two
    Source:  docs/spec/denoise.md; REFACTOR9 (fixed steps without a break); halting after Graves 2016
    """
    weights = {"latent_in": latent_in, "query": query, "step_rows": step_rows, "latent_out": latent_out}
    checks.denoise_loop(latent_BL, tokens_BPD, weights, alphas, halt_threshold)
    dtype = wide_dtype(latent_BL)
    latent, tokens = latent_BL.to(dtype), tokens_BPD.to(dtype)
    rows_TD = dequantize(step_rows, dtype=dtype)
    halting = None if halt_threshold is None else Halting(latent, halt_threshold)
    for step, alpha in enumerate(alphas):
        n_BD = unit_rows(linear(latent, latent_in))
        c_BD = attended(linear(n_BD, query) + rows_TD[step], tokens)
        pred = linear(F.silu(n_BD + c_BD), latent_out)
        latent = denoise_step(latent, pred, alpha=alpha)
        if halting is not None:
            latent, pred = halting.live(latent), halting.live(pred)
            is_last = step + 1 == len(alphas)
            latent = halting.add(latent, None if is_last else signal_share(latent, pred))
    return (latent if halting is None else halting.mean).to(latent_BL.dtype)


class Halting:
    """The mean of the states of a loop, weighted for each sample by its halting, which autograd can follow.

    Math:    p_t is the probability of halting after step t. share_t = p_t while p_1 + .. + p_t < threshold. At the first step
             where the sum reaches the threshold, or at the last, share_t is what is left of 1. Later shares are 0.
             mean = sum_t share_t state_t
    Shapes:  states [..., L] of one shape, p [..., 1]; shares are each >= 0 and add up to 1
    Fields:  mean, in float32 or better, [..., L]; left, what is left of 1, [..., 1]
    Source:  adaptive computation time, Graves 2016
    """

    def __init__(self, state: Tensor, threshold: float) -> None:
        dtype = wide_dtype(state)
        self.threshold = threshold
        self.mean = torch.zeros_like(state, dtype=dtype)
        self.left = torch.ones_like(state[..., :1], dtype=dtype)

    def live(self, value: Tensor) -> Tensor:
        """Return values [..., L] of samples that go on, and zeros for those that have halted.

        A value that a sample computes after it has halted must not count. A share of 0 would not do: 0 times an infinity is NaN,
        and so is a gradient of 0 times the slope of an overflow.
        """
        return torch.where(self.left > 0, value, 0.0)

    def add(self, state: Tensor, p: Tensor | None) -> Tensor:
        """Count the state after a step, which `live` has masked; return the state that the next step starts from.

        `p` is None at the last step.
        """
        if p is None:
            self.mean = self.mean + self.left * state
            return state
        goes_on = 1 - self.left + p < self.threshold
        share = torch.where(goes_on, p, self.left)
        self.mean = self.mean + share * state
        self.left = torch.where(goes_on, self.left - p, 0.0)
        return self.live(state)


def attended(q_BD: Tensor, tokens_BPD: Tensor) -> Tensor:
    """Return the mean of each sample's tokens, weighted by the softmax of how well they fit its query."""
    scores_BP = (tokens_BPD @ q_BD[:, :, None]).squeeze(-1) / math.sqrt(q_BD.shape[-1])
    return (scores_BP.softmax(dim=-1)[:, None] @ tokens_BPD).squeeze(1)


def signal_share(latent_BL: Tensor, pred_BL: Tensor) -> Tensor:
    """Return signal / (signal + noise), [B, 1]: the sigmoid of the log signal-to-noise ratio that the head itself sees.

    A sample with a huge element in either is multiplied by a power of two before it is squared, as a row of `rms_norm` is.
    """
    tame, _, eps = tamed(torch.cat([latent_BL, pred_BL], dim=-1), DEFAULT_EPS)
    signal, noise = (half.square().mean(dim=-1, keepdim=True) for half in tame.chunk(2, dim=-1))
    return (signal + eps) / (signal + noise + eps)
