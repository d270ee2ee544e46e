"""The rate of a step: warm-up, stable, decay (design decision 3, "Rate")."""

from __future__ import annotations

import math

import torch

WARMUP_FRACTION = 0.03
"""Share of the steps over which the rate climbs from 0."""

DECAY_FRACTION = 0.4
"""Share of the steps, at the end, over which the rate falls to 0."""

GAIN = 1.25
"""Rate between the two: mean size of the votes of a row, in votes per root mean square of its gradient."""


def rate(step: int, steps: int, *, gain: float = GAIN) -> float:
    """The ``rate`` argument of ``stochastic_votes`` at a step.

    Climbs linearly over the first 3 % of the steps, reaching ``gain`` at the last of them; falls linearly
    over the last 40 %, so that it would be 0 at ``step == steps``, where no step is taken any more. At rate 0
    no vote is cast and nothing moves.

    Args:
        step: steps taken before this one, 0 to ``steps``.
        steps: length of the whole run, at least 1.
        gain: rate of the flat part, finite, at least 0.

    Returns:
        A float32 value held in a Python float, 0 to ``gain``.

    Raises:
        ValueError: an argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1")
    if not 0 <= step <= steps:
        raise ValueError(f"step is {step}: it must be from 0 to steps, which is {steps}")
    if not (math.isfinite(gain) and gain >= 0):
        raise ValueError(f"gain is {gain}: it must be finite and at least 0")
    warmup = math.ceil(WARMUP_FRACTION * steps)
    decay = math.ceil(DECAY_FRACTION * steps)
    factor = min(1.0, (step + 1) / warmup, (steps - step) / decay)
    return torch.tensor(gain * factor, dtype=torch.float32).item()
