"""Ternary conv1d. See `arbitor.reference.ops.conv`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import fold, pad

from arbitor.optimized.float32_sums import wide_product
from arbitor.optimized.layouts import AnyWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.linear import linear, linear_weight_grad
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.optimized.ops.unpacked import unpacked
from arbitor.reference import checks

__all__ = ["conv1d", "conv1d_input_grad", "conv1d_weight_grad"]


def _x_grad(grad: Tensor, *, x_BCL: Tensor, weight: AnyWeight, **geometry: Any) -> Tensor:
    """Return the gradient of `conv1d` with respect to x."""
    return conv1d_input_grad(grad, weight, length=x_BCL.shape[2], **geometry)


@op(x_BCL=_x_grad)
def conv1d(
    x_BCL: Tensor, weight: AnyWeight, *, kernel_size: int, stride: int = 1, padding: int = 0
) -> Tensor:
    """See reference; float64 is not supported."""
    return linear(_windows(x_BCL, weight.shape[1], kernel_size, stride, padding), weight).transpose(1, 2)


@op()
def conv1d_input_grad(
    grad_BNP: Tensor, weight: AnyWeight, *, length: int, kernel_size: int, stride: int = 1, padding: int = 0
) -> Tensor:
    """See reference; float64 is not supported."""
    positions = checks.conv_positions(length, kernel_size, stride, padding)
    checks.dtype_in("grad_BNP", grad_BNP, DTYPES)
    checks.conv_gradient(grad_BNP, weight.shape[0], positions)
    checks.conv_columns(weight.shape[1], kernel_size)
    checks.same_device(weight=weight.exponents, grad_BNP=grad_BNP)
    # Overlapping taps are summed in float32, because a sum of rounded taps would round at every one of them.
    grad_MN = grad_BNP.transpose(1, 2).reshape(-1, weight.shape[0])
    taps_MK = wide_product(grad_MN, unpacked(on_device(weight), grad_BNP.dtype))
    taps_BKP = taps_MK.reshape(grad_BNP.shape[0], positions, weight.shape[1]).transpose(1, 2)
    image = fold(taps_BKP, (1, length), (1, kernel_size), padding=(0, padding), stride=(1, stride))
    return image[:, :, 0].to(grad_BNP.dtype)


@op()
def conv1d_weight_grad(
    grad_BNP: Tensor, x_BCL: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0
) -> Tensor:
    """See reference; float64 is not supported."""
    checks.dtype_in("x_BCL", x_BCL, DTYPES)
    num_columns = checks.conv_width(x_BCL, kernel_size)
    windows_BPK = _windows(x_BCL, num_columns, kernel_size, stride, padding)
    checks.conv_gradient(grad_BNP, None, windows_BPK.shape[1])
    checks.conv_pair(grad_BNP, x_BCL)
    return linear_weight_grad(grad_BNP.transpose(1, 2), windows_BPK)


def _windows(x_BCL: Tensor, num_columns: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return the windows of x as rows [B, P, C * kernel_size]."""
    checks.conv_input(x_BCL, num_columns, kernel_size)
    positions = checks.conv_positions(x_BCL.shape[2], kernel_size, stride, padding)
    windows_BCPJ = pad(x_BCL, (padding, padding)).unfold(2, kernel_size, stride)
    return windows_BCPJ.transpose(1, 2).reshape(x_BCL.shape[0], positions, num_columns)
