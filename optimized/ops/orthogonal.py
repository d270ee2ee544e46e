"""Orthogonalised gradients, and averages of gradients. See `arbitor.reference.ops.orthogonal`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.float32_sums import rounded_product, wide_product
from arbitor.optimized.kernels.launch import vote_rate
from arbitor.optimized.kernels.orthogonal import average, mark_rows, row_factors, row_squares, scale_rows
from arbitor.optimized.kernels.product_sum import copies_in_bulk, product_sum, room_for
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import (
    AVERAGE_MEMORY_MAX,
    DEFAULT_ORTHOGONAL_STEPS,
    MAX_ORTHOGONAL_STEPS,
    NEWTON_SCHULZ,
    ORTHOGONAL_ROUND,
    orthogonal_rounds,
)

__all__ = ["average_gradient", "orthogonalize"]


@op()
def average_gradient(
    grad_NK: Tensor,
    mean_NK: Tensor,
    exponents_N: Tensor,
    rate: float | Tensor,
    *,
    memory: int = 1,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference."""
    checks.averages("grad_NK", grad_NK, mean_NK, exponents_N, out)
    vote_rate(rate, grad_NK.device)
    checks.integer("memory", memory, 1, AVERAGE_MEMORY_MAX)
    given = (grad_NK.contiguous(), mean_NK.contiguous(), exponents_N.contiguous())
    if out is not None and all(part.is_contiguous() for part in out):
        average(*given, rate, memory, out)
        return out
    found = (torch.empty_like(given[0]), torch.empty_like(given[1]), torch.empty_like(given[2]))
    average(*given, rate, memory, found)
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

    All products but those with the gradient's longer side are symmetric, and half of each is computed. In float32, and on GPUs
    before Hopper, the library multiplies.
    """
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.integer("iterations", iterations, 1, MAX_ORTHOGONAL_STEPS)
    checks.stacked_rows("grad_NK", grad_NK.shape[0], num_groups)
    if grad_NK.numel() == 0:
        return grad_NK.clone()
    # Torch calls a lone row or column contiguous whatever its strides are, and descriptors go by strides.
    grad_NK = grad_NK.reshape(-1).view(grad_NK.shape)
    by_kernel = grad_NK.dtype is torch.bfloat16 and copies_in_bulk(grad_NK.device)
    product, step_of = (_kernel_product, _kernel_step) if by_kernel else (_library_product, _library_step)
    squares_N = row_squares(grad_NK)
    x = room_for(num_groups, len(grad_NK) // num_groups, grad_NK.shape[1], grad_NK)
    scale_rows(grad_NK, row_factors(squares_N, num_groups), out_NK=x.flatten(0, 1))
    tall = x.shape[1] > x.shape[2]
    for length in orthogonal_rounds(iterations):
        rows = x.mT if tall else x
        s = product(rows, rows.mT)
        q = p = step_of(s)
        for _ in range(length - 1):
            s = product(product(p, s), p)
            p = step_of(s)
            q = product(p, q)
        made = rounded_product(*((x, q) if tall else (q, x)), x.dtype)
        # The library's result has no room between its rows.
        x = x.copy_(made) if iterations > ORTHOGONAL_ROUND else made
    out_NK = x.flatten(0, 1).contiguous()
    mark_rows(out_NK, squares_N)
    return out_NK


def _kernel_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product of two stacks that is symmetric, of which half is computed."""
    return product_sum(a, b, symmetric=True)


def _kernel_step(s: Tensor) -> Tensor:
    """Return P = a I + b S + c S S, of which half is computed."""
    a, b, c = NEWTON_SCHULZ
    return product_sum(s, s, factor=c, added=s, added_factor=b, diagonal=a, symmetric=True)


def _library_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product of two stacks in their dtype."""
    return rounded_product(a, b, a.dtype)


def _library_step(s: Tensor) -> Tensor:
    """Return P = a I + b S + c S S in the dtype of S."""
    a, b, c = NEWTON_SCHULZ
    made = wide_product(s, s).mul_(c).add_(s, alpha=b)
    made.diagonal(dim1=1, dim2=2).add_(a)
    return made.to(s.dtype)
