"""RMSNorm: y = x / rms(x) * w per channel, w a ternary weight of one row, initialised to 1 and frozen by default.

Legend: K channels, x^ = x / rms(x). Arithmetic runs in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_EPS
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight

__all__ = ["rms_norm", "rms_norm_input_grad", "rms_norm_weight_grad"]


def rms_norm(x: Tensor, weight: TernaryWeight, *, eps: float = DEFAULT_EPS) -> Tensor:
    """Return x scaled to root mean square 1 along its last dimension, times the weight.

    Math:    y = x / sqrt(mean(x**2) + eps) * W[0]
    Shapes:  x float32, bfloat16 or float64 [..., K]; weight (1, K); eps in (0, 1]
    Returns: dtype and shape of x
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    scaling x by a power of two changes nothing but the influence of eps; zeros stay zeros
    Source:  docs/spec/norm.md
    """
    dtype = _check(weight, eps, x=x)
    x_wide = x.to(dtype)
    return (x_wide / _rms(x_wide, eps) * dequantize(weight, dtype=dtype)[0]).to(x.dtype)


def rms_norm_input_grad(
    grad: Tensor, x: Tensor, weight: TernaryWeight, *, eps: float = DEFAULT_EPS
) -> Tensor:
    """Return the gradient of the loss with respect to the input of `rms_norm`.

    Math:    dx = (dy * w - x^ * mean(x^ * dy * w)) / rms
    Shapes:  grad and x of one dtype, [..., K]; weight (1, K)
    Returns: dtype and shape of x
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    <dx, x> = eps * <dy * w, x> / rms**3: orthogonal to x, but for eps
    Source:  docs/spec/norm.md
    """
    dtype = _check(weight, eps, x=x, grad=grad)
    x_wide, grad_wide = x.to(dtype), grad.to(dtype)
    rms = _rms(x_wide, eps)
    unit = x_wide / rms
    scaled = grad_wide * dequantize(weight, dtype=dtype)[0]
    return ((scaled - unit * (unit * scaled).mean(dim=-1, keepdim=True)) / rms).to(x.dtype)


def rms_norm_weight_grad(grad: Tensor, x: Tensor, *, eps: float = DEFAULT_EPS) -> Tensor:
    """Return the gradient of the loss with respect to the weight of `rms_norm`.

    Math:    dw = sum over rows of dy * x^
    Shapes:  grad and x of one dtype, [..., K]
    Returns: float32 [1, K] (float64 for float64 inputs)
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    linear in grad; unchanged when x is scaled by a power of two, but for eps
    Source:  docs/spec/norm.md
    """
    dtype = _check(None, eps, x=x, grad=grad)
    x_wide = x.to(dtype)
    return (grad.to(dtype) * x_wide / _rms(x_wide, eps)).reshape(-1, x.shape[-1]).sum(dim=0, keepdim=True)


def _rms(x_wide: Tensor, eps: float) -> Tensor:
    """Return the root mean square of the last dimension, kept."""
    return (x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _check(weight: TernaryWeight | None, eps: float, *, x: Tensor, grad: Tensor | None = None) -> torch.dtype:
    """Refuse what does not fit; return the dtype to compute in."""
    checks.number("eps", eps, 0.0, 1.0, open_low=True)
    checks.dtype_in("x", x, checks.FLOAT_DTYPES)
    if weight is not None:
        checks.one_row("weight", weight)
        checks.last_dim("x", x, weight.shape[1])
        checks.same_device(weight=weight.packed, x=x)
    else:
        checks.last_dim_not_empty("x", x)
    if grad is not None:
        checks.same_dtype("grad", grad, "x", x)
        checks.same_shape("grad", grad, "x", x)
        checks.same_device(x=x, grad=grad)
    return wide_dtype(x)
