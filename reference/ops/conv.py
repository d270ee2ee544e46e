"""Ternary conv1d: unfold, then ternary linear.

Legend: B batch, C channels in, L length, J = kernel size, P positions out = floor((L + 2 * padding - J) / stride) + 1,
N channels out (rows of the weight), K = C * J columns: column c * J + j belongs to channel c, tap j.
"""

from __future__ import annotations

from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.ops.linear import linear, linear_input_grad, linear_weight_grad
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["conv1d", "conv1d_input_grad", "conv1d_weight_grad"]


@op
def conv1d(
    x_BCL: Tensor, weight: TernaryWeight, *, kernel_size: int, stride: int = 1, padding: int = 0
) -> Tensor:
    """Return the one-dimensional convolution (cross-correlation, as in torch) of x with the weight.

    Math:    y[b, n, p] = sum over c, j of x[b, c, p * stride + j - padding] * W[n, c * J + j], zero outside x
    Shapes:  x_BCL float32, bfloat16 or float64; weight [N, C * J]
    Returns: dtype of x, [B, N, P]
    Raises:  TypeError or ValueError for a dtype, shape, device or geometry that does not fit
    Laws:    kernel_size 1, stride 1 is `linear` over channels; linear in x
    Source:  docs/spec/conv.md; REFACTOR9 (TernaryConv1d)
    """
    columns_BPK = unfold(x_BCL, weight.shape[1], kernel_size=kernel_size, stride=stride, padding=padding)
    return linear(columns_BPK, weight).transpose(1, 2)


@op
def conv1d_input_grad(
    grad_BNP: Tensor,
    weight: TernaryWeight,
    *,
    length: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return the gradient of the loss with respect to the input of `conv1d`.

    Math:    dx[b, c, l] = sum over p, j with p * stride + j - padding = l of sum_n dy[b, n, p] * W[n, c * J + j]
    Shapes:  grad_BNP float32, bfloat16 or float64; length = L
    Returns: dtype of grad, [B, C, L]
    Raises:  TypeError or ValueError for a dtype, shape, device or geometry that does not fit
    Laws:    the adjoint of `conv1d`
    Source:  docs/spec/conv.md
    """
    positions = checks.conv_positions(length, kernel_size, stride, padding)
    checks.conv_gradient(grad_BNP, weight.shape[0], positions)
    checks.conv_columns(weight.shape[1], kernel_size)
    # Taps that meet at a place are summed before they are rounded.
    wide = wide_dtype(grad_BNP)
    taps = linear_input_grad(grad_BNP.transpose(1, 2).to(wide), weight)
    taps = taps.reshape(grad_BNP.shape[0], positions, weight.shape[1] // kernel_size, kernel_size)
    padded = taps.new_zeros(grad_BNP.shape[0], taps.shape[2], length + 2 * padding)
    for j in range(kernel_size):
        padded[:, :, j : j + (positions - 1) * stride + 1 : stride] += taps[..., j].transpose(1, 2)
    return padded[:, :, padding : padding + length].to(grad_BNP.dtype)


@op
def conv1d_weight_grad(
    grad_BNP: Tensor, x_BCL: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0
) -> Tensor:
    """Return the gradient of the loss with respect to the weight of `conv1d`.

    Math:    dW[n, c * J + j] = sum over b, p of dy[b, n, p] * x[b, c, p * stride + j - padding]
    Shapes:  grad_BNP and x_BCL of one dtype, float32, bfloat16 or float64
    Returns: float32 [N, C * J] (float64 for float64 inputs)
    Raises:  TypeError or ValueError for dtypes, shapes, devices or a geometry that do not fit
    Laws:    bilinear
    Source:  docs/spec/conv.md
    """
    checks.dtype_in("x_BCL", x_BCL, checks.FLOAT_DTYPES)
    num_columns = checks.conv_width(x_BCL, kernel_size)
    columns_BPK = unfold(x_BCL, num_columns, kernel_size=kernel_size, stride=stride, padding=padding)
    checks.conv_gradient(grad_BNP, None, columns_BPK.shape[1])
    checks.conv_pair(grad_BNP, x_BCL)
    return linear_weight_grad(grad_BNP.transpose(1, 2), columns_BPK)


def unfold(x_BCL: Tensor, num_columns: int, *, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return the windows of x as rows [B, P, C * J]; refuse a geometry in which no window fits."""
    checks.conv_input(x_BCL, num_columns, kernel_size)
    checks.conv_positions(x_BCL.shape[2], kernel_size, stride, padding)
    padded = x_BCL.new_zeros(*x_BCL.shape[:2], x_BCL.shape[2] + 2 * padding)
    padded[:, :, padding : padding + x_BCL.shape[2]] = x_BCL
    windows_BCPJ = padded.unfold(2, kernel_size, stride)
    return windows_BCPJ.permute(0, 2, 1, 3).reshape(x_BCL.shape[0], windows_BCPJ.shape[2], num_columns)
