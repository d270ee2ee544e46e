"""Ternary linear. See `arbitor.reference.ops.linear`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.cuda import compiler, many_rows
from arbitor.optimized.cuda import product as cuda_product
from arbitor.optimized.float32_sums import rounded_product, wide_product
from arbitor.optimized.kernels.float_rows import float_rows_product
from arbitor.optimized.kernels.product_sum import copies_in_bulk, has_descriptors, product_sum
from arbitor.optimized.kernels.products import packed_product
from arbitor.optimized.kernels.scale import dense_rows
from arbitor.optimized.layouts import MAX_COLUMNS, AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.paths import takes_cuda
from arbitor.optimized.ops.scale import DTYPES
from arbitor.optimized.ops.unpacked import OUTPUT_MULTIPLE, unpacked
from arbitor.reference import checks

__all__ = ["linear", "linear_input_grad", "linear_weight_grad"]

FEW_FLOAT_ROWS = 4
"""Most rows of float32 for which a product that unpacks the weight on its way is faster than unpacking first."""

FEW_ROWS = 64
"""Most rows for which a product that unpacks the weight on its way is faster than unpacking first."""

DENSE_ELEMENTS = 2**27
"""Most elements of a weight that are unpacked at a time: 256 MiB of bfloat16."""

MOST_KERNEL_SIDE = 4096
"""Most outputs or inputs of a weight whose product one kernel adds. Above, the library's product in float32 and a sum do.

At 4,096 x 4,096 an H200 took 0.86 of the library's time. Larger weights were not timed.
"""

ROW_MULTIPLE = 16
"""Number that divides the rows of a part, so that no part starts at an address for which a kernel would compile anew."""


def _x_grad(grad: Tensor, *, weight: AnyWeight, num_groups: int, **_: Any) -> Tensor:
    """Return the gradient of `linear` with respect to x."""
    return linear_input_grad(grad, weight, num_groups=num_groups)


@op(x=_x_grad)
def linear(x: Tensor, weight: AnyWeight, *, num_groups: int = 1) -> Tensor:
    """See reference; float64 is not supported."""
    num_rows = checks.expert_rows(weight, num_groups)
    checks.last_dim("x", x, num_groups * weight.shape[1], DTYPES)
    checks.same_device(weight=weight.exponents, x=x)
    x_MK, rows = matrix_of(x), on_device(weight)
    y_MN = _product(x_MK, rows) if num_groups == 1 else _stacked_product(x_MK, rows, num_groups)
    return y_MN.reshape(*x.shape[:-1], num_rows)


@op()
def linear_input_grad(
    grad: Tensor, weight: AnyWeight, *, num_groups: int = 1, out: Tensor | None = None
) -> Tensor:
    """See reference; float64 is not supported."""
    num_rows = checks.expert_rows(weight, num_groups)
    checks.last_dim("grad", grad, num_rows, DTYPES)
    checks.same_device(weight=weight.exponents, grad=grad)
    shape = (*grad.shape[:-1], num_groups * weight.shape[1])
    checks.sum_of("out", out, shape, grad=grad)
    grad_MN, rows = matrix_of(grad), on_device(weight)
    if out is None:
        stacked = num_groups > 1
        dx_MK = _stacked_input_grad(grad_MN, rows, num_groups) if stacked else _input_grad(grad_MN, rows)
        return dx_MK.reshape(shape)
    # The sum is rounded once, so no kernel takes part that would round its product before.
    if out.numel() and out.is_contiguous() and _unpacks_whole(rows):
        w_NK = unpacked(rows, grad.dtype, num_groups=num_groups, row_multiple=OUTPUT_MULTIPLE)
        # Of one memory, a program would write what others have still to read.
        is_shared = out.untyped_storage().data_ptr() == grad_MN.untyped_storage().data_ptr()
        add_product(out.view(-1, shape[-1]), padded(grad_MN.clone() if is_shared else grad_MN), w_NK)
        return out
    dx_MK = torch.cat([_wide_input_grad(grad_MN, each) for each in _matrices(rows, num_groups)], dim=1)
    return out.copy_(out.float() + dx_MK.reshape(shape))


@op()
def linear_weight_grad(
    grad: Tensor, x: Tensor, *, num_groups: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See reference; float64 is not supported. Nothing here is ternary, so the library multiplies."""
    checks.dtype_in("grad", grad, DTYPES)
    checks.same_dtype("x", x, "grad", grad)
    checks.same_device(grad=grad, x=x)
    checks.last_dim_not_empty("grad", grad)
    checks.leading_dims("x", x, grad.shape[:-1], "grad", grad)
    checks.last_dim_not_empty("x", x)
    checks.side_by_side("x", x.shape[-1], num_groups)
    checks.float_dtype("dtype", dtype, checks.GRADIENT_DTYPES)
    w_NK = rounded_product(padded(matrix_of(grad)).T, matrix_of(x), dtype)[: grad.shape[-1]]
    if num_groups == 1:
        return w_NK
    return w_NK.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(0, 1)


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the dtype of a, for two matrices in float32 or bfloat16.

    On a CPU, where Triton's interpreter runs, the library would take subnormal bfloat16 numbers for zeros.
    """
    if a.device.type == "cuda" or a.dtype is torch.float32:
        return torch.mm(a, b)
    return wide_product(a, b).to(a.dtype)


def add_product(added: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to `added`, all contiguous and in float32 or all in bfloat16, and return it.

    The library's own `addmm` rounds a product in bfloat16 before it adds, and then the sum.
    """
    if a.dtype is torch.float32:
        return added.addmm_(a, b)
    fits = copies_in_bulk(a.device) and has_descriptors(a[None], b[None], added[None])
    if min(b.shape) > MOST_KERNEL_SIDE or not fits:
        return torch.add(added, wide_product(a, b), out=added)
    product_sum(a[None], b[None], added=added[None], out=added[None])
    return added


