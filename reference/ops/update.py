"""Update: votes are counted in small integers, and a full count moves a trit or an exponent by one level.

Order of a training step: votes are counted, once or for each micro-batch; then one step moves the exponents, then the trits.
Legend: N rows, K columns, G columns a group, KG groups a row, R selected rows, v votes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    ACCUM_MAX,
    DEFAULT_THETA,
    DEFAULT_THETA_E,
    EXPONENT_MIN,
    EXPONENT_RULES,
    NUM_EXPONENTS,
    ON_FLIP,
    SCORE_SHIFT,
    level_range,
)
from arbitor.reference.ops.dither import dither_bytes
from arbitor.reference.ops.packing import pack_trits, trits_of, unpack_trits
from arbitor.reference.ops.votes import stochastic_votes
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = [
    "accumulate",
    "accumulate_gradient",
    "accumulate_gradients",
    "apply_step",
    "apply_steps",
    "count_changed_trits",
    "count_nonfinite_rows",
    "count_state",
]


@op
def accumulate(
    weight: TernaryWeight,
    votes_NK: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    exponent_rule: str = "score",
    rows: Tensor | None = None,
    first_row: int = 0,
    out: TernaryWeight | None = None,
) -> TernaryWeight:
    """Return the weight with votes counted; no trit and no exponent moves yet.

    Math:    T_accum <- sat(T_accum + v); score = sum of v * T over the group, with T as it is before any flip
             `score`: E_accum <- sat(E_accum + ((score + (b_E >> 3)) >> 5)), b_E the group's exponent dither byte
             `sign`: E_accum <- sat(E_accum + sign(score)); `frozen`: E_accum stays
    Shapes:  votes_NK int8 [N, K], or [R, K] for the unique rows int64 [R] (-1: unused slot)
    Range:   votes -127 .. 127; seed, step and tensor_id as `stochastic_votes`;
             first_row 0 or more: the weight is rows first_row, first_row + 1, .. of a table, and its dither is that of these rows
    Returns: a new weight; or `out` (may be `weight` itself), overwritten. Rows not named keep every byte
    Overflow: saturates at plus and minus 127; |score| <= 96 * 127 fits 16 bits
    Raises:  TypeError or ValueError for a dtype, shape, device, rule, row or dither coordinate that is not allowed
    Laws:    votes of 0 change nothing; packed and exponents keep every byte; a part of a table counts as in the table
    Source:  docs/spec/update.md; REFACTOR7, REFACTOR12 (residual E_accum)
    """
    checks.row_ids(rows, weight.device)
    checks.row_values(rows, weight.shape[0])
    checks.out_weight(out, weight)
    checks.gradient_of(weight, "votes_NK", votes_NK, rows, (torch.int8,))
    checks.values_between("votes_NK", votes_NK, -ACCUM_MAX, ACCUM_MAX)
    checks.one_of("exponent_rule", exponent_rule, EXPONENT_RULES)
    checks.vote_clock(seed, step, tensor_id)
    checks.first_row(first_row, weight)
    rows, votes_NK = _used_rows(weight, rows, votes_NK)
    num_columns, groups = weight.shape[1], weight.exponents.shape[1]

    trit_accum = weight.trit_accum.clone()
    trit_accum[rows] = _saturate(trit_accum[rows].to(torch.int16) + votes_NK)

    exponent_accum = weight.exponent_accum.clone()
    if exponent_rule != "frozen":
        signed = votes_NK.to(torch.int32) * trits_of(weight)[rows]
        padded = torch.nn.functional.pad(signed, (0, groups * weight.group_size - num_columns))
        score = padded.reshape(-1, groups, weight.group_size).sum(dim=2)
        if exponent_rule == "score":
            group_ids = (first_row + rows[:, None]) * groups + torch.arange(groups, device=rows.device)
            dither = dither_bytes(
                group_ids, group_size=weight.group_size, seed=seed, step=step, tensor_id=tensor_id
            )
            exponent_dither = dither[..., weight.group_size].to(torch.int32) >> (8 - SCORE_SHIFT)
            exponent_vote = (score + exponent_dither) >> SCORE_SHIFT
        else:
            exponent_vote = torch.sign(score)
        exponent_accum[rows] = _saturate(exponent_accum[rows] + exponent_vote)
    return weight.with_tensors(trit_accum=trit_accum, exponent_accum=exponent_accum).into(out)


@op
def apply_step(
    weight: TernaryWeight,
    *,
    theta: int = DEFAULT_THETA,
    theta_e: int = DEFAULT_THETA_E,
    on_flip: str = "reset",
    rows: Tensor | None = None,
    out: TernaryWeight | None = None,
) -> TernaryWeight:
    """Return the weight after every full count has moved its exponent or trit by one level.

    Math:    E_accum >= theta_e: E <- E - 1, E_accum <- E_accum - theta_e; E_accum <= -theta_e: E + 1, E_accum + theta_e
             then T_accum >= theta: T <- max(T - 1, -1); T_accum <= -theta: T <- min(T + 1, 1); in both cases T_accum
             becomes 0 (`reset`) or loses theta towards 0 (`carry`). With b mantissa bits E is the level; it saturates to
             [-32 * 2**b, 16 * 2**b - 1], for b = 0 [-32, 15]
    Shapes:  rows int64 [R], unique (-1: unused slot): step these rows only
    Returns: a new weight; or `out` (may be `weight` itself), overwritten. Rows not named keep every byte
    Range:   theta and theta_e in 1 .. 127
    Raises:  TypeError or ValueError for a theta, on_flip, row, device or `out` that is not allowed
    Laws:    a second step changes nothing under `reset`, if theta_e >= 64 (a smaller one may leave a full count); a
             trit moves against its votes, by at most one level
    Source:  docs/spec/update.md
    """
    checks.threshold("theta", theta)
    checks.threshold("theta_e", theta_e)
    checks.one_of("on_flip", on_flip, ON_FLIP)
    checks.row_ids(rows, weight.device)
    checks.row_values(rows, weight.shape[0])
    checks.out_weight(out, weight)
    (rows,) = _used_rows(weight, rows)

    exponent_accum, exponents = weight.exponent_accum.clone(), weight.exponents.clone()
    count = exponent_accum[rows].to(torch.int16)
    full = (count >= theta_e).to(torch.int16) - (count <= -theta_e).to(torch.int16)
    low, high = level_range(weight.mantissa_bits)
    exponents[rows] = (exponents[rows].to(torch.int16) - full).clamp(low, high).to(torch.int8)
    exponent_accum[rows] = (count - full * theta_e).to(torch.int8)

    trit_accum, trits = weight.trit_accum.clone(), trits_of(weight)
    count = trit_accum[rows].to(torch.int16)
    full = (count >= theta).to(torch.int16) - (count <= -theta).to(torch.int16)
    trits[rows] = (trits[rows] - full).clamp(-1, 1).to(torch.int8)
    kept = torch.zeros_like(count) if on_flip == "reset" else count - full * theta
    trit_accum[rows] = torch.where(full != 0, kept, count).to(torch.int8)
    stepped = weight.with_tensors(
        packed=pack_trits(trits),
        exponents=exponents,
        trit_accum=trit_accum,
        exponent_accum=exponent_accum,
    )
    return stepped.into(out)


@op
def accumulate_gradient(
    weight: TernaryWeight,
    grad_NK: Tensor,
    rate: float | Tensor,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    exponent_rule: str = "score",
    rows: Tensor | None = None,
    first_row: int = 0,
    faults: Tensor | None = None,
    out: TernaryWeight | None = None,
) -> TernaryWeight:
    """Return the weight with the stochastic votes of a gradient counted, as a backward pass does.

    Math:    accumulate(weight, stochastic_votes(grad, rate)); the votes need never exist as a tensor
    Shapes:  grad_NK float32 or bfloat16 [N, K], or [R, K] for the unique rows int64 [R] (-1: unused slot);
             faults int64 []: the number of gradient rows that are not finite is added to it
    Range:   rate as `stochastic_votes`, first_row as `accumulate`
    Returns: a new weight; or `out` (may be `weight` itself), overwritten
    Raises:  as `stochastic_votes` and `accumulate`; a refused call writes neither `out` nor `faults`
    Laws:    equal to its two parts; sum of g * dW <= 0 in expectation after a step
    Source:  docs/spec/update.md
    """
    checks.row_ids(rows, weight.device)
    checks.row_values(rows, weight.shape[0])
    checks.gradient_of(weight, "grad_NK", grad_NK, rows, checks.GRADIENT_DTYPES)
    checks.fault_counter(faults, grad_NK)
    checks.first_row(first_row, weight)
    dithered = rows
    if first_row:
        local = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
        dithered = torch.where(local >= 0, first_row + local, -1)
    votes = stochastic_votes(
        grad_NK, rate, group_size=weight.group_size, seed=seed, step=step, tensor_id=tensor_id, rows=dithered
    )
    counted = accumulate(
        weight,
        votes,
        seed=seed,
        step=step,
        tensor_id=tensor_id,
        exponent_rule=exponent_rule,
        rows=rows,
        first_row=first_row,
        out=out,
    )
    if faults is not None:
        faults += count_nonfinite_rows(grad_NK)
    return counted


@op
def accumulate_gradients(
    weights: tuple[TernaryWeight, ...],
    grad_NK: Tensor,
    rate: float | Tensor,
    *,
    seed: int,
    step: int | Tensor,
    tensor_ids: tuple[int, ...],
    exponent_rule: str = "score",
    faults: Tensor | None = None,
    out: tuple[TernaryWeight, ...] | None = None,
) -> tuple[TernaryWeight, ...]:
    """Return several weights of one shape with the stochastic votes of their gradients counted.

    Math:    accumulate_gradient of each weight, with its rows of the gradient and its tensor id
    Shapes:  a tuple of W weights [N, K] of one format, at least one, and a tuple with a tensor id for each;
             grad_NK float32 or bfloat16 [W N, K], the gradients one below the other;
             faults int64 []: the number of gradient rows that are not finite is added to it
    Returns: new weights; or `out`, overwritten: other weights, or those of `weights` at their own places
    Raises:  as `accumulate_gradient`; a refused call writes neither `out` nor `faults`
    Laws:    equal to its calls of `accumulate_gradient`
    Source:  docs/spec/update.md
    """
    checks.alike_weights(weights, tensor_ids)
    checks.out_weights(out, weights)
    checks.stacked_gradient(weights, grad_NK, checks.GRADIENT_DTYPES)
    checks.fault_counter(faults, grad_NK)
    checks.vote_rate(rate)
    checks.one_of("exponent_rule", exponent_rule, EXPONENT_RULES)
    for tensor_id in tensor_ids:
        checks.vote_clock(seed, step, tensor_id)
    outs = (None,) * len(weights) if out is None else out
    parts = zip(weights, grad_NK.chunk(len(weights)), tensor_ids, outs, strict=True)
    made = tuple(
        accumulate_gradient(
            weight,
            part_NK,
            rate,
            seed=seed,
            step=step,
            tensor_id=tensor_id,
            exponent_rule=exponent_rule,
            faults=faults,
            out=target,
        )
        for weight, part_NK, tensor_id, target in parts
    )
    return made if out is None else out


@op
def apply_steps(
    weights: tuple[TernaryWeight, ...],
    *,
    theta: int = DEFAULT_THETA,
    theta_e: int = DEFAULT_THETA_E,
    on_flip: str = "reset",
    out: tuple[TernaryWeight, ...] | None = None,
) -> tuple[TernaryWeight, ...]:
    """Return several weights of any shapes after a step of each.

    Math:    apply_step of each weight, with all of its rows
    Shapes:  a tuple of weights, at least one
    Returns: new weights; or `out`, overwritten: other weights, or those of `weights` at their own places
    Range:   theta and theta_e in 1 .. 127
    Raises:  as `apply_step`; a refused call does not write to `out`
    Laws:    equal to its calls of `apply_step`
    Source:  docs/spec/update.md
    """
    checks.several_weights(weights)
    checks.threshold("theta", theta)
    checks.threshold("theta_e", theta_e)
    checks.one_of("on_flip", on_flip, ON_FLIP)
    checks.out_weights(out, weights)
    outs = (None,) * len(weights) if out is None else out
    made = tuple(
        apply_step(weight, theta=theta, theta_e=theta_e, on_flip=on_flip, out=target)
        for weight, target in zip(weights, outs, strict=True)
    )
    return made if out is None else out


@op
def count_nonfinite_rows(grad_NK: Tensor) -> Tensor:
    """Return how many rows of a gradient hold an infinity or a NaN and so cast no vote, int64 [].

    Shapes:  grad_NK float32 or bfloat16 [N, K]
    Raises:  TypeError or ValueError for another dtype or shape
    Source:  docs/spec/update.md
    """
    checks.gradient_matrix("grad_NK", grad_NK)
    return (~grad_NK.isfinite().all(dim=1)).sum()


@op
def count_changed_trits(before: TernaryWeight, after: TernaryWeight) -> Tensor:
    """Return how many trits differ between two states of a weight, int64 []; divided by N * K, this is the flip rate.

    Raises:  ValueError for weights of different shapes or devices
    Laws:    0 for equal weights; symmetric
    Source:  the flip rate that a trainer logs
    """
    checks.same_shape("after", after, "before", before)
    checks.same_device(before=before.packed, after=after.packed)
    return (unpack_trits(before.packed, before.shape) != unpack_trits(after.packed, after.shape)).sum()


@op
def count_state(weight: TernaryWeight, *, theta: int = DEFAULT_THETA) -> Tensor:
    """Return what a weight holds, in counts, int64 [3 + 48].

    Math:    trits that are 0; trits at the rail, 2 T T_accum <= -theta; full counts, |T_accum| = 127;
             then groups of each exponent E, -32 first. With b mantissa bits E is the level >> b
    Range:   theta in 1 .. 127
    Raises:  TypeError or ValueError for a theta that is not allowed
    Laws:    the exponents add up to N KG
    Source:  docs/training.md, what a line of metrics says
    """
    checks.threshold("theta", theta)
    trits, count = unpack_trits(weight.packed, weight.shape), weight.trit_accum.to(torch.int16)
    zeros, full = (trits == 0).sum(), (count.abs() == ACCUM_MAX).sum()
    rail = (2 * trits * count <= -theta).sum()
    exponents = (weight.exponents >> weight.mantissa_bits).to(torch.int64).flatten()
    groups = torch.bincount(exponents - EXPONENT_MIN, minlength=NUM_EXPONENTS)
    return torch.cat([torch.stack([zeros, rail, full]), groups])


def _saturate(count: Tensor) -> Tensor:
    """Return a count as int8, held at plus and minus 127."""
    return count.clamp(-ACCUM_MAX, ACCUM_MAX).to(torch.int8)


def _used_rows(weight: TernaryWeight, rows: Tensor | None, *per_row: Tensor) -> tuple[Tensor, ...]:
    """Return the named rows without unused slots, and their entries of `per_row`; all rows when `rows` is None."""
    if rows is None:
        return (torch.arange(weight.shape[0], device=weight.device), *per_row)
    used = rows >= 0
    return (rows[used], *(values[used] for values in per_row))
