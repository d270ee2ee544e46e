"""Experts: the choice of experts for a vector, a linear whose slots each use the matrix of an expert, and the load of each expert.

Legend: E experts (`num_groups`), N outputs of an expert, K inputs, M slots (rows of activations), in one
dimension or several.
The matrices of all experts are one stacked weight of E N rows: expert e owns rows e N .. e N + N - 1.
Products and sums run in float32, or float64 for float64 inputs, and are rounded once to the dtype that comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    HANDICAP_MAX,
    HANDICAP_MOVE,
    HANDICAP_STEPS,
    QUERY_STEPS,
    ROUTER_OCTAVES,
)
from arbitor.reference.dtypes import sum_dtype, wide_dtype, widened
from arbitor.reference.ops.codebook import whole_sixteenths
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = [
    "balance_experts",
    "choose_experts",
    "expert_load",
    "grouped_linear",
    "grouped_linear_input_grad",
    "grouped_linear_weight_grad",
    "weigh_ranks",
    "weigh_ranks_grads",
]


@op
def grouped_linear(x_MK: Tensor, weight: TernaryWeight, experts_M: Tensor, *, num_groups: int) -> Tensor:
    """Return each slot times the transposed matrix of its expert.

    Math:    y[m, n] = sum_k x[m, k] * W[experts[m] * N + n, k]; zero where experts[m] = -1
    Shapes:  x float32, bfloat16 or float64 [M, K], weight [E N, K], experts int64 [M] in -1 .. E - 1; M may be
             several dimensions, and 0
    Returns: dtype of x, [M, N]
    Raises:  TypeError or ValueError for a dtype, shape, device or expert that is not allowed
    Laws:    a slot gives what `linear` gives with its expert's rows; slots are independent and may come in any order
    Source:  docs/spec/experts.md; REFACTOR12 (grouped dispatch)
    """
    num_rows = checks.expert_rows(weight, num_groups)
    checks.expert_matrix("x_MK", x_MK)
    checks.last_dim("x_MK", x_MK, weight.shape[1])
    checks.expert_slots(experts_M, x_MK.shape[:-1], weight=weight.packed, x_MK=x_MK)
    checks.values_between("experts_M", experts_M, -1, num_groups - 1)
    wide = wide_dtype(x_MK)
    y_MN = torch.zeros(*x_MK.shape[:-1], num_rows, dtype=x_MK.dtype, device=x_MK.device)
    for expert in _used(experts_M):
        slots = experts_M == expert
        y_MN[slots] = (x_MK[slots].to(wide) @ _matrix(weight, expert, num_rows, wide).T).to(x_MK.dtype)
    return y_MN


@op
def grouped_linear_input_grad(
    grad_MN: Tensor, weight: TernaryWeight, experts_M: Tensor, *, num_groups: int
) -> Tensor:
    """Return the gradient of the loss with respect to the input of `grouped_linear`.

    Math:    dx[m, k] = sum_n dy[m, n] * W[experts[m] * N + n, k]; zero where experts[m] = -1
    Shapes:  grad float32, bfloat16 or float64 [M, N], weight [E N, K], experts int64 [M] in -1 .. E - 1; M may be 0
    Returns: dtype of grad, [M, K]
    Raises:  TypeError or ValueError for a dtype, shape, device or expert that is not allowed
    Laws:    the adjoint of `grouped_linear`: <dy, grouped_linear(x)> = <grouped_linear_input_grad(dy), x>
    Source:  docs/spec/experts.md
    """
    num_rows = checks.expert_rows(weight, num_groups)
    checks.expert_matrix("grad_MN", grad_MN)
    checks.last_dim("grad_MN", grad_MN, num_rows)
    checks.expert_slots(experts_M, grad_MN.shape[:-1], weight=weight.packed, grad_MN=grad_MN)
    checks.values_between("experts_M", experts_M, -1, num_groups - 1)
    wide = wide_dtype(grad_MN)
    dx_MK = torch.zeros(*grad_MN.shape[:-1], weight.shape[1], dtype=grad_MN.dtype, device=grad_MN.device)
    for expert in _used(experts_M):
        slots = experts_M == expert
        dx_MK[slots] = (grad_MN[slots].to(wide) @ _matrix(weight, expert, num_rows, wide)).to(grad_MN.dtype)
    return dx_MK


@op
def grouped_linear_weight_grad(
    grad_MN: Tensor,
    x_MK: Tensor,
    experts_M: Tensor,
    *,
    num_groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the gradient of the loss with respect to the stacked weight of `grouped_linear`.

    Math:    dW[e N + n, k] = sum over slots m with experts[m] = e of dy[m, n] * x[m, k]
    Shapes:  grad [M, N] and x [M, K] of one dtype, float32, bfloat16 or float64, experts int64 [M] in -1 .. E - 1
    Returns: `dtype`, float32 or bfloat16, to which each sum is rounded once (float64 for float64 inputs), [E N, K]; zeros, which
             cast no votes, for an expert that no slot uses
    Raises:  TypeError or ValueError for a dtype, shape, device or expert that is not allowed
    Laws:    adjoint to `grouped_linear`: <grouped_linear_weight_grad(dy, x), W> = <dy, grouped_linear(x)>
    Source:  docs/spec/experts.md
    """
    checks.integer("num_groups", num_groups, 1, 2**31 - 1)
    checks.expert_pair(grad_MN, x_MK)
    checks.expert_slots(experts_M, grad_MN.shape[:-1], grad_MN=grad_MN, x_MK=x_MK)
    checks.float_dtype("dtype", dtype, checks.GRADIENT_DTYPES)
    checks.values_between("experts_M", experts_M, -1, num_groups - 1)
    wide = wide_dtype(grad_MN)
    shape = (num_groups, grad_MN.shape[-1], x_MK.shape[-1])
    grads_ENK = torch.zeros(shape, dtype=wide, device=grad_MN.device)
    for expert in _used(experts_M):
        slots = experts_M == expert
        grads_ENK[expert] = grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)
    return grads_ENK.flatten(0, 1).to(sum_dtype(grad_MN, dtype))


