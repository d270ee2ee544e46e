"""Ternary linear: y = x W^T, and the two gradients its backward pass needs. No bias.

Legend: N outputs (rows of the weight), K inputs (columns), M = product of the leading dimensions.
Products and sums run in float32, or float64 for float64 inputs, and are rounded once to the dtype that comes out.
"""

from __future__ import annotations

from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["linear", "linear_input_grad", "linear_weight_grad"]


@op
def linear(x: Tensor, weight: TernaryWeight) -> Tensor:
    """Return x times the transposed weight.

    Math:    y[m, n] = sum_k x[m, k] * W[n, k]
    Shapes:  x float32, bfloat16 or float64 [..., K]; leading dimensions may be empty
    Returns: dtype of x, [..., N]
    Raises:  TypeError or ValueError for a dtype, shape or device that does not fit
    Laws:    linear in x; negating every trit negates y; permuting rows of W permutes y
    Source:  docs/spec/linear.md
    """
    checks.last_dim("x", x, weight.shape[1])
    checks.same_device(weight=weight.packed, x=x)
    wide = wide_dtype(x)
    return (x.to(wide) @ dequantize(weight, dtype=wide).T).to(x.dtype)


@op
def linear_input_grad(grad: Tensor, weight: TernaryWeight) -> Tensor:
    """Return the gradient of the loss with respect to the input of `linear`.

    Math:    dx[m, k] = sum_n dy[m, n] * W[n, k]
    Shapes:  grad float32, bfloat16 or float64 [..., N]
    Returns: dtype of grad, [..., K]
    Raises:  TypeError or ValueError for a dtype, shape or device that does not fit
    Laws:    the adjoint of `linear`: <dy, linear(x)> = <linear_input_grad(dy), x>
    Source:  docs/spec/linear.md
    """
    checks.last_dim("grad", grad, weight.shape[0])
    checks.same_device(weight=weight.packed, grad=grad)
    wide = wide_dtype(grad)
    return (grad.to(wide) @ dequantize(weight, dtype=wide)).to(grad.dtype)


@op
def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the weight of `linear`, from which votes are made.

    Math:    dW[n, k] = sum_m dy[m, n] * x[m, k]
    Shapes:  grad [..., N] and x [..., K] of one dtype, float32, bfloat16 or float64, the same leading dimensions
    Returns: float32 [N, K] (float64 for float64 inputs); zero when there is no row to sum over
    Raises:  TypeError or ValueError for dtypes, shapes or devices that do not fit
    Laws:    adjoint to `linear`: <linear_weight_grad(dy, x), W> = <dy, linear(x)>
    Source:  docs/spec/linear.md
    """
    checks.dtype_in("grad", grad, checks.FLOAT_DTYPES)
    checks.same_dtype("x", x, "grad", grad)
    checks.same_device(grad=grad, x=x)
    checks.some_dimension("grad", grad)
    checks.leading_dims("x", x, grad.shape[:-1], "grad", grad)
    dtype = wide_dtype(grad)
    grad_MN = grad.reshape(-1, grad.shape[-1]).to(dtype)
    x_MK = x.reshape(-1, x.shape[-1]).to(dtype)
    return grad_MN.T @ x_MK
