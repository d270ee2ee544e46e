"""Kernels of the ranks of all experts: those of chosen experts times their shares, and the gradients. Arithmetic in float32.

Legend: M positions, E experts, R ranks of an expert, k chosen experts of a position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import exp_of_negative, narrow, widen
from arbitor.optimized.kernels.launch import row_grid, runs_here

TILE = 4096
"""Ranks of a tile, at most, unless one rank of every expert is more."""

SLOTS_TILE = 128
"""Ranks, or shares of experts, of a tile of chosen slots, at most, unless one position has more. An H200 took 2.1 us for one
position of `small` and 5.6 for 16,384, where tiles of 4,096 took 8.6 and 9.9."""


@triton.jit
def shares_of(
    logits_ptr, experts_ptr, num_positions, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return what a program begins with.

    Positions are int64 [BLOCK_M], with whether each of them exists. [BLOCK_M, BLOCK_E] are int32 1 where an expert is chosen, and
    float32 shares, 0 where the softmax does not run.
    """
    positions = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = positions < num_positions
    experts = tl.arange(0, BLOCK_E)[None, :]
    is_chosen = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.int32)
    for place in range(CHOSEN):
        expert = tl.load(experts_ptr + positions * CHOSEN + place, mask=inside, other=-1)
        is_chosen += (experts == expert[:, None]).to(tl.int32)
    mask = inside[:, None] & (experts < EXPERTS)
    logits = widen(tl.load(logits_ptr + positions[:, None] * EXPERTS + experts, mask=mask, other=0.0))
    if CHOSEN > 1:
        over = is_chosen > 0
    else:
        over = mask
    logits = tl.where(over, logits, float("-inf"))
    # A position that is none has no logit at all.
    largest = tl.where(inside, tl.max(logits, axis=1), 0.0)
    powers = exp_of_negative(logits - largest[:, None])
    sums = tl.where(inside, tl.sum(powers, axis=1), 1.0)
    return positions, inside, is_chosen, tl.div_rn(powers, sums[:, None] + tl.zeros_like(powers))


