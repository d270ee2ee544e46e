"""Votes: a weight gradient as small integers. A vote estimates the gradient, so weights move against it.

Legend: N rows, K columns, KG groups a row, R selected rows, g gradient, v votes, V row exponent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import ACCUM_MAX, DEFAULT_GROUP_SIZE, SILENT_ROW, groups_per_row
from arbitor.reference.ops.dither import dither_bytes
from arbitor.reference.promises import op

__all__ = ["row_exponents", "sign_votes", "step_from_loss", "stochastic_votes"]


@op
def row_exponents(grad_NK: Tensor) -> Tensor:
    """Return each row's root mean square, rounded to a power of two, as its exponent V.

    Math:    ms = mean of g**2 over the row, in float64; 2**e <= ms < 2**(e + 1); V = floor((e + 1) / 2)
    Shapes:  grad_NK float32 or bfloat16 [N, K]
    Returns: int32 [N] from -149 - ceil(log2(K) / 2) to 128, or SILENT_ROW = 2**15 where ms is 0 or not finite
    Raises:  TypeError for another dtype; ValueError for a gradient that is not two-dimensional or has no column
    Laws:    2 * g raises V by 1; the order of columns does not matter, unless ms is within K * 2**-53 (relative) of an odd
             power of two, where the last bits of the sum decide
    Source:  docs/spec/votes.md. float64 so that the order of summation does not show in practice
    """
    checks.gradient_matrix("grad_NK", grad_NK)
    mean_square = grad_NK.to(torch.float64).square().mean(dim=1)
    votes = mean_square.isfinite() & (mean_square > 0)
    # ms = m * 2**x with 0.5 <= m < 1.
    _, frexp_exponent = torch.frexp(torch.where(votes, mean_square, 1.0))
    return torch.where(votes, frexp_exponent.div(2, rounding_mode="floor"), SILENT_ROW).to(torch.int32)


@op
def stochastic_votes(
    grad_NK: Tensor,
    rate: float | Tensor,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    rows: Tensor | None = None,
) -> Tensor:
    """Return votes proportional to the gradient in units of its row's scale, rounded by dither.

    Math:    q = rint(clamp(g * 2**(8 - V) * r, -32768, 32767)); v = clamp((q + b) >> 8, -127, 127), b the dither byte
    Shapes:  grad_NK float32 or bfloat16 [N, K], or [R, K] for the rows int64 [R] of a weight (-1: unused slot)
    Returns: int8, same shape; rows whose mean square is 0 or not finite, and unused slots, are all 0
    Range:   rate in [0, 127], a number or a 0-dim float32 tensor; step 0 .. 2**32 - 2, an integer or a 0-dim int64 tensor;
             group_size, seed and tensor_id as `dither_bytes`
    Rounding: g * 2**(8 - V) is exact and times r is rounded once, to float32; then clamp, then half to even
    Laws:    mean over all dither bytes is q / 256, short of saturation; v never has the sign opposite to
             that of g; rate 0 votes nothing; scaling g by a power of two changes nothing
    Raises:  TypeError or ValueError for a dtype, shape, rate or dither coordinate that is not allowed
    Source:  docs/spec/votes.md, which also says why this rule
    """
    row_exponent = row_exponents(grad_NK)
    checks.vote_rate(rate)
    checks.group_size(group_size)
    checks.vote_clock(seed, step, tensor_id)
    checks.rows_of(rows, grad_NK)
    num_rows, num_columns = grad_NK.shape
    groups = groups_per_row(num_columns, group_size)
    checks.row_values(rows, 2**32 // groups)
    if rows is None:
        rows = torch.arange(num_rows, device=grad_NK.device)

    # The product of two 24-bit significands is exact in float64, so the one rounding is the conversion to float32.
    rate_64 = torch.as_tensor(rate, dtype=torch.float32, device=grad_NK.device).to(torch.float64)
    scaled = torch.ldexp(grad_NK.to(torch.float64), (8 - row_exponent)[:, None]) * rate_64
    quotient = scaled.to(torch.float32).clamp(-32768.0, 32767.0).round()

    group_ids = rows.clamp(min=0)[:, None] * groups + torch.arange(groups, device=grad_NK.device)
    dither = dither_bytes(group_ids, group_size=group_size, seed=seed, step=step, tensor_id=tensor_id)
    dither_NK = dither[..., :group_size].reshape(num_rows, groups * group_size)[:, :num_columns]

    speaks = (row_exponent != SILENT_ROW) & (rows >= 0)
    quotient = torch.where(speaks[:, None], quotient, 0.0).to(torch.int32)
    votes = ((quotient + dither_NK) >> 8).clamp(-ACCUM_MAX, ACCUM_MAX)
    return votes.to(torch.int8)


@op
def sign_votes(grad_NK: Tensor, step_size: int) -> Tensor:
    """Return the seeds' votes: the sign of the gradient, times an integer.

    Math:    v = sign(g) * s
    Shapes:  grad_NK float32 or bfloat16 [N, K]
    Returns: int8, same shape; a row that is not finite casts no votes
    Range:   step_size in 1 .. 127
    Raises:  TypeError or ValueError for a dtype, shape or step size that is not allowed
    Laws:    scaling g by a positive number changes nothing; -g votes -v
    Source:  REFACTOR7, with the sign of descent (docs/spec/votes.md)
    """
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.integer("step_size", step_size, 1, ACCUM_MAX)
    finite = grad_NK.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite, torch.sign(grad_NK) * step_size, 0.0).to(torch.int8)


@op
def step_from_loss(loss: float, loss_ref: float, max_step: int) -> int:
    """Return the loss-scaled integer step of the sign rule.

    Math:    s = clamp(ceil(max_step * loss / loss_ref), 1, max_step); loss_ref = ln(vocabulary size)
    Rounding: float64, the product first, then the quotient; an overflow gives max_step
    Range:   loss finite and >= 0, loss_ref finite and > 0, both in nats; max_step in 1 .. 127
    Raises:  TypeError or ValueError for a number outside of its range
    Laws:    never decreases with the loss
    Source:  REFACTOR7 (`_t_accum_step`), which gives no formula
    """
    checks.number("loss", loss, 0.0, math.inf)
    checks.number("loss_ref", loss_ref, 0.0, math.inf, open_low=True)
    checks.integer("max_step", max_step, 1, ACCUM_MAX)
    return min(max(math.ceil(min(max_step * loss / loss_ref, max_step)), 1), max_step)
