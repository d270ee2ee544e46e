"""Ternary linear. See `arbitor.reference.ops.linear`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbitor.optimized.kernels.scale import dense_rows
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks


def linear(x: Tensor, weight: AnyWeight) -> Tensor:
    """See reference; float64 is not supported."""
    checks.last_dim("x", x, weight.shape[1], DTYPES)
    checks.same_device(weight=weight.exponents, x=x)
    return _product(x, on_device(weight), transposed=False)


def linear_input_grad(grad: Tensor, weight: AnyWeight) -> Tensor:
    """See reference; float64 is not supported."""
    checks.last_dim("grad", grad, weight.shape[0], DTYPES)
    checks.same_device(weight=weight.exponents, grad=grad)
    return _product(grad, on_device(weight), transposed=True)


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """See reference; float64 is not supported. Nothing here is ternary, so it is the library's matrix product."""
    checks.dtype_in("grad", grad, DTYPES)
    checks.same_dtype("x", x, "grad", grad)
    checks.same_device(grad=grad, x=x)
    if 0 in (grad.ndim, x.ndim) or grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but its leading dimensions must match grad, {tuple(grad.shape)}"
        )
    return wide_product(matrix_of(grad).T, matrix_of(x))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 for two matrices in float32 or bfloat16, without rounding the sums to bfloat16."""
    if a.device.type == "cuda" and a.dtype is torch.bfloat16 and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def matrix_of(x: Tensor) -> Tensor:
    """Return x as contiguous rows [M, last]; M is spelled out because an empty batch leaves nothing to infer it from."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _product(x: Tensor, weight: DeviceWeight, *, transposed: bool) -> Tensor:
    """Return x W^T, or x W, in the dtype of x: the kernel unpacks the weight, the library multiplies.

    Unpacking inside the product would spare the dense copy; what that cost when it was tried is in docs/log.md.
    """
    w_NK = dense_rows(weight, x.dtype)
    y_MN = torch.mm(matrix_of(x), w_NK if transposed else w_NK.T)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[1])
