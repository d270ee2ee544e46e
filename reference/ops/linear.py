"""Ternary linear: y = x W^T, and the two gradients its backward pass needs. No bias.

Legend: N outputs (rows of the weight), K inputs (columns), M = product of the leading dimensions. A stack of E matrices of N rows
(`num_groups`) stands side by side: its matrix has N rows of E K columns, those of the first matrix first.
Products and sums run in float32, or float64 for float64 inputs, and are rounded once to the dtype that comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.dtypes import sum_dtype, wide_dtype
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["linear", "linear_input_grad", "linear_weight_grad"]


@op
def linear(x: Tensor, weight: TernaryWeight, *, num_groups: int = 1) -> Tensor:
    """Return x times the transposed weight.

    Math:    y[m, n] = sum_k x[m, k] * W[n, k]; with a stack y[m, n] = sum_e sum_k x[m, e K + k] * W[e N + n, k]
    Shapes:  x float32, bfloat16 or float64 [..., K], or [..., E K] with a stack of E; leading dimensions may be empty
    Returns: dtype of x, [..., N]
    Raises:  TypeError or ValueError for a dtype, shape, device or number of matrices that does not fit
    Laws:    linear in x; negating every trit negates y; permuting rows of W permutes y; a stack gives the sum of its matrices
    Source:  docs/spec/linear.md
    """
    checks.expert_rows(weight, num_groups)
    checks.last_dim("x", x, num_groups * weight.shape[1])
    checks.same_device(weight=weight.packed, x=x)
    wide = wide_dtype(x)
    return (x.to(wide) @ _matrix(weight, num_groups, wide).T).to(x.dtype)


@op
def linear_input_grad(
    grad: Tensor, weight: TernaryWeight, *, num_groups: int = 1, out: Tensor | None = None
) -> Tensor:
    """Return the gradient of the loss with respect to the input of `linear`.

    Math:    dx[m, k] = sum_n dy[m, n] * W[n, k]; with a stack dx[m, e K + k] = sum_n dy[m, n] * W[e N + n, k]
    Shapes:  grad float32, bfloat16 or float64 [..., N]
    Returns: dtype of grad, [..., K], or [..., E K] with a stack of E; or `out`, of that dtype and shape, to which dx was
             added: the sum is rounded once
    Raises:  TypeError or ValueError for a dtype, shape, device or number of matrices that does not fit
    Laws:    the adjoint of `linear`: <dy, linear(x)> = <linear_input_grad(dy), x>
    Source:  docs/spec/linear.md
    """
    num_rows = checks.expert_rows(weight, num_groups)
    checks.last_dim("grad", grad, num_rows)
    checks.same_device(weight=weight.packed, grad=grad)
    checks.sum_of("out", out, (*grad.shape[:-1], num_groups * weight.shape[1]), grad=grad)
    wide = wide_dtype(grad)
    dx = grad.to(wide) @ _matrix(weight, num_groups, wide)
    return dx.to(grad.dtype) if out is None else out.copy_(out.to(wide) + dx)


@op
def linear_weight_grad(
    grad: Tensor, x: Tensor, *, num_groups: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the gradient of the loss with respect to the weight of `linear`, from which votes are made.

    Math:    dW[n, k] = sum_m dy[m, n] * x[m, k]; with a stack dW[e N + n, k] = sum_m dy[m, n] * x[m, e K + k]
    Shapes:  grad [..., N] and x [..., K], or [..., E K] with a stack of E, of one dtype, float32, bfloat16 or float64, and with
             the same leading dimensions
    Returns: `dtype`, float32 or bfloat16, to which each sum is rounded once (float64 for float64 inputs), [N, K], or [E N, K]
             with a stack; zero when there is no row to sum over
    Raises:  TypeError or ValueError for dtypes, shapes, devices or a number of matrices that do not fit
    Laws:    adjoint to `linear`: <linear_weight_grad(dy, x), W> = <dy, linear(x)>
    Source:  docs/spec/linear.md
    """
    checks.dtype_in("grad", grad, checks.FLOAT_DTYPES)
    checks.same_dtype("x", x, "grad", grad)
    checks.same_device(grad=grad, x=x)
    checks.last_dim_not_empty("grad", grad)
    checks.leading_dims("x", x, grad.shape[:-1], "grad", grad)
    checks.last_dim_not_empty("x", x)
    checks.side_by_side("x", x.shape[-1], num_groups)
    checks.float_dtype("dtype", dtype, checks.GRADIENT_DTYPES)
    wide = wide_dtype(grad)
    grad_MN = grad.reshape(-1, grad.shape[-1]).to(wide)
    x_MK = x.reshape(-1, x.shape[-1]).to(wide)
    return _stacked(grad_MN.T @ x_MK, num_groups).to(sum_dtype(grad, dtype))


def _matrix(weight: TernaryWeight, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Return W as floats: [N, K], or the matrices of a stack side by side, [N, E K]."""
    w_EnK = dequantize(weight, dtype=dtype).unflatten(0, (num_groups, -1))
    return w_EnK.transpose(0, 1).flatten(1)


def _stacked(w: Tensor, num_groups: int) -> Tensor:
    """Return matrices that stand side by side, [N, E K], one below the other, [E N, K]."""
    return w.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(0, 1)
