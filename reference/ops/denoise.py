"""Denoise: one step of the video head's diffusion loop.

Legend: latents of any shape; alpha the share of signal that the step keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbitor.reference import checks


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
    dtype = torch.promote_types(latent.dtype, torch.float32)
    return ((latent.to(dtype) - (1.0 - alpha) * pred.to(dtype)) / math.sqrt(alpha)).to(latent.dtype)


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
    grad_wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    factor = -(1.0 - alpha) / math.sqrt(alpha)
    return (grad_wide / math.sqrt(alpha)).to(grad.dtype), (grad_wide * factor).to(grad.dtype)
