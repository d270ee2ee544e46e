"""Update. See `arbitor.reference.ops.update`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.cuda import update as cuda_update
from arbitor.optimized.kernels import together, update
from arbitor.optimized.kernels.launch import Clock, row_ids, values_between, vote_rate
from arbitor.optimized.kernels.votes import exponents_of_rows
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import deliver, on_device, target_of
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.paths import takes_cuda
from arbitor.reference import checks
from arbitor.reference.constants import ACCUM_MAX, DEFAULT_THETA, DEFAULT_THETA_E, EXPONENT_RULES, ON_FLIP

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
    first_row: int = 0,
    out: AnyWeight | None = None,
) -> AnyWeight:
    """See reference."""
    row_ids(rows, weight.shape[0], weight.device)
    checks.out_weight(out, weight)
    checks.gradient_of(weight, "votes_NK", votes_NK, rows, (torch.int8,))
    values_between("votes_NK", votes_NK, -ACCUM_MAX, ACCUM_MAX)
    checks.one_of("exponent_rule", exponent_rule, EXPONENT_RULES)
    clock = Clock.of(seed, step, tensor_id, weight.device)
    checks.first_row(first_row, weight)
    target = target_of(weight, out)
    update.count_votes_(target, votes_NK, None, clock, exponent_rule, rows, first_row=first_row)
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
    _step_(target, theta, theta_e, on_flip == "carry", rows)
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
    first_row: int = 0,
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
    checks.first_row(first_row, weight)
    target = target_of(weight, out)
    _count_gradient_(target, grad_NK.contiguous(), rate, clock, exponent_rule, rows, faults, first_row)
    return deliver(target, weight, out)


@op()
def accumulate_gradients(
    weights: tuple[AnyWeight, ...],
    grad_NK: Tensor,
    rate: float | Tensor,
    *,
    seed: int,
    step: int | Tensor,
    tensor_ids: tuple[int, ...],
    exponent_rule: str = "score",
    faults: Tensor | None = None,
    out: tuple[AnyWeight, ...] | None = None,
) -> tuple[AnyWeight, ...]:
    """See reference. Two launches serve all weights, unless they are large."""
    checks.alike_weights(weights, tensor_ids)
    checks.out_weights(out, weights)
    checks.stacked_gradient(weights, grad_NK, checks.GRADIENT_DTYPES)
    checks.fault_counter(faults, grad_NK)
    vote_rate(rate, grad_NK.device)
    checks.one_of("exponent_rule", exponent_rule, EXPONENT_RULES)
    clock = Clock.of(seed, step, tensor_ids[0], grad_NK.device)
    clocks = [clock.of_tensor(tensor_id) for tensor_id in tensor_ids]
    # Only Triton counts in several weights, but a path that cannot be had is refused in every call, before anything is written.
    takes_cuda(False, grad_NK.device)
    targets = _targets_of(weights, out)
    table = together.count_table(targets, tensor_ids)
    if table is not None:
        together.count_together_(targets, table, grad_NK, rate, clock, exponent_rule, faults)
    else:
        parts = grad_NK.contiguous().chunk(len(targets))
        for target, part_NK, clock in zip(targets, parts, clocks, strict=True):
            _count_gradient_(target, part_NK, rate, clock, exponent_rule, None, faults)
    return _delivered(targets, weights, out)


@op()
def apply_steps(
    weights: tuple[AnyWeight, ...],
    *,
    theta: int = DEFAULT_THETA,
    theta_e: int = DEFAULT_THETA_E,
    on_flip: str = "reset",
    out: tuple[AnyWeight, ...] | None = None,
) -> tuple[AnyWeight, ...]:
    """See reference. One launch serves all weights of a kind, but for large ones."""
    checks.several_weights(weights)
    checks.threshold("theta", theta)
    checks.threshold("theta_e", theta_e)
    checks.one_of("on_flip", on_flip, ON_FLIP)
    checks.out_weights(out, weights)
    # Only Triton steps several weights, but a path that cannot be had is refused in every call, before anything is written.
    takes_cuda(False, weights[0].device)
    targets, carry = _targets_of(weights, out), on_flip == "carry"
    left = set(range(len(targets)))
    for places, table in together.steps_together(targets):
        together.step_together_([targets[place] for place in places], table, theta, theta_e, carry)
        left -= set(places)
    for place in sorted(left):
        _step_(targets[place], theta, theta_e, carry, None)
    return _delivered(targets, weights, out)


def _targets_of(weights: tuple[AnyWeight, ...], out: tuple[AnyWeight, ...] | None) -> list[DeviceWeight]:
    """Return the weights that an update's kernels may overwrite, as `target_of` each."""
    outs = (None,) * len(weights) if out is None else out
    return [target_of(weight, into) for weight, into in zip(weights, outs, strict=True)]


def _delivered(
    targets: list[DeviceWeight], weights: tuple[AnyWeight, ...], out: tuple[AnyWeight, ...] | None
) -> tuple[AnyWeight, ...]:
    """Return updated weights in `out`, or as the kinds of weights that came in."""
    outs = (None,) * len(weights) if out is None else out
    made = tuple(deliver(*each) for each in zip(targets, weights, outs, strict=True))
    return made if out is None else out


def _count_gradient_(
    target: DeviceWeight,
    grad_NK: Tensor,
    rate: float | Tensor,
    clock: Clock,
    exponent_rule: str,
    rows: Tensor | None,
    faults: Tensor | None,
    first_row: int = 0,
) -> None:
    """Launch `accumulate_gradient`, in place, for a contiguous gradient."""
    is_narrow = rows is None and first_row == 0 and together.is_narrow(target)
    table = together.count_table([target], (clock.tensor_id % 2**32,)) if is_narrow else None
    if takes_cuda(table is None and cuda_update.fits_count(target, grad_NK), target.device):
        cuda_update.count_votes_(target, grad_NK, rate, clock, exponent_rule, rows, faults, first_row)
    elif table is not None:
        together.count_together_([target], table, grad_NK, rate, clock, exponent_rule, faults)
    else:
        update.count_votes_(target, grad_NK, rate, clock, exponent_rule, rows, faults, first_row=first_row)


def _step_(target: DeviceWeight, theta: int, theta_e: int, carry: bool, rows: Tensor | None) -> None:
    """Launch `apply_step`, in place."""
    if takes_cuda(cuda_update.fits_step(target, rows), target.device):
        cuda_update.step_(target, theta, theta_e, carry)
    else:
        update.step_(target, theta, theta_e, carry, rows)


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


@op()
def count_state(weight: AnyWeight, *, theta: int = DEFAULT_THETA) -> Tensor:
    """See reference. Two launches count, and nothing of the weight is decoded to memory."""
    checks.threshold("theta", theta)
    return update.state_counts(on_device(weight), theta)