@op
def weigh_ranks(ranks: Tensor, logits: Tensor, experts: Tensor, *, chosen_only: bool = False) -> Tensor:
    """Return the ranks of the chosen experts times their shares, and zeros for all other experts.

    Math:    y[e, j] = p[e] * ranks[e, j] for the chosen e, with p a softmax of the logits over the chosen experts, or for a
             single one over all experts; y[e, j] = 0 for the others
    Shapes:  ranks [..., E r], logits [..., E], both of one dtype, float32, bfloat16 or float64; experts int64 [..., k],
             different ones of 0 .. E - 1, k of 1 or more. With `chosen_only` the ranks are [..., k r], those of the chosen
             experts in their order
    Returns: dtype and shape of ranks
    Raises:  TypeError or ValueError for a dtype, shape, device or expert that is not allowed
    Laws:    linear in the ranks; what the ranks of an expert hold that was not chosen does not matter; shares add up to 1 for
             k above 1
    Source:  docs/spec/experts.md
    """
    checks.weighed_ranks(ranks, logits, experts, chosen_only)
    checks.values_between("experts", experts, 0, logits.shape[-1] - 1)
    checks.different("experts", experts)
    is_chosen, shares_E = _shares(logits, experts)
    if chosen_only:
        shares_k = shares_E.gather(-1, experts)
        return (
            (widened(ranks).unflatten(-1, (experts.shape[-1], -1)) * shares_k[..., None])
            .flatten(-2)
            .to(ranks.dtype)
        )
    weighed = widened(ranks).unflatten(-1, (logits.shape[-1], -1)) * shares_E[..., None]
    return torch.where(is_chosen[..., None], weighed, 0.0).flatten(-2).to(ranks.dtype)