@triton.jit
def store_grad_of_logits(
    grad_logits_ptr, positions, inside, shares, of_shares, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Store the gradients of logits, from shares and their gradients, both [BLOCK_M, BLOCK_E]."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    mean = tl.sum(shares * of_shares, axis=1)
    tl.store(
        grad_logits_ptr + positions[:, None] * EXPERTS + experts,
        narrow(shares * (of_shares - mean[:, None]), grad_logits_ptr.dtype.element_ty),
        mask=inside[:, None] & (experts < EXPERTS),
    )


@triton.jit(do_not_specialize=["num_positions"])
def _weigh_ranks_kernel(
    ranks_ptr, logits_ptr, experts_ptr, out_ptr, num_positions,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    positions, inside, is_chosen, shares = shares_of(
        logits_ptr, experts_ptr, num_positions, EXPERTS, CHOSEN, BLOCK_M, BLOCK_E
    )
    experts = tl.arange(0, BLOCK_E)[None, :, None]
    rows = positions[:, None, None] * (EXPERTS * RANKS) + experts * RANKS
    for start in range(0, RANKS, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)[None, None, :]
        mask = inside[:, None, None] & (experts < EXPERTS) & (ranks < RANKS)
        read = mask & (is_chosen > 0)[:, :, None]
        weighed = widen(tl.load(ranks_ptr + rows + ranks, mask=read, other=0.0)) * shares[:, :, None]
        weighed = tl.where(read, weighed, 0.0)
        tl.store(out_ptr + rows + ranks, narrow(weighed, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_positions"])
def _weigh_ranks_grads_kernel(
    grad_ptr, ranks_ptr, logits_ptr, experts_ptr, grad_ranks_ptr, grad_logits_ptr, num_positions,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    positions, inside, is_chosen, shares = shares_of(
        logits_ptr, experts_ptr, num_positions, EXPERTS, CHOSEN, BLOCK_M, BLOCK_E
    )
    of_shares = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    experts = tl.arange(0, BLOCK_E)[None, :, None]
    rows = positions[:, None, None] * (EXPERTS * RANKS) + experts * RANKS
    for start in range(0, RANKS, BLOCK_R):
        columns = start + tl.arange(0, BLOCK_R)[None, None, :]
        mask = inside[:, None, None] & (experts < EXPERTS) & (columns < RANKS)
        read = mask & (is_chosen > 0)[:, :, None]
        grad = widen(tl.load(grad_ptr + rows + columns, mask=read, other=0.0))
        ranks = widen(tl.load(ranks_ptr + rows + columns, mask=read, other=0.0))
        of_shares += tl.sum(grad * ranks, axis=2)
        # An expert that is not chosen may have a share that is not finite.
        grad_ranks = tl.where(read, shares[:, :, None] * grad, 0.0)
        tl.store(
            grad_ranks_ptr + rows + columns, narrow(grad_ranks, grad_ranks_ptr.dtype.element_ty), mask=mask
        )
    store_grad_of_logits(grad_logits_ptr, positions, inside, shares, of_shares, EXPERTS, BLOCK_E)


@triton.jit(do_not_specialize=["num_positions"])
def _weigh_slots_kernel(
    ranks_ptr, logits_ptr, experts_ptr, out_ptr, num_positions,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    positions, inside, _, shares = shares_of(
        logits_ptr, experts_ptr, num_positions, EXPERTS, CHOSEN, BLOCK_M, BLOCK_E
    )
    experts = tl.arange(0, BLOCK_E)[None, :]
    for place in range(CHOSEN):
        slots = positions * CHOSEN + place
        expert = tl.load(experts_ptr + slots, mask=inside, other=-1)
        share = tl.sum(tl.where(experts == expert[:, None], shares, 0.0), axis=1)
        for start in range(0, RANKS, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)[None, :]
            mask = inside[:, None] & (ranks < RANKS)
            places = slots[:, None] * RANKS + ranks
            weighed = widen(tl.load(ranks_ptr + places, mask=mask, other=0.0)) * share[:, None]
            tl.store(out_ptr + places, narrow(weighed, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_positions"])
def _weigh_slots_grads_kernel(
    grad_ptr, ranks_ptr, logits_ptr, experts_ptr, grad_ranks_ptr, grad_logits_ptr, num_positions,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    positions, inside, _, shares = shares_of(
        logits_ptr, experts_ptr, num_positions, EXPERTS, CHOSEN, BLOCK_M, BLOCK_E
    )
    of_shares = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    experts = tl.arange(0, BLOCK_E)[None, :]
    for place in range(CHOSEN):
        slots = positions * CHOSEN + place
        is_expert = experts == tl.load(experts_ptr + slots, mask=inside, other=-1)[:, None]
        share = tl.sum(tl.where(is_expert, shares, 0.0), axis=1)
        of_share = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in range(0, RANKS, BLOCK_R):
            columns = start + tl.arange(0, BLOCK_R)[None, :]
            mask = inside[:, None] & (columns < RANKS)
            places = slots[:, None] * RANKS + columns
            grad = widen(tl.load(grad_ptr + places, mask=mask, other=0.0))
            ranks = widen(tl.load(ranks_ptr + places, mask=mask, other=0.0))
            of_share += tl.sum(grad * ranks, axis=1)
            grad_ranks = share[:, None] * grad
            tl.store(grad_ranks_ptr + places, narrow(grad_ranks, grad_ranks_ptr.dtype.element_ty), mask=mask)
        of_shares += tl.where(is_expert, of_share[:, None], 0.0)
    store_grad_of_logits(grad_logits_ptr, positions, inside, shares, of_shares, EXPERTS, BLOCK_E)


def weighed(ranks: Tensor, logits: Tensor, experts: Tensor, chosen_only: bool) -> Tensor:
    """Launch `weigh_ranks`."""
    runs_here(ranks)
    out = torch.empty(ranks.shape, dtype=ranks.dtype, device=ranks.device)
    kernel = _weigh_slots_kernel if chosen_only else _weigh_ranks_kernel
    _launch(kernel, (ranks, logits, experts), (out,), chosen_only)
    return out


def weighed_grads(
    grad: Tensor, ranks: Tensor, logits: Tensor, experts: Tensor, chosen_only: bool
) -> tuple[Tensor, Tensor]:
    """Launch `weigh_ranks_grads`."""
    runs_here(ranks)
    made = [torch.empty(each.shape, dtype=ranks.dtype, device=ranks.device) for each in (ranks, logits)]
    kernel = _weigh_slots_grads_kernel if chosen_only else _weigh_ranks_grads_kernel
    _launch(kernel, (grad, ranks, logits, experts), tuple(made), chosen_only)
    return made[0], made[1]


def _launch(
    kernel: triton.JITFunction, given: tuple[Tensor, ...], made: tuple[Tensor, ...], chosen_only: bool
) -> None:
    """Launch a kernel with a program for each tile of positions. The first of `made` has the shape of the ranks.

    given: the last two are the logits and the chosen experts.
    """
    num_experts, num_chosen = given[-2].shape[-1], given[-1].shape[-1]
    num_columns = made[0].shape[-1]
    num_positions = made[0].numel() // num_columns
    num_ranks = num_columns // (num_chosen if chosen_only else num_experts)
    if num_positions == 0:
        return
    block_e = triton.next_power_of_2(num_experts)
    if chosen_only:
        block_r = min(triton.next_power_of_2(num_ranks), TILE)
        block_m = max(1, SLOTS_TILE // max(block_e, block_r))
    else:
        block_r = min(triton.next_power_of_2(num_ranks), max(1, TILE // block_e))
        block_m = max(1, TILE // (block_e * block_r))
    kernel[row_grid(1, triton.cdiv(num_positions, block_m))](
        *(each.contiguous() for each in given), *made, num_positions,
        EXPERTS=num_experts, RANKS=num_ranks, CHOSEN=num_chosen, BLOCK_M=block_m, BLOCK_E=block_e, BLOCK_R=block_r,
    )  # fmt: skip
