"""Orthogonalised gradients, and averages of gradients. See `arbitor.reference.ops.orthogonal`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels.launch import vote_rate
from arbitor.optimized.kernels.orthogonal import (
    average,
    row_factors,
    row_squares,
    scale_rows,
    weighted_sum,
    whole_of_quarters,
)
from arbitor.optimized.kernels.product_sum import product_sum
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_ORTHOGONAL_STEPS, MAX_ORTHOGONAL_STEPS, NEWTON_SCHULZ

__all__ = ["average_gradient", "orthogonalize"]

MOST_SIDE_OF_A_SUM, MOST_SIDE_OF_S = 2048, 512
"""Most rows, or columns of a tall matrix, for which one kernel multiplies and adds, and for which it makes the products S.

An H200 took 0.7 of the library's time for a sum at 768 and 2,048, and 1.1 at 3,072. For S it took 1.1 to 1.5 at 768.
"""

LEAST_SIDE = 4096
"""Least rows of a symmetric matrix of which only the blocks on and above the diagonal are computed. 3,072 were slower so."""

SIDE_MULTIPLE = 64
"""What divides these rows, so that a quarter of them starts where the library's fast products want it."""


@op()
def average_gradient(
    grad_NK: Tensor,
    mean_NK: Tensor,
    exponents_N: Tensor,
    rate: float | Tensor,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference."""
    checks.averages("grad_NK", grad_NK, mean_NK, exponents_N, out)
    vote_rate(rate, grad_NK.device)
    given = (grad_NK.contiguous(), mean_NK.contiguous(), exponents_N.contiguous())
    if out is not None and all(part.is_contiguous() for part in out):
        average(*given, rate, out)
        return out
    found = (torch.empty_like(given[0]), torch.empty_like(given[1]), torch.empty_like(given[2]))
    average(*given, rate, found)
    if out is None:
        return found
    for part, value in zip(out, found, strict=True):
        part.copy_(value)
    return out


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
        polynomial = _polynomial(x.mT if tall else x, b, c)
        factors = (x, polynomial) if tall else (polynomial, x)
        x = _sum(x, a, *factors, 1.0, squares_N=squares_N if step == iterations - 1 else None)
    return x.view_as(grad_NK)


def _polynomial(x: Tensor, b: float, c: float) -> Tensor:
    """Return b S + c S S with S = x x^T, for a stack x [E, R, ...], rounded to its dtype as S is."""
    if x.shape[1] < LEAST_SIDE or x.shape[1] % SIDE_MULTIPLE:
        s = product_sum(x, x.mT) if _is_fused(x, MOST_SIDE_OF_S) else _products(x, x.mT).to(x.dtype)
        return _sum(s, b, s, s, c)
    s = whole_of_quarters(*_quarters(x), x.dtype)
    # S is symmetric, and S S is S times its transpose.
    return whole_of_quarters(*_quarters(s), x.dtype, added=(s, b, c))


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `whole_of_quarters` makes x x^T of, for a stack x [E, R, ...]: two thirds of the time of all of it."""
    quarters, halves = x.unflatten(1, (4, -1)), x.unflatten(1, (2, -1))
    diagonals, beside = (
        _block_products(quarters, quarters),
        _block_products(quarters[:, 0::2], quarters[:, 1::2]),
    )
    return diagonals, beside, _products(halves[:, 0], halves[:, 1].mT)


def _block_products(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T of blocks of a stack [E, blocks, rows, ...], contiguous. A transposed stack is not copied for it."""
    if a.shape[0] > 1 and a.stride(0) != a.shape[1] * a.stride(1):
        return torch.stack([_products(a[:, i], b[:, i].mT) for i in range(a.shape[1])], dim=1)
    return _products(a.flatten(0, 1), b.flatten(0, 1).mT).unflatten(0, a.shape[:2])


def _sum(
    x: Tensor, x_factor: float, a: Tensor, b: Tensor, factor: float, *, squares_N: Tensor | None = None
) -> Tensor:
    """Return x_factor x + factor (a @ b) of stacks, rounded once to their dtype; see `weighted_sum` for squares_N."""
    if _is_fused(x, MOST_SIDE_OF_A_SUM):
        return product_sum(a, b, factor=factor, added=x, added_factor=x_factor, squares_N=squares_N)
    return weighted_sum(x, _products(a, b), x_factor, factor, squares_N=squares_N)


def _is_fused(x: Tensor, most_side: int) -> bool:
    """Return whether the kernel multiplies that rounds a sum once, and not the library in float32."""
    return x.dtype is torch.bfloat16 and min(x.shape[1:]) <= most_side


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of two stacks of matrices in float32, without rounding the sums to bfloat16."""
    if a.device.type == "cuda" and a.dtype is torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