@op
def weigh_ranks_grads(
    grad: Tensor, ranks: Tensor, logits: Tensor, experts: Tensor, *, chosen_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the loss with respect to the ranks and the logits of `weigh_ranks`.

    Math:    d ranks[e, j] = p[e] dy[e, j] for the chosen e, else 0; q[e] = sum_j dy[e, j] ranks[e, j] for the chosen e, else 0
             d logits[e] = p[e] (q[e] - sum_c p[c] q[c]) for every e that the softmax runs over, else 0
    Shapes:  as for `weigh_ranks`, and grad like ranks
    Returns: two tensors of the dtype of ranks, with the shapes of ranks and of logits
    Raises:  TypeError or ValueError for a dtype, shape, device or expert that is not allowed
    Laws:    the gradients of `weigh_ranks` by autograd
    Source:  docs/spec/experts.md
    """
    checks.weighed_ranks(ranks, logits, experts, chosen_only)
    checks.values_between("experts", experts, 0, logits.shape[-1] - 1)
    checks.different("experts", experts)
    checks.same_dtype("grad", grad, "ranks", ranks)
    checks.same_shape("grad", grad, "ranks", ranks)
    checks.same_device(ranks=ranks, grad=grad)
    is_chosen, shares_E = _shares(logits, experts)
    if chosen_only:
        matrix = (experts.shape[-1], -1)
        dy = widened(grad).unflatten(-1, matrix)
        grad_ranks = shares_E.gather(-1, experts)[..., None] * dy
        of_shares_k = (dy * widened(ranks).unflatten(-1, matrix)).sum(dim=-1)
        of_shares_E = torch.zeros_like(shares_E).scatter(-1, experts, of_shares_k)
    else:
        matrix = (logits.shape[-1], -1)
        is_rank = is_chosen[..., None]
        dy = torch.where(is_rank, widened(grad).unflatten(-1, matrix), 0.0)
        grad_ranks = shares_E[..., None] * dy
        of_shares_E = (dy * torch.where(is_rank, widened(ranks).unflatten(-1, matrix), 0.0)).sum(dim=-1)
    mean = (shares_E * of_shares_E).sum(dim=-1, keepdim=True)
    grad_logits = shares_E * (of_shares_E - mean)
    return grad_ranks.flatten(-2).to(ranks.dtype), grad_logits.to(ranks.dtype)


def _shares(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return which experts are chosen, bool [..., E], and the shares of those that the softmax runs over, 0 for the others."""
    is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, experts, True)
    over = is_chosen if experts.shape[-1] > 1 else torch.ones_like(is_chosen)
    return is_chosen, widened(logits).masked_fill(~over, -torch.inf).softmax(dim=-1)


@op
def choose_experts(
    x: Tensor, weight: TernaryWeight, *, top_k: int, handicap_E: Tensor | None = None
) -> Tensor:
    """Return the experts whose rows of a router's weight fit each vector best, after what a handicap takes from each expert.

    Math:    x_q = rint(clamp(16 x, -127, 127)), NaN -> 0
             level' = max(level, largest level of the weight - 16 * 2**b), a level being E * 2**b + m
             score_e = sum_k x_q[k] T[e, k] S' - handicap_e / 4, S' the scale of level'; the k experts of the largest scores
    Shapes:  x float32, bfloat16 or float64 [..., K]; weight [E, K], one row an expert, K up to 2**27; top_k k in 1 .. E;
             handicap int16 [E], in steps of 2**-6 of a logit, which is 16 units of a score; None for zeros
    Returns: int64 [..., k], in 0 .. E - 1, ascending
    Ties:    the lowest expert
    Raises:  TypeError or ValueError for a dtype, shape, device or top_k that is not allowed
    Laws:    exact: every sum over k fits float64 in any order, and the handicap is taken off in one addition of float64;
             experts with equal rows and handicaps tie on every device; vectors are independent; equal handicaps change
             nothing; a NaN counts as 0 and an infinity as 127 sixteenths of its sign
    Source:  docs/spec/experts.md
    """
    checks.router(x, weight, top_k, handicap_E, weight.packed)
    x_MK = whole_sixteenths(x).to(torch.float64).reshape(-1, weight.shape[1])
    scores_ME = x_MK @ router_rows(weight).T
    if handicap_E is not None:
        scores_ME = scores_ME - handicap_E.to(torch.float64) * (QUERY_STEPS / HANDICAP_STEPS)
    order_ME = scores_ME.sort(dim=-1, descending=True, stable=True).indices
    return order_ME[:, :top_k].sort(dim=-1).values.reshape(*x.shape[:-1], top_k)


