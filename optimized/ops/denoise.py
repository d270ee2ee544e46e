"""Denoise. See `arbitor.reference.ops.denoise`."""

from __future__ import annotations

from torch import Tensor

from arbitor.optimized.kernels import denoise
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks


def denoise_step(latent: Tensor, pred: Tensor, *, alpha: float) -> Tensor:
    """See reference; float64 is not supported."""
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    checks.dtype_in("latent", latent, DTYPES)
    checks.same_dtype("pred", pred, "latent", latent)
    checks.same_shape("pred", pred, "latent", latent)
    checks.same_device(latent=latent, pred=pred)
    return denoise.denoised(latent, pred, alpha)


def denoise_step_backward(grad: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """See reference; float64 is not supported."""
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    checks.dtype_in("grad", grad, DTYPES)
    return denoise.denoised_backward(grad, alpha)
