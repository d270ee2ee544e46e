"""Convolutions."""

from __future__ import annotations

from torch import Tensor

from arbitor.reference.checks.arguments import integer
from arbitor.reference.checks.tensors import FLOAT_DTYPES, dtype_in, same_device, same_dtype


def conv_positions(length: int, kernel_size: int, stride: int, padding: int) -> int:
    """Return the number of positions of a convolution; refuse a geometry in which no window fits."""
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    integer("stride", stride, 1, 2**31 - 1)
    integer("padding", padding, 0, 2**31 - 1)
    integer("length", length, 1, 2**63 - 1)
    if length + 2 * padding < kernel_size:
        raise ValueError(
            f"kernel_size is {kernel_size}, but the padded length is only {length + 2 * padding}"
        )
    return (length + 2 * padding - kernel_size) // stride + 1


def conv_columns(num_columns: int, kernel_size: int) -> None:
    """Refuse a weight whose columns are not a whole number of kernels."""
    if num_columns % kernel_size:
        raise ValueError(
            f"weight has {num_columns} columns, but they must be a multiple of kernel_size {kernel_size}"
        )


def conv_width(x_BCL: Tensor, kernel_size: int) -> int:
    """Return C * kernel_size, the columns of the weight of an input [B, C, L], or 0 for an input of another shape."""
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    return x_BCL.shape[1] * kernel_size if x_BCL.ndim == 3 else 0


def conv_input(x_BCL: Tensor, num_columns: int, kernel_size: int) -> None:
    """Refuse an input that is not [B, C, L], or a weight whose columns are not C * kernel_size."""
    dtype_in("x_BCL", x_BCL, FLOAT_DTYPES)
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    if x_BCL.ndim != 3 or x_BCL.shape[1] * kernel_size != num_columns:
        raise ValueError(
            f"x_BCL has shape {tuple(x_BCL.shape)}, but must be [batch, channels, length] "
            f"with channels * {kernel_size} = {num_columns}"
        )


def conv_pair(grad_BNP: Tensor, x_BCL: Tensor) -> None:
    """Refuse a gradient and an input of different dtypes, batches or devices, or without a row or a channel."""
    for name, value, what in (("grad_BNP", grad_BNP, "row"), ("x_BCL", x_BCL, "channel")):
        if value.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have at least one {what}")
    same_dtype("x_BCL", x_BCL, "grad_BNP", grad_BNP)
    if x_BCL.shape[0] != grad_BNP.shape[0]:
        raise ValueError(
            f"x_BCL has shape {tuple(x_BCL.shape)}, but must have the batch of grad_BNP, {tuple(grad_BNP.shape)}"
        )
    same_device(grad_BNP=grad_BNP, x_BCL=x_BCL)


def conv_gradient(grad_BNP: Tensor, num_rows: int | None, positions: int) -> None:
    """Refuse a gradient that is not [B, N, P] for a convolution's output."""
    dtype_in("grad_BNP", grad_BNP, FLOAT_DTYPES)
    fits = grad_BNP.ndim == 3 and grad_BNP.shape[2] == positions and num_rows in (None, grad_BNP.shape[1])
    if not fits:
        expected = f"[batch, {'rows' if num_rows is None else num_rows}, {positions}]"
        raise ValueError(f"grad_BNP has shape {tuple(grad_BNP.shape)}, but must be {expected}")