def router_rows(weight: TernaryWeight) -> Tensor:
    """Return the rows of a router's weight as the choice of experts sees them, float64 [E, K]."""
    levels = weight.exponents.to(torch.int32)
    seen = torch.maximum(levels, levels.amax() - (ROUTER_OCTAVES << weight.mantissa_bits))
    return dequantize(weight.with_tensors(exponents=seen.to(torch.int8)), dtype=torch.float64)


@op
def balance_experts(
    chosen: Tensor, load_E: Tensor, handicap_E: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the load and the handicaps of experts after some choices.

    Math:    n choices, n_e of them of expert e; load[e] <- load[e] + n_e
             h[e] <- h[e] + min(trunc(16 (E n_e - n) / n), 16); then h[e] <- min(h[e] - the least h, 32767). Without a choice
             nothing changes
    Shapes:  chosen int64 [...] in -1 .. E - 1, of which -1 is no choice; load int64 [E]; handicap int16 [E]
    Returns: new tensors; or `out` (may be the tables themselves), overwritten
    Raises:  TypeError or ValueError for a dtype, shape, device or expert that is not allowed
    Laws:    the order of the choices does not matter; an expert with just its share moves by 0 before the least is taken off
    Source:  docs/spec/experts.md
    """
    checks.balance(chosen, load_E, handicap_E, out)
    num_experts = load_E.numel()
    checks.values_between("chosen", chosen, -1, num_experts - 1)
    count_E = expert_load(chosen, num_groups=num_experts)
    total = count_E.sum()
    surplus_E = HANDICAP_MOVE * (num_experts * count_E - total)
    moves_E = torch.div(surplus_E, total.clamp(min=1), rounding_mode="trunc").clamp(max=HANDICAP_MOVE)
    moved_E = handicap_E + moves_E
    # What all experts have in common changes no choice, and would grow without a bound.
    evened_E = (moved_E - moved_E.amin()).clamp(max=HANDICAP_MAX).to(torch.int16)
    made = (load_E + count_E, torch.where(total > 0, evened_E, handicap_E))
    if out is None:
        return made
    for target, value in zip(out, made, strict=True):
        target.copy_(value)
    return out


@op
def expert_load(experts: Tensor, *, num_groups: int) -> Tensor:
    """Return how many slots use each expert.

    Math:    load[e] = number of slots with experts[...] = e; slots of -1 are not counted
    Shapes:  experts int64 [...], each in -1 .. E - 1
    Returns: int64 [E]
    Raises:  TypeError or ValueError for a dtype or expert that is not allowed
    Laws:    the order of the slots does not matter; the loads add up to the slots that are used
    Source:  docs/spec/experts.md
    """
    checks.integer("num_groups", num_groups, 1, 2**31 - 1)
    checks.dtype_in("experts", experts, (torch.int64,))
    checks.values_between("experts", experts, -1, num_groups - 1)
    return torch.bincount(experts.flatten() + 1, minlength=num_groups + 1)[1:]


def _used(experts_M: Tensor) -> list[int]:
    """Return the experts that at least one slot uses."""
    return [expert for expert in experts_M.unique().tolist() if expert >= 0]


def _matrix(weight: TernaryWeight, expert: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of one expert as floats."""
    rows = torch.arange(expert * num_rows, (expert + 1) * num_rows, device=weight.device)
    return dequantize(weight, dtype=dtype, rows=rows)
