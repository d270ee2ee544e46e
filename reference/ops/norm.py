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
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_input_grad", "rms_norm_weight_grad"]

HUGE_ELEMENT = {torch.float32: 48, torch.float64: 480}
"""Exponent of the magnitude from which on an element is huge. A row with a huge element is multiplied by a power of two before it
is squared.

The squares of 2**31 smaller elements add up to less than 2**128 (2**1024 in float64), so no other row overflows.
"""

TAMING_EXPONENT = {torch.float32: -80, torch.float64: -720}
"""Exponent of the power of two for a row with a huge element. It takes elements up to 2**128 (2**1024 in float64) below 2**48
(2**304)."""


@op
def rms_norm(x: Tensor, weight: TernaryWeight, *, eps: float = DEFAULT_EPS) -> Tensor:
    """Return x scaled to root mean square 1 along its last dimension, times the weight.

    Math:    y = x / sqrt(mean(x**2) + eps) * W[0]
             A row with an element of 2**48 or more (2**480 in float64) is multiplied by a power of two before it is squared,
             and eps by the square of that power, so that nothing overflows
    Shapes:  x float32, bfloat16 or float64 [..., K]; weight (1, K)
    Range:   eps from the smallest normal number of the arithmetic, 2**-126 (2**-1022 in float64), to 1
    Returns: dtype and shape of x
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    scaling x by a power of two changes nothing but the influence of eps; zeros stay zeros
    Source:  docs/spec/norm.md
    """
    dtype = _check(weight, eps, x)
    return (unit_rows(x.to(dtype), eps) * dequantize(weight, dtype=dtype)[0]).to(x.dtype)


@op
def add_rms_norm(
    x: Tensor, y: Tensor, weight: TernaryWeight, *, eps: float = DEFAULT_EPS
) -> tuple[Tensor, Tensor]:
    """Return the sum of a residual stream and a branch, and `rms_norm` of that sum.

    Math:    t = x + y; n = rms_norm(t)
    Shapes:  x and y of one dtype, float32, bfloat16 or float64 [..., K]; weight (1, K)
    Range:   eps as in `rms_norm`
    Returns: two tensors of the dtype and shape of x
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    t is rounded to the dtype of x before it is normed: n is rms_norm of the t that is returned
    Source:  docs/spec/norm.md
    """
    _check(weight, eps, x)
    checks.matching("y", y, "x", x)
    total = x + y
    return total, rms_norm(total, weight, eps=eps)


@op
def rms_norm_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: TernaryWeight,
    *,
    eps: float = DEFAULT_EPS,
    added: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the loss with respect to the input of `rms_norm`, plus another gradient of that input if one is given.

    Math:    dx = s - x^ * mean(x^ * s) with s = dy * w / rms; with `added`, the gradient that x has as a residual, added + dx
    Shapes:  grad, x and added of one dtype, [..., K]; weight (1, K)
    Returns: dtype and shape of x; a sum is rounded once
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    <dx, x> = eps * <dy * w, x> / rms**3: orthogonal to x, but for eps
    Source:  docs/spec/norm.md
    """
    dtype = _check(weight, eps, x)
    checks.matching("grad", grad, "x", x)
    if added is not None:
        checks.matching("added", added, "x", x)
    tame, power, tame_eps = tamed(x.to(dtype), eps)
    rms = _rms(tame, tame_eps)
    unit = x.to(dtype) / rms * power
    # Divided first: beside a row near 0, unit times the mean may be too small for the dtype where its quotient is not.
    scaled = grad.to(dtype) * dequantize(weight, dtype=dtype)[0] / rms
    # The rms of the tame row is the power times the rms of x, so the power cancels.
    dx = (scaled - unit * (unit * scaled).mean(dim=-1, keepdim=True)) * power
    return (dx if added is None else added.to(dtype) + dx).to(x.dtype)


@op
def rms_norm_weight_grad(grad: Tensor, x: Tensor, *, eps: float = DEFAULT_EPS) -> Tensor:
    """Return the gradient of the loss with respect to the weight of `rms_norm`.

    Math:    dw = sum over rows of dy * x^
    Shapes:  grad and x of one dtype, [..., K]
    Returns: float32 [1, K] (float64 for float64 inputs)
    Raises:  TypeError or ValueError for a dtype, shape, device or eps that is not allowed
    Laws:    linear in grad; unchanged when x is scaled by a power of two, but for eps
    Source:  docs/spec/norm.md
    """
    dtype = _check(None, eps, x)
    checks.matching("grad", grad, "x", x)
    products = grad.to(dtype) * unit_rows(x.to(dtype), eps)
    return products.reshape(-1, x.shape[-1]).sum(dim=0, keepdim=True)


def unit_rows(x_wide: Tensor, eps: float = DEFAULT_EPS) -> Tensor:
    """Return x^, rows of root mean square 1: RMSNorm without a weight, in the dtype of x, float32 or float64."""
    tame, power, tame_eps = tamed(x_wide, eps)
    # The row itself is divided. Small elements of a huge row lose bits where the row is tamed.
    return x_wide / _rms(tame, tame_eps) * power


def tamed(x_wide: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows whose squares do not overflow, the power of two by which each was multiplied, and eps times the power squared.

    The power is 1 for a row without a huge element (HUGE_ELEMENT), so that row keeps every bit.
    """
    least, exponent = HUGE_ELEMENT[x_wide.dtype], TAMING_EXPONENT[x_wide.dtype]
    huge = x_wide.detach().abs().amax(dim=-1, keepdim=True) >= 2.0**least
    one = torch.ones_like(huge, dtype=x_wide.dtype)
    power = torch.where(huge, one * 2.0**exponent, one)
    return x_wide * power, power, power * eps * power


def _rms(x_wide: Tensor, eps: Tensor) -> Tensor:
    """Return the root mean square of the last dimension, with that dimension kept; no square may overflow."""
    return (x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _check(weight: TernaryWeight | None, eps: float, x: Tensor) -> torch.dtype:
    """Return the dtype to compute in; refuse arguments that do not fit each other."""
    checks.number("eps", eps, 0.0, 1.0, open_low=True)
    checks.dtype_in("x", x, checks.FLOAT_DTYPES)
    checks.normal_number("eps", eps, wide_dtype(x))
    if weight is not None:
        checks.one_row("weight", weight)
        checks.last_dim("x", x, weight.shape[1])
        checks.same_device(weight=weight.packed, x=x)
    else:
        checks.last_dim_not_empty("x", x)
    return wide_dtype(x)
