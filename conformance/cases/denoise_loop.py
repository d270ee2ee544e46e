"""Calls to compare of the whole denoise loop, and the same loop on numbers of which every value is known.

Legend: B samples, L numbers of a latent, P tokens, D width, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference.constants import DEFAULT_EPS, groups_per_row
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.cases.case import Case

LEVELS = (-4, 1)
"""Exponents of the weights: a chain of products must not leave float32."""

MARGIN = 1e-3
"""How far from the threshold the halting of a drawn call stays: at the threshold itself a rounding decides."""

EPS = torch.finfo(torch.float32).eps


def magnitude_of_loop(op: Callable[..., Any], case: Case) -> Tensor:
    """Return the sum of absolute terms of the last sum that makes each number, and what earlier roundings may have left in it.

    Each value is carried with what the sums before it may have cost it, in ulps of the accumulator: terms of one sum
    count by their absolute values, errors of several summands, which are independent, by the root of their squares.
    """
    return walk(case)[1]


def walk(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, what roundings may have cost them, and the least distance of any halting from the threshold."""
    latent, tokens, *weights = case.args
    w_in, w_query, w_steps, w_out = (dequantize(weight, dtype=torch.float64) for weight in weights)
    latent, tokens = latent.to(torch.float64), tokens.to(torch.float64)
    threshold, alphas = case.kwargs.get("halt_threshold"), case.kwargs["alphas"]
    cost = torch.zeros_like(latent)
    total, total_cost, total_p = (
        torch.zeros_like(latent),
        torch.zeros_like(latent),
        torch.zeros(len(latent), 1),
    )
    halted, distance = torch.zeros(len(latent), 1, dtype=torch.bool), torch.tensor(torch.inf)
    root = w_in.shape[0] ** 0.5
    for step, alpha in enumerate(alphas):
        x, x_cost = latent @ w_in.T, latent.abs() @ w_in.abs().T + carried(cost, w_in)
        rms = (x.square().mean(dim=1, keepdim=True) + DEFAULT_EPS).sqrt()
        n = x / rms
        n_cost = (
            n.abs() + x_cost / rms + n.abs() * (n * x_cost).square().mean(dim=1, keepdim=True).sqrt() / rms
        )
        q = n @ w_query.T + w_steps[step]
        q_cost = n.abs() @ w_query.abs().T + w_steps[step].abs() + carried(n_cost, w_query)
        scores = torch.einsum("bd,bpd->bp", q, tokens) / root
        score_cost = (
            torch.einsum("bd,bpd->bp", q.abs(), tokens.abs())
            + torch.einsum("bd,bpd->bp", q_cost.square(), tokens.square()).sqrt()
        ) / root
        share = scores.softmax(dim=1)
        share_cost = share * (1 + score_cost + (share * score_cost).sum(dim=1, keepdim=True))
        c = torch.einsum("bp,bpd->bd", share, tokens)
        c_cost = torch.einsum("bp,bpd->bd", share, tokens.abs())
        c_cost = c_cost + torch.einsum("bp,bpd->bd", share_cost.square(), tokens.square()).sqrt()
        u, u_cost = n + c, n.abs() + c.abs() + n_cost + c_cost
        m = u * u.sigmoid()
        m_cost = m.abs() + 1.1 * u_cost  # 1.1 bounds the slope of silu
        pred, pred_cost = m @ w_out.T, m.abs() @ w_out.abs().T + carried(m_cost, w_out)
        kept = (latent.abs() + (1 - alpha) * pred.abs() + cost + (1 - alpha) * pred_cost) / alpha**0.5
        latent, cost = (latent - (1 - alpha) * pred) / alpha**0.5, kept
        if threshold is not None:
            signal, noise = (v.square().mean(dim=1, keepdim=True) for v in (latent, pred))
            p = (signal + DEFAULT_EPS) / (signal + noise + DEFAULT_EPS)
            near = (total_p + p - threshold).abs()
            if step + 1 < len(alphas):
                distance = torch.cat([distance.reshape(-1), near[~halted]]).amin()
            last = (total_p + p >= threshold) | (step + 1 == len(alphas))
            mine = torch.where(halted, 0.0, torch.where(last, 1 - total_p, p))
            total, total_cost = total + mine * latent, total_cost + mine * (latent.abs() + cost)
            # p's own error moves share from one latent to the next
            loose = (latent * cost).square().mean(dim=1, keepdim=True).sqrt() / (signal + noise + DEFAULT_EPS)
            total_cost = total_cost + torch.where(halted, 0.0, 1 + loose) * latent.abs()
            halted, total_p = halted | last, torch.where(halted, total_p, total_p + p)
    return (latent, cost, distance) if threshold is None else (total, total_cost, distance)


def carried(cost: Tensor, weight: Tensor) -> Tensor:
    """Return what independent errors of the inputs of a linear come to in its outputs."""
    return (cost.square() @ weight.square().T).sqrt()


@st.composite
def loop_weights(draw: st.DrawFn, size: int, width: int, rows: int) -> tuple[TernaryWeight, ...]:
    """Draw latent_in, query, step_rows and latent_out from a seed: drawing four weights element by element is dear."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    group_size, weights = draw(ss.GROUPS, label="G"), []
    for shape in ((width, size), (width, width), (rows, width), (size, width)):
        groups = (shape[0], groups_per_row(shape[1], group_size))
        trits = torch.randint(-1, 2, shape, generator=rng, dtype=torch.int8)
        exponents = torch.randint(LEVELS[0], LEVELS[1] + 1, groups, generator=rng, dtype=torch.int8)
        weights.append(weight_of_trits(trits, exponents, group_size))
    return tuple(weights)


@st.composite
def denoise_loop(draw: st.DrawFn) -> Case:
    """Draw a loop on real numbers, in either form, that does not halt within MARGIN of its threshold."""
    samples = draw(st.sampled_from((1, 2, 5, 0)), label="B")
    size, width = draw(st.sampled_from((1, 5, 12, 33, 70))), draw(st.sampled_from((1, 3, 12, 31, 66)))
    count, steps = draw(st.sampled_from((1, 2, 7, 35))), draw(st.integers(1, 3), label="T")
    dtype = draw(ss.DTYPES)
    latent = draw(ss.activations((samples, size), dtype, exact=False, kinds=("normal", "constant")))
    loud = torch.randint(-3, 4, (samples, 1), generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    latent = (
        latent * loud.to(dtype).exp2()
    )  # samples of their own signal-to-noise ratio halt at steps of their own
    tokens = draw(ss.activations((samples, count, width), dtype, exact=False, kinds=("normal", "constant")))
    weights = draw(loop_weights(size, width, steps + draw(st.integers(0, 1), label="unused rows")))
    alphas = tuple(draw(st.sampled_from((1.0, 0.9, 0.5, 0.1))) for _ in range(steps))
    threshold = draw(st.sampled_from((None, 0.99, 0.5)), label="threshold")
    case = Case((latent, tokens, *weights), {"alphas": alphas, "halt_threshold": threshold})
    assume(walk(case)[2] > MARGIN)
    return case


CASES: dict[str, SearchStrategy[Case]] = {"denoise_loop": denoise_loop()}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {"denoise_loop": magnitude_of_loop}
"""Sums of absolute terms of the ops that subtract."""
