"""RMSNorm. See `arbitor.reference.ops.norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels import norm
from arbitor.optimized.kernels.activations import vectors_of
from arbitor.optimized.layouts import AnyWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.linear import matrix_of
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_EPS

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_input_grad", "rms_norm_weight_grad"]


def _x_grad(grad: Tensor, *, x: Tensor, weight: AnyWeight, eps: float) -> Tensor:
    """Return the gradient of `rms_norm` with respect to x."""
    return rms_norm_input_grad(grad, x, weight, eps=eps)


@op(x=_x_grad)
def rms_norm(x: Tensor, weight: AnyWeight, *, eps: float = DEFAULT_EPS) -> Tensor:
    """See reference; float64 is not supported."""
    _check(weight, eps, x)
    return norm.normalize(vectors_of(x, 1), on_device(weight), eps).reshape(x.shape)


@op()
def add_rms_norm(
    x: Tensor, y: Tensor, weight: AnyWeight, *, eps: float = DEFAULT_EPS
) -> tuple[Tensor, Tensor]:
    """See reference; float64 is not supported."""
    _check(weight, eps, x)
    checks.matching("y", y, "x", x)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = norm.normalize(vectors_of(x, 1), on_device(weight), eps, matrix_of(y), matrix_of(total))
    return total, normed.reshape(x.shape)


@op()
def rms_norm_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: AnyWeight,
    *,
    eps: float = DEFAULT_EPS,
    added: Tensor | None = None,
) -> Tensor:
    """See reference; float64 is not supported."""
    _check(weight, eps, x)
    checks.matching("grad", grad, "x", x)
    if added is not None:
        checks.matching("added", added, "x", x)
    added_MK = None if added is None else matrix_of(added)
    dx_MK = norm.normalize_input_grad(matrix_of(grad), vectors_of(x, 1), on_device(weight), eps, added_MK)
    return dx_MK.reshape(x.shape)


@op()
def rms_norm_weight_grad(grad: Tensor, x: Tensor, *, eps: float = DEFAULT_EPS) -> Tensor:
    """See reference; float64 is not supported."""
    _check(None, eps, x)
    checks.matching("grad", grad, "x", x)
    return norm.normalize_weight_grad(matrix_of(grad), matrix_of(x), eps)


def _check(weight: AnyWeight | None, eps: float, x: Tensor) -> None:
    """Refuse what does not fit."""
    checks.number("eps", eps, 0.0, 1.0, open_low=True)
    checks.dtype_in("x", x, DTYPES)
    checks.normal_number("eps", eps, torch.float32)
    if weight is not None:
        checks.one_row("weight", weight)
        checks.last_dim("x", x, weight.shape[1], DTYPES)
        checks.same_device(weight=weight.exponents, x=x)
    else:
        checks.last_dim_not_empty("x", x)
