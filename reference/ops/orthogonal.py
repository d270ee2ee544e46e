"""Orthogonalised gradients: every direction of a matrix weighs about the same in the votes. Before that, averages of them.

Legend: E matrices of N rows each, stacked, K columns; r = min(N, K); S, P and Q are r x r matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    ACCUM_MAX,
    AVERAGE_EXPONENT_MIN,
    AVERAGE_MEMORY_MAX,
    DEFAULT_ORTHOGONAL_STEPS,
    MAX_ORTHOGONAL_STEPS,
    NEWTON_SCHULZ,
    orthogonal_rounds,
)
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.promises import op

__all__ = ["average_gradient", "orthogonalize"]


@op
def average_gradient(
    grad_NK: Tensor,
    mean_NK: Tensor,
    exponents_N: Tensor,
    rate: float | Tensor,
    *,
    memory: int = 1,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a gradient that its running mean leads, and the mean after it, int8 with an exponent a row.

    Math:    m = ((n - 1) q 2**e + g) / n and u = ((n m - m) + g) / n with n = 2**memory, of a row with mean q 2**e. Then
             2**(k - 1) <= max |m| < 2**k gives e <- max(k - 7, -128), 0 for a row of zeros, and
             q <- clamp(rint(m / 2**e), -127, 127)
             at rate 0, and for a row of g that is not finite: u = g, and q and e stay
    Shapes:  grad_NK float32 or bfloat16 [N, K]; mean_NK int8 [N, K]; exponents_N int8 [N]
    Range:   rate 0 .. 127, a number or a 0-dim float32 tensor: only whether it is 0 counts; memory 1 .. 6
    Returns: u in the dtype of grad, without a gradient, q in -127 .. 127 and e in -128 .. 121; new, or `out`, overwritten, which
             may be (grad_NK, mean_NK, exponents_N) itself
    Rounding: m is taken in float64 with one rounding, and u with two, of n m - m and of the sum; u is rounded to float32 and
             then to its dtype; half to even
    Raises:  TypeError or ValueError for a dtype, shape, device or rate that is not allowed
    Laws:    2 * g with e + 1 gives 2 * u, q and one more than e; the mean is off by half a step of its row, or one where it is
             clamped; the same gradient again and again is what u and the mean come to
    Source:  docs/spec/orthogonal.md; the momentum of Nesterov as Muon takes it (Jordan et al. 2024)
    """
    checks.averages("grad_NK", grad_NK, mean_NK, exponents_N, out)
    checks.vote_rate(rate)
    checks.integer("memory", memory, 1, AVERAGE_MEMORY_MAX)
    # The mean is of integers, which have no gradient, so a step that it leads has none either.
    grad_NK = grad_NK.detach()
    # A product with a power of two is exact, and so is one of eight bits with six, so no fused sum makes a difference.
    parts = 2**memory
    wide_NK = grad_NK.to(torch.float64)
    kept_NK = mean_NK.to(torch.float64) * _power_of_two(exponents_N)[:, None]
    m_NK = (kept_NK * (parts - 1) + wide_NK) / parts
    u_NK = ((m_NK * parts - m_NK + wide_NK) / parts).to(torch.float32).to(grad_NK.dtype)
    moves = torch.as_tensor(rate, device=grad_NK.device) != 0
    moves_N = moves & grad_NK.isfinite().all(dim=1)
    m_NK = torch.where(moves_N[:, None], m_NK, 0.0)
    _, k_N = torch.frexp(m_NK.abs().amax(dim=1))
    e_N = torch.where(m_NK.any(dim=1), (k_N - 7).clamp(min=AVERAGE_EXPONENT_MIN), 0)
    q_NK = (m_NK * _power_of_two(-e_N)[:, None]).round().clamp(-ACCUM_MAX, ACCUM_MAX).to(torch.int8)
    found = (
        torch.where(moves_N[:, None], u_NK, grad_NK),
        torch.where(moves_N[:, None], q_NK, mean_NK),
        torch.where(moves_N, e_N.to(torch.int8), exponents_N),
    )
    if out is None:
        return found
    for part, value in zip(out, found, strict=True):
        part.copy_(value)
    return out


@op
def orthogonalize(
    grad_NK: Tensor, *, iterations: int = DEFAULT_ORTHOGONAL_STEPS, num_groups: int = 1
) -> Tensor:
    """Return the gradient with its singular values drawn towards 1, its singular vectors unchanged.

    Math:    X = G / ||G||_F; then `iterations` steps X <- P X with P = a I + b S + c S S, S = X X^T and (a, b, c) = NEWTON_SCHULZ,
             each of which maps each singular value x to a x + b x^3 + c x^5. For N > K, S = X^T X and X <- X P
    Rounds:  at most ORTHOGONAL_ROUND steps multiply X once, and of more steps each multiplies it: with S as above and Q = I, a step
             of a round is P as above, Q <- P Q and S <- P S P, which is what S would be of P X. Then X <- Q X
    Shapes:  grad_NK float32, bfloat16 or float64 [E N, K], a stack of `num_groups` = E matrices, each orthogonalised on its own
    Range:   iterations in 1 .. 10
    Returns: dtype of grad, same shape. A row that is not finite comes out as NaN and takes no part in the rest; a matrix
             of zeros stays zero
    Rounding: the norm is taken in float64; X, P and every product (X X^T, P Q, P S, then that times P, and Q X) are rounded to the
             dtype of grad; the sums inside them run in float32 or wider, and so does S S, which is not rounded
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


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return float64 2**exponents for integers from -1022 to 1023, exact whatever the device does with `ldexp`."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def _one_matrix(grad_NK: Tensor, iterations: int) -> Tensor:
    """Return one matrix of finite elements orthogonalised, in its dtype."""
    dtype, wide = grad_NK.dtype, wide_dtype(grad_NK)
    a, b, c = NEWTON_SCHULZ
    norm = grad_NK.to(torch.float64).square().sum().sqrt()
    x = (grad_NK.to(torch.float64) / torch.where(norm > 0, norm, 1.0)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left.to(wide) @ right.to(wide)).to(dtype)

    identity = torch.eye(len(x), dtype=dtype, device=x.device)
    for length in orthogonal_rounds(iterations):
        s, q = product(x, x.T), identity
        for step in range(length):
            p = (a * identity.to(wide) + b * s.to(wide) + c * (s.to(wide) @ s.to(wide))).to(dtype)
            q = product(p, q)
            if step < length - 1:
                s = product(product(p, s), p)
        x = product(q, x)
    return x.T if tall else x
