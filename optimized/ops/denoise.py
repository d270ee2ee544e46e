"""Denoise. See `arbitor.reference.ops.denoise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.cuda import denoise as cuda_denoise
from arbitor.optimized.kernels import denoise
from arbitor.optimized.kernels.float_rows import float_rows_product
from arbitor.optimized.kernels.scale import dense_rows
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.linear import multiplies_float_rows
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.paths import takes_cuda
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = ["denoise_loop", "denoise_step", "denoise_step_backward"]


def _latent_grad(grad: Tensor, *, alpha: float, **_: Any) -> Tensor:
    """Return the gradient of `denoise_step` with respect to the latent."""
    return denoise_step_backward(grad, alpha=alpha)[0]


def _pred_grad(grad: Tensor, *, alpha: float, **_: Any) -> Tensor:
    """Return the gradient of `denoise_step` with respect to the predicted noise."""
    return denoise_step_backward(grad, alpha=alpha)[1]


@op(latent=_latent_grad, pred=_pred_grad)
def denoise_step(latent: Tensor, pred: Tensor, *, alpha: float) -> Tensor:
    """See reference; float64 is not supported."""
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    checks.dtype_in("latent", latent, DTYPES)
    checks.same_dtype("pred", pred, "latent", latent)
    checks.same_shape("pred", pred, "latent", latent)
    checks.same_device(latent=latent, pred=pred)
    return denoise.denoised(latent, pred, alpha)


@op()
def denoise_step_backward(grad: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """See reference; float64 is not supported."""
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    checks.dtype_in("grad", grad, DTYPES)
    return denoise.denoised_backward(grad, alpha)


@op()
def denoise_loop(
    latent_BL: Tensor,
    tokens_BPD: Tensor,
    latent_in: AnyWeight,
    query: AnyWeight,
    step_rows: AnyWeight,
    latent_out: AnyWeight,
    *,
    alphas: Sequence[float],
    halt_threshold: float | None = None,
) -> Tensor:
    """See reference; float64 is not supported.

    One launch takes all steps of a few samples. Otherwise few samples read each weight in its two bits at each step, and for many
    samples weights are unpacked once, not once a step.
    """
    weights = {"latent_in": latent_in, "query": query, "step_rows": step_rows, "latent_out": latent_out}
    checks.denoise_loop(latent_BL, tokens_BPD, weights, alphas, halt_threshold, DTYPES)
    if latent_BL.shape[0] == 0:
        return latent_BL.clone()
    latent_BL, tokens_BPD = latent_BL.contiguous(), tokens_BPD.contiguous()
    rows = [on_device(weight) for weight in weights.values()]
    if takes_cuda(cuda_denoise.fits(latent_BL, tokens_BPD, rows, len(alphas)), latent_BL.device):
        return cuda_denoise.denoise_loop(latent_BL, tokens_BPD, rows, alphas, halt_threshold)
    latent, (w_in, w_query, w_steps, w_out) = latent_BL.to(torch.float32), rows
    multiply_in, multiply_query, multiply_out = (
        _product_with(weight, latent) for weight in (w_in, w_query, w_out)
    )
    rows_TD = dense_rows(w_steps, torch.float32)
    loop = denoise.DenoiseLoop(latent, tokens_BPD, rows_TD)
    for step, alpha in enumerate(alphas):
        n_BD = loop.unit_rows(multiply_in(latent))
        m_BD = loop.mixed(n_BD, multiply_query(n_BD), step)
        latent = loop.step(latent, multiply_out(m_BD), alpha, halts=halt_threshold is not None)
        if halt_threshold is not None:
            total = loop.halt(latent, halt_threshold, first=step == 0, last=step + 1 == len(alphas))
    return (latent if halt_threshold is None else total).to(latent_BL.dtype)


def _product_with(weight: DeviceWeight, latent_BL: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product x W^T of a loop over as many samples as a latent has, all in float32."""
    if multiplies_float_rows(latent_BL):
        return lambda x: float_rows_product(x, weight)
    w_NK = dense_rows(weight, torch.float32)
    return lambda x: torch.mm(x, w_NK.T)
