"""The rate of a step: warm-up, stable, decay. docs/training.md says what was measured for it."""

from __future__ import annotations

import math

import torch

from arbitor.reference.constants import DEFAULT_THETA

WARMUP_FRACTION = 0.03
"""Share of the steps over which the rate climbs from 0."""

DECAY_FRACTION = 0.6
"""Share of the steps, at the end, over which the rate falls to 0 in a short run."""

SHORT_STEPS, LONG_STEPS = 1500, 3000
"""Steps up to which a run is short, and from which on it is long. The rate of a long run falls over all steps but the warm-up."""

GAIN = 6 / 64
"""Rate between the two in parts of theta: votes as large as the root mean square of their row move a trit in 11 steps."""


def gain_of(flat: float | None, theta: int) -> float:
    """Return the ``gain`` of `rate` for the rate of the flat part, or for the usual one where that is None."""
    return GAIN if flat is None else flat / theta


def rate(
    step: int,
    steps: int,
    *,
    theta: int = DEFAULT_THETA,
    gain: float = GAIN,
    decay: float | None = None,
    votes: int = 1,
) -> float:
    """Return the ``rate`` argument of ``stochastic_votes`` in a step.

    The rate climbs linearly over the first 3 % of the steps, and reaches ``gain * theta`` at the last of them unless it falls
    already. It falls linearly over the last ``decay`` of all steps, and would be 0 at ``step == steps``, where no step is taken
    any more. At rate 0 no vote is cast and nothing moves. A step votes once, with the sum of the gradients of its micro-batches.
    Where each of these votes by itself, it votes as strongly as a whole batch would. They then share the rate as noise adds up: it
    is divided by the square root of their number. Sign votes take their size from the loss, and look at the rate only to see
    whether it is 0.

    Args:
        step: steps taken before this one, 0 to ``steps``.
        steps: length of the whole run, at least 1.
        theta: votes that move a trit, 1 to 127.
        gain: rate of the flat part in parts of theta, finite, at least 0.
        decay: share of the steps over which it falls, above 0, at most 1; None for `decay_of` the steps.
        votes: how often a step votes, at least 1: 1 for a sum, the number of micro-batches if each votes by itself.

    Returns:
        A float32 value held in a Python float, 0 to ``gain * theta / sqrt(votes)``.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (math.isfinite(gain) and gain >= 0):
        raise ValueError(f"gain is {gain}: it must be finite and at least 0")
    if votes < 1:
        raise ValueError(f"votes is {votes}: it must be at least 1")
    share = share_of_rate(step, steps, decay=decay_of(steps) if decay is None else decay)
    return torch.tensor(gain * theta * share / math.sqrt(votes), dtype=torch.float32).item()


def decay_of(steps: int) -> float:
    """Return the share of the steps over which the rate of votes falls: 0.6 of a short run, all of a long one, linear between.

    Args:
        steps: length of the whole run.
    """
    length = (steps - SHORT_STEPS) / (LONG_STEPS - SHORT_STEPS)
    return DECAY_FRACTION + (1 - DECAY_FRACTION) * min(max(length, 0.0), 1.0)


def share_of_rate(step: int, steps: int, *, decay: float = DECAY_FRACTION) -> float:
    """Return the share of the flat rate that a step has, 0 to 1, as `rate` has it in a short run.

    Args:
        step, steps, decay: as for `rate`.

    Raises:
        ValueError: an argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1")
    if not 0 <= step <= steps:
        raise ValueError(f"step is {step}: it must be from 0 to steps, which is {steps}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}: it must be above 0 and at most 1")
    warmup = math.ceil(WARMUP_FRACTION * steps)
    falling = math.ceil(decay * steps)
    return min(1.0, (step + 1) / warmup, (steps - step) / falling)


def learning_rate(step: int, steps: int, *, flat: float) -> float:
    """Return the learning rate of AdamW in a step, which rises and falls as `rate` does in a short run.

    Args:
        step, steps: as for `rate`.
        flat: the rate between the two.
    """
    return flat * share_of_rate(step, steps)
