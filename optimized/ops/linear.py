"""Ternary linear. See `arbitor.reference.ops.linear`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.cuda import compiler, many_rows
from arbitor.optimized.cuda import product as cuda_product
from arbitor.optimized.kernels.float_rows import float_rows_product
from arbitor.optimized.kernels.products import packed_product
from arbitor.optimized.kernels.scale import dense_rows
from arbitor.optimized.layouts import MAX_COLUMNS, AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.paths import takes_cuda
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = ["linear", "linear_input_grad", "linear_weight_grad"]

FEW_FLOAT_ROWS = 4
"""Most rows of float32 for which a product that unpacks the weight on its way is faster than unpacking first."""

FEW_ROWS = 64
"""Most rows for which a product that unpacks the weight on its way is faster than unpacking first."""

DENSE_ELEMENTS = 2**27
"""Most elements of a weight that are unpacked at a time: 256 MiB of bfloat16."""

ROW_MULTIPLE = 16
"""Number that divides the rows of a part, so that no part starts at an address for which a kernel would compile anew."""


def _x_grad(grad: Tensor, *, weight: AnyWeight, **_: Any) -> Tensor:
    """Return the gradient of `linear` with respect to x."""
    return linear_input_grad(grad, weight)


@op(x=_x_grad)
def linear(x: Tensor, weight: AnyWeight) -> Tensor:
    """See reference; float64 is not supported."""
    checks.last_dim("x", x, weight.shape[1], DTYPES)
    checks.same_device(weight=weight.exponents, x=x)
    return _product(x, on_device(weight), transposed=False)


@op()
def linear_input_grad(grad: Tensor, weight: AnyWeight) -> Tensor:
    """See reference; float64 is not supported."""
    checks.last_dim("grad", grad, weight.shape[0], DTYPES)
    checks.same_device(weight=weight.exponents, grad=grad)
    return _product(grad, on_device(weight), transposed=True)


@op()
def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """See reference; float64 is not supported. Nothing here is ternary, so the library multiplies."""
    checks.dtype_in("grad", grad, DTYPES)
    checks.same_dtype("x", x, "grad", grad)
    checks.same_device(grad=grad, x=x)
    checks.some_dimension("grad", grad)
    checks.leading_dims("x", x, grad.shape[:-1], "grad", grad)
    return wide_product(matrix_of(grad).T, matrix_of(x))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 for two matrices in float32 or bfloat16, without rounding the sums to bfloat16."""
    if a.device.type == "cuda" and a.dtype is torch.bfloat16 and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def multiplies_float_rows(x_MK: Tensor) -> bool:
    """Return whether `float_rows_product` takes rows."""
    return x_MK.dtype is torch.float32 and 0 < x_MK.shape[0] <= FEW_FLOAT_ROWS


def matrix_of(x: Tensor) -> Tensor:
    """Return x as contiguous rows [M, last]. M is computed here, because torch cannot infer it for an empty batch."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _product(x: Tensor, weight: DeviceWeight, *, transposed: bool) -> Tensor:
    """Return x W^T, or x W, in the dtype of x.

    For few rows a kernel unpacks the weight on its way. The library is faster for many rows, and for float32 where the weight is
    transposed. It takes a large weight by ranges of unpacked rows. Forward, a range gives some of the outputs. Backward, a range
    gives a part of every sum. The parts are added in float32 and rounded once, as the sums of one product are.
    """
    x_MK = matrix_of(x)
    num_outputs = weight.shape[1 if transposed else 0]
    if not transposed and takes_cuda(many_rows.fits(x_MK, weight), x.device, only=compiler.HOPPER):
        y_MN = many_rows.many_rows_product(x_MK, weight, many_rows.form_of(x_MK.shape[0], num_outputs))
        return y_MN.reshape(*x.shape[:-1], num_outputs)
    if not transposed and takes_cuda(cuda_product.fits(x_MK, weight), x.device):
        return cuda_product.few_rows_product(x_MK, weight).reshape(*x.shape[:-1], num_outputs)
    if not transposed and multiplies_float_rows(x_MK):
        return float_rows_product(x_MK, weight).reshape(*x.shape[:-1], num_outputs)
    # A product counts the rows of a weight in 32 bits, as it counts the columns. The columns never exceed MAX_COLUMNS.
    if x.dtype is torch.bfloat16 and 0 < x_MK.shape[0] <= FEW_ROWS and weight.shape[0] <= MAX_COLUMNS:
        y_MN = packed_product(x_MK, weight, transposed=transposed)
        return y_MN.reshape(*x.shape[:-1], num_outputs)
    parts = row_ranges(*weight.shape)
    if len(parts) == 1:
        w_NK = dense_rows(weight, x.dtype)
        return torch.mm(x_MK, w_NK if transposed else w_NK.T).reshape(*x.shape[:-1], num_outputs)
    wide = torch.float32 if transposed else x.dtype
    y_MN = torch.empty(x_MK.shape[0], num_outputs, dtype=wide, device=x.device)
    for rows in parts:
        w_NK = dense_rows(rows_of(weight, rows), x.dtype)
        part = slice(rows.start, rows.stop)
        if not transposed:
            y_MN[:, part] = torch.mm(x_MK, w_NK.T)
        elif rows.start == 0:
            y_MN.copy_(wide_product(x_MK[:, part], w_NK))
        else:
            y_MN += wide_product(x_MK[:, part], w_NK)
        # The memory is free before the next rows are unpacked.
        del w_NK
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], num_outputs)


def row_ranges(num_rows: int, num_columns: int) -> list[range]:
    """Return ranges of rows that unpack at most DENSE_ELEMENTS each, in multiples of ROW_MULTIPLE."""
    step = max(DENSE_ELEMENTS // num_columns // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    return [range(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def rows_of(weight: DeviceWeight, rows: range) -> DeviceWeight:
    """Return some rows of a weight, on its own memory."""
    part: dict[str, Any] = {n: tensor[rows.start : rows.stop] for n, tensor in weight.tensors().items()}
    return replace(weight, **part, shape=(len(rows), weight.shape[1]))