def padded(grad_MN: Tensor) -> Tensor:
    """Return gradients of outputs with columns of zeros, to a multiple of OUTPUT_MULTIPLE."""
    missing = -grad_MN.shape[1] % OUTPUT_MULTIPLE
    return torch.nn.functional.pad(grad_MN, (0, missing)) if missing else grad_MN


def multiplies_float_rows(x_MK: Tensor) -> bool:
    """Return whether `float_rows_product` takes rows."""
    return x_MK.dtype is torch.float32 and 0 < x_MK.shape[0] <= FEW_FLOAT_ROWS


def matrix_of(x: Tensor) -> Tensor:
    """Return x as contiguous rows [M, last]. M is computed here, because torch cannot infer it for an empty batch."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _is_dense(x_MK: Tensor, weight: DeviceWeight) -> bool:
    """Return whether the library multiplies, and no kernel that unpacks the weight on its way.

    For few rows in bfloat16 such a kernel is faster. The library is faster for many rows, and in float32.
    """
    # A product counts the rows of a weight in 32 bits, as it counts the columns. The columns never exceed MAX_COLUMNS.
    few = x_MK.dtype is torch.bfloat16 and 0 < x_MK.shape[0] <= FEW_ROWS and weight.shape[0] <= MAX_COLUMNS
    return not few


def _product(x_MK: Tensor, weight: DeviceWeight) -> Tensor:
    """Return x W^T in the dtype of x. The library takes a large weight by ranges of unpacked rows."""
    if takes_cuda(many_rows.fits(x_MK, weight), x_MK.device, only=compiler.HOPPER):
        return many_rows.many_rows_product(x_MK, weight, many_rows.form_of(x_MK.shape[0], weight.shape[0]))
    if takes_cuda(cuda_product.fits(x_MK, weight), x_MK.device):
        return cuda_product.few_rows_product(x_MK, weight)
    if multiplies_float_rows(x_MK):
        return float_rows_product(x_MK, weight)
    if not _is_dense(x_MK, weight):
        return packed_product(x_MK, weight, transposed=False)
    parts = row_ranges(*weight.shape)
    if len(parts) == 1:
        w_NK = unpacked(weight, x_MK.dtype, row_multiple=OUTPUT_MULTIPLE)
        return narrow_product(x_MK, w_NK.T)[:, : weight.shape[0]]
    y_MN = torch.empty(x_MK.shape[0], weight.shape[0], dtype=x_MK.dtype, device=x_MK.device)
    for rows in parts:
        # The memory of unpacked rows is free before the next are unpacked.
        y_MN[:, rows.start : rows.stop] = narrow_product(
            x_MK, dense_rows(rows_of(weight, rows), x_MK.dtype).T
        )
    return y_MN


def _input_grad(grad_MN: Tensor, weight: DeviceWeight) -> Tensor:
    """Return dy W in the dtype of dy."""
    if not _is_dense(grad_MN, weight):
        return packed_product(grad_MN, weight, transposed=True)
    if _unpacks_whole(weight):
        w_NK = unpacked(weight, grad_MN.dtype, row_multiple=OUTPUT_MULTIPLE)
        return narrow_product(padded(grad_MN), w_NK)
    return _wide_input_grad(grad_MN, weight).to(grad_MN.dtype)


def _wide_input_grad(grad_MN: Tensor, weight: DeviceWeight) -> Tensor:
    """Return dy W in float32. A range of unpacked rows gives a part of every sum."""
    dx_MK = torch.zeros(grad_MN.shape[0], weight.shape[1], dtype=torch.float32, device=grad_MN.device)
    for rows in row_ranges(*weight.shape):
        dx_MK += wide_product(
            grad_MN[:, rows.start : rows.stop], dense_rows(rows_of(weight, rows), grad_MN.dtype)
        )
    return dx_MK


def _stacked_product(x_MK: Tensor, weight: DeviceWeight, num_groups: int) -> Tensor:
    """Return x W^T in the dtype of x, for the matrices of a stack side by side. Those of a large stack are taken in turn."""
    if _unpacks_whole(weight):
        return narrow_product(x_MK, unpacked(weight, x_MK.dtype, num_groups=num_groups).T)
    num_rows = weight.shape[0] // num_groups
    y_MN = torch.zeros(x_MK.shape[0], num_rows, dtype=torch.float32, device=x_MK.device)
    for x_Mk, matrix in zip(x_MK.split(weight.shape[1], dim=1), _matrices(weight, num_groups), strict=True):
        for rows in row_ranges(*matrix.shape):
            w_kN = dense_rows(rows_of(matrix, rows), x_MK.dtype).T
            y_MN[:, rows.start : rows.stop] += wide_product(x_Mk, w_kN)
    return y_MN.to(x_MK.dtype)


def _stacked_input_grad(grad_MN: Tensor, weight: DeviceWeight, num_groups: int) -> Tensor:
    """Return dy W in the dtype of dy, for the matrices of a stack side by side."""
    if _unpacks_whole(weight):
        return narrow_product(grad_MN, unpacked(weight, grad_MN.dtype, num_groups=num_groups))
    return torch.cat([_input_grad(grad_MN, matrix) for matrix in _matrices(weight, num_groups)], dim=1)


def _unpacks_whole(weight: DeviceWeight) -> bool:
    """Return whether all of a weight may be unpacked at a time."""
    return math.prod(weight.shape) <= DENSE_ELEMENTS


def _matrices(weight: DeviceWeight, num_groups: int) -> list[DeviceWeight]:
    """Return the matrices of a stack, on the memory of their weight."""
    num_rows = weight.shape[0] // num_groups
    return [rows_of(weight, range(e * num_rows, (e + 1) * num_rows)) for e in range(num_groups)]


def row_ranges(num_rows: int, num_columns: int) -> list[range]:
    """Return ranges of rows that unpack at most DENSE_ELEMENTS each, in multiples of ROW_MULTIPLE."""
    step = max(DENSE_ELEMENTS // num_columns // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    return [range(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def rows_of(weight: DeviceWeight, rows: range) -> DeviceWeight:
    """Return some rows of a weight, on its own memory."""
    part: dict[str, Any] = {n: tensor[rows.start : rows.stop] for n, tensor in weight.tensors().items()}
    return replace(weight, **part, shape=(len(rows), weight.shape[1]))
