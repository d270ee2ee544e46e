"""Orthogonalised gradients, and averages of gradients. See `arbitor.reference.ops.orthogonal`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels.launch import vote_rate
from arbitor.optimized.kernels.orthogonal import average, row_factors, row_squares, scale_rows, weighted_sum
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_ORTHOGONAL_STEPS, MAX_ORTHOGONAL_STEPS, NEWTON_SCHULZ

__all__ = ["average_gradient", "orthogonalize"]


@op()
def average_gradient(
    grad_NK: Tensor,
    mean_NK: Tensor,
    exponents_N: Tensor,
    rate: float | Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference."""
    checks.averages("grad_NK", grad_NK, mean_NK, exponents_N, out)
    vote_rate(rate, grad_NK.device)
    given = (mean_NK.contiguous(), exponents_N.contiguous())
    target = (torch.empty_like(given[0]), torch.empty_like(given[1]))
    if out is not None and out[0].is_contiguous() and out[1].is_contiguous():
        target = out
    led_NK = average(grad_NK.contiguous(), *given, rate, target)
    if out is not None and target is not out:
        return led_NK, out[0].copy_(target[0]), out[1].copy_(target[1])
    return led_NK, *target


@op()
def orthogonalize(
    grad_NK: Tensor, *, iterations: int = DEFAULT_ORTHOGONAL_STEPS, num_groups: int = 1
) -> Tensor:
    """See reference; float64 is not supported. The library multiplies all matrices of a stack at once."""
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.integer("iterations", iterations, 1, MAX_ORTHOGONAL_STEPS)
    checks.stacked_rows("grad_NK", grad_NK.shape[0], num_groups)
    if grad_NK.numel() == 0:
        return grad_NK.clone()
    grad_NK = grad_NK.contiguous()
    squares_N = row_squares(grad_NK)
    x = scale_rows(grad_NK, row_factors(squares_N, num_groups)).view(num_groups, -1, grad_NK.shape[1])
    tall = x.shape[1] > x.shape[2]
    a, b, c = NEWTON_SCHULZ
    for step in range(iterations):
        s = (_products(x.mT, x) if tall else _products(x, x.mT)).to(x.dtype)
        polynomial = weighted_sum(s, _products(s, s), b, c)
        product = _products(x, polynomial) if tall else _products(polynomial, x)
        x = weighted_sum(x, product, a, 1.0, squares_N=squares_N if step == iterations - 1 else None)
    return x.view_as(grad_NK)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of two stacks of matrices in float32, without rounding the sums to bfloat16."""
    if a.device.type == "cuda" and a.dtype is torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
