"""Orthogonalised gradients: every direction of a matrix weighs about the same in the votes.

Legend: E matrices of N rows each, stacked, K columns; r = min(N, K); s the r x r matrix of products of rows (or columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_ORTHOGONAL_STEPS, MAX_ORTHOGONAL_STEPS, NEWTON_SCHULZ
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.promises import op

__all__ = ["orthogonalize"]


@op
def orthogonalize(
    grad_NK: Tensor, *, iterations: int = DEFAULT_ORTHOGONAL_STEPS, num_groups: int = 1
) -> Tensor:
    """Return the gradient with its singular values drawn towards 1, its singular vectors unchanged.

    Math:    X = G / ||G||_F; then `iterations` times S = X X^T, X <- a X + (b S + c S S) X, with (a, b, c) = NEWTON_SCHULZ, which
             maps each singular value x to a x + b x^3 + c x^5. For N > K, S = X^T X and X <- a X + X (b S + c S S)
    Shapes:  grad_NK float32, bfloat16 or float64 [E N, K], a stack of `num_groups` = E matrices, each orthogonalised on its own
    Range:   iterations in 1 .. 10
    Returns: dtype of grad, same shape. A row that is not finite comes out as NaN and takes no part in the rest; a matrix
             of zeros stays zero
    Rounding: the norm is taken in float64; X, S and b S + c S S are rounded to the dtype of grad each time; the sums
             inside them run in float32 or wider
    Raises:  TypeError or ValueError for a dtype, shape or number that is not allowed
    Laws:    2 * g gives the same; <orthogonalize(g), g> > 0, even after votes scale each row by a positive number, so
             weights descend
    Source:  docs/spec/orthogonal.md; Jordan et al. 2024 (Muon), who orthogonalise a momentum
    """
    checks.gradient_matrix("grad_NK", grad_NK, checks.FLOAT_DTYPES)
    checks.integer("iterations", iterations, 1, MAX_ORTHOGONAL_STEPS)
    checks.stacked_rows("grad_NK", grad_NK.shape[0], num_groups)
    finite_N = grad_NK.isfinite().all(dim=1, keepdim=True)
    matrices = torch.where(finite_N, grad_NK, 0.0).unflatten(0, (num_groups, -1))
    out_NK = torch.cat([_one_matrix(matrix_NK, iterations) for matrix_NK in matrices])
    return torch.where(finite_N, out_NK, torch.nan)


def _one_matrix(grad_NK: Tensor, iterations: int) -> Tensor:
    """Return one matrix of finite elements orthogonalised, in its dtype."""
    dtype, wide = grad_NK.dtype, wide_dtype(grad_NK)
    a, b, c = NEWTON_SCHULZ
    norm = grad_NK.to(torch.float64).square().sum().sqrt()
    x = (grad_NK.to(torch.float64) / torch.where(norm > 0, norm, 1.0)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        s = (x.to(wide) @ x.to(wide).T).to(dtype)
        polynomial = (b * s.to(wide) + c * (s.to(wide) @ s.to(wide))).to(dtype)
        x = (a * x.to(wide) + polynomial.to(wide) @ x.to(wide)).to(dtype)
    return x.T if tall else x
