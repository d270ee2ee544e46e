"""Update. See `arbitor.reference.ops.update`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.cuda import update as cuda_update
from arbitor.optimized.kernels import update
from arbitor.optimized.kernels.launch import Clock, row_ids, values_between, vote_rate
from arbitor.optimized.kernels.votes import exponents_of_rows
from arbitor.optimized.layouts import AnyWeight
from arbitor.optimized.ops.layout import deliver, on_device, target_of
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.paths import takes_cuda
from arbitor.reference import checks
from arbitor.reference.constants import ACCUM_MAX, DEFAULT_THETA, DEFAULT_THETA_E, EXPONENT_RULES, ON_FLIP

__all__ = ["accumulate", "accumulate_gradient", "apply_step", "count_changed_trits", "count_nonfinite_rows"]


@op()
def accumulate(
    weight: AnyWeight,
    votes_NK: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    exponent_rule: str = "score",
    rows: Tensor | None = None,
    out: AnyWeight | None = None,
) -> AnyWeight:
    """See reference."""
    row_ids(rows, weight.shape[0], weight.device)
    checks.out_weight(out, weight)
    checks.gradient_of(weight, "votes_NK", votes_NK, rows, (torch.int8,))
    values_between("votes_NK", votes_NK, -ACCUM_MAX, ACCUM_MAX)
    checks.one_of("exponent_rule", exponent_rule, EXPONENT_RULES)
    clock = Clock.of(seed, step, tensor_id, weight.device)
    target = target_of(weight, out)
    update.count_votes_(target, votes_NK, None, clock, exponent_rule, rows)
    return deliver(target, weight, out)


@op()
def apply_step(
    weight: AnyWeight,
    *,
    theta: int = DEFAULT_THETA,
    theta_e: int = DEFAULT_THETA_E,
    on_flip: str = "reset",
    rows: Tensor | None = None,
    out: AnyWeight | None = None,
) -> AnyWeight:
    """See reference."""
    checks.threshold("theta", theta)
    checks.threshold("theta_e", theta_e)
    checks.one_of("on_flip", on_flip, ON_FLIP)
    row_ids(rows, weight.shape[0], weight.device)
    checks.out_weight(out, weight)
    target = target_of(weight, out)
    if takes_cuda(cuda_update.fits_step(target, rows), target.device):
        cuda_update.step_(target, theta, theta_e, on_flip == "carry")
    else:
        update.step_(target, theta, theta_e, on_flip == "carry", rows)
    return deliver(target, weight, out)


@op()
def accumulate_gradient(
    weight: AnyWeight,
    grad_NK: Tensor,
    rate: float | Tensor,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    exponent_rule: str = "score",
    rows: Tensor | None = None,
    faults: Tensor | None = None,
    out: AnyWeight | None = None,
) -> AnyWeight:
    """See reference. It takes two passes over the gradient and one over the accumulators, and never writes the votes out."""
    row_ids(rows, weight.shape[0], weight.device)
    checks.out_weight(out, weight)
    checks.gradient_of(weight, "grad_NK", grad_NK, rows, checks.GRADIENT_DTYPES)
    checks.fault_counter(faults, grad_NK)
    vote_rate(rate, weight.device)
    checks.one_of("exponent_rule", exponent_rule, EXPONENT_RULES)
    clock = Clock.of(seed, step, tensor_id, weight.device)
    target = target_of(weight, out)
    grad_NK = grad_NK.contiguous()
    if takes_cuda(cuda_update.fits_count(target, grad_NK, rows), target.device):
        cuda_update.count_votes_(target, grad_NK, rate, clock, exponent_rule, faults)
    else:
        update.count_votes_(target, grad_NK, rate, clock, exponent_rule, rows, faults)
    return deliver(target, weight, out)


@op()
def count_nonfinite_rows(grad_NK: Tensor) -> Tensor:
    """See reference."""
    checks.gradient_matrix("grad_NK", grad_NK)
    faults = torch.zeros((), dtype=torch.int64, device=grad_NK.device)
    exponents_of_rows(grad_NK, faults)
    return faults


@op()
def count_changed_trits(before: AnyWeight, after: AnyWeight) -> Tensor:
    """See reference."""
    checks.same_shape("after", after, "before", before)
    checks.same_device(before=before.exponents, after=after.exponents)
    return update.changed_trits(on_device(before).words, on_device(after).words)
