"""Votes. See `arbitor.reference.ops.votes`."""

from __future__ import annotations

import math

from torch import Tensor

from arbitor.optimized.kernels import votes
from arbitor.optimized.kernels.launch import Clock, row_ids, vote_rate
from arbitor.optimized.ops.op import op
from arbitor.reference import checks
from arbitor.reference.constants import ACCUM_MAX, DEFAULT_GROUP_SIZE, groups_per_row

__all__ = ["row_exponents", "sign_votes", "step_from_loss", "stochastic_votes"]


@op()
def row_exponents(grad_NK: Tensor) -> Tensor:
    """See reference."""
    checks.gradient_matrix("grad_NK", grad_NK)
    return votes.exponents_of_rows(grad_NK)


@op()
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
    """See reference."""
    checks.gradient_matrix("grad_NK", grad_NK)
    vote_rate(rate, grad_NK.device)
    checks.group_size(group_size)
    clock = Clock.of(seed, step, tensor_id, grad_NK.device)
    checks.rows_of(rows, grad_NK)
    row_ids(rows, 2**32 // groups_per_row(grad_NK.shape[1], group_size), grad_NK.device)
    return votes.votes_of_gradient(grad_NK, rate, group_size, clock, rows)


@op()
def sign_votes(grad_NK: Tensor, step_size: int) -> Tensor:
    """See reference."""
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.integer("step_size", step_size, 1, ACCUM_MAX)
    return votes.votes_of_sign(grad_NK, step_size)


@op()
def step_from_loss(loss: float, loss_ref: float, max_step: int) -> int:
    """See reference. The host computes it, because the loss is a number by then."""
    checks.number("loss", loss, 0.0, math.inf)
    checks.number("loss_ref", loss_ref, 0.0, math.inf, open_low=True)
    checks.integer("max_step", max_step, 1, ACCUM_MAX)
    return max(1, -math.floor(-min(max_step * loss / loss_ref, max_step)))
