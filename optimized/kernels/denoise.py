"""Denoise kernels: one pass over the latents, forward and backward. Arithmetic in float32."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import runs_here

BLOCK = 1024


@triton.jit(do_not_specialize=["size"])
def _denoise_step_kernel(latent_ptr, pred_ptr, out_ptr, size, noise_share, root, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    latent = widen(tl.load(latent_ptr + index, mask=mask, other=0.0))
    pred = widen(tl.load(pred_ptr + index, mask=mask, other=0.0))
    result = tl.div_rn(latent - noise_share * pred, root)
    tl.store(out_ptr + index, narrow(result, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _denoise_step_backward_kernel(
    grad_ptr, grad_latent_ptr, grad_pred_ptr, size, factor, root, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    grad = widen(tl.load(grad_ptr + index, mask=mask, other=0.0))
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    tl.store(grad_latent_ptr + index, narrow(tl.div_rn(grad, root), dtype), mask=mask)
    tl.store(grad_pred_ptr + index, narrow(grad * factor, dtype), mask=mask)


def denoised(latent: Tensor, pred: Tensor, alpha: float) -> Tensor:
    """Launch `denoise_step` on two tensors of one shape and dtype."""
    runs_here(latent)
    out = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
    if out.numel():
        _denoise_step_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            latent.contiguous(),
            pred.contiguous(),
            out,
            out.numel(),
            1.0 - alpha,
            math.sqrt(alpha),
            BLOCK=BLOCK,
        )
    return out


def denoised_backward(grad: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Launch `denoise_step_backward`."""
    runs_here(grad)
    grad_latent = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    grad_pred = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if grad.numel():
        root = math.sqrt(alpha)
        _denoise_step_backward_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
            grad.contiguous(), grad_latent, grad_pred, grad.numel(), -(1.0 - alpha) / root, root, BLOCK=BLOCK
        )
    return grad_latent, grad_pred
