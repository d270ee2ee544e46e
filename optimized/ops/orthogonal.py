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
)
from arbitor.optimized.kernels.product_sum import copies_in_bulk, has_descriptors, product_sum, room_for
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
    """See reference; float64 is not supported. A launch multiplies all matrices of a stack.

    S and b S + c S S are symmetric, so half of each is computed. In float32, and on GPUs before Hopper, the library multiplies.
    """
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.integer("iterations", iterations, 1, MAX_ORTHOGONAL_STEPS)
    checks.stacked_rows("grad_NK", grad_NK.shape[0], num_groups)
    if grad_NK.numel() == 0:
        return grad_NK.clone()
    # Torch calls a lone row or column contiguous whatever its strides are, and descriptors go by strides.
    grad_NK = grad_NK.reshape(-1).view(grad_NK.shape)
    squares_N = row_squares(grad_NK)
    factors_N = row_factors(squares_N, num_groups)
    shape = (num_groups, -1, grad_NK.shape[1])
    if grad_NK.dtype is torch.float32 or not copies_in_bulk(grad_NK.device):
        return _by_the_library(scale_rows(grad_NK, factors_N).view(shape), squares_N, iterations)
    x = room_for(num_groups, len(grad_NK) // num_groups, grad_NK.shape[1], grad_NK)
    scale_rows(grad_NK, factors_N, out_NK=x.flatten(0, 1))
    tall = x.shape[1] > x.shape[2]
    # Where descriptors find contiguous rows, the last product writes what is returned.
    whole = torch.empty_like(grad_NK).view(shape) if has_descriptors(grad_NK[None]) else None
    a, b, c = NEWTON_SCHULZ
    for step in range(iterations):
        rows = x.mT if tall else x
        s = product_sum(rows, rows.mT, symmetric=True)
        polynomial = product_sum(s, s, factor=c, added=s, added_factor=b, symmetric=True)
        last = step == iterations - 1
        x = product_sum(
            *((x, polynomial) if tall else (polynomial, x)),
            added=x,
            added_factor=a,
            out=whole if last else None,
            squares_N=squares_N if last else None,
        )
    return x.flatten(0, 1).contiguous()


def _by_the_library(x: Tensor, squares_N: Tensor, iterations: int) -> Tensor:
    """Return a stack after all steps, as rows. Rows whose sum of squares is not finite become NaN."""
    dtype, tall = x.dtype, x.shape[1] > x.shape[2]
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        rows = x.mT if tall else x
        s = _products(rows, rows.mT).to(dtype)
        polynomial = torch.add(_products(s, s).mul_(c), s, alpha=b).to(dtype)
        factors = (x, polynomial) if tall else (polynomial, x)
        x = torch.add(_products(*factors), x, alpha=a).to(dtype)
    return torch.where((squares_N < torch.inf)[:, None], x.flatten(0, 1), torch.nan)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of two stacks of matrices in float32, without rounding the sums to bfloat16."""
    if a.device.type == "cuda" and a.dtype is torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
