"""The rate of a step, at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from arbitor.optimized.training.schedule import GAIN, rate
from arbitor.reference import ops
from arbitor.reference.types import TernaryWeight
from conformance.graph.models import nano, random_ids, state_of


def test_rate_of_a_hundred_steps() -> None:
    """Three steps of warm-up, flat to the sixtieth, then down by a fortieth a step: worked out by hand."""
    rates = [rate(step, 100) for step in range(101)]
    up = [1.25 / 3, 2.5 / 3]
    down = [1.25 * (100 - step) / 40 for step in range(61, 101)]
    expected = [*up, *[1.25] * 59, *down]
    assert rates == [float(np.float32(value)) for value in expected]
    assert rates[100] == 0


def test_rate_rounds_its_phases_up() -> None:
    """Of 34 steps, 1.02 are warm-up and 13.6 decay: two and fourteen."""
    assert [rate(step, 34) for step in (0, 1, 20, 21)] == [
        0.625,
        1.25,
        1.25,
        float(np.float32(1.25 * 13 / 14)),
    ]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 34, 1000])
def test_rate_is_positive_on_every_step_and_reaches_the_gain(steps: int) -> None:
    rates = [rate(step, steps) for step in range(steps)]
    assert all(0 < value <= GAIN for value in rates)
    assert max(rates) == GAIN
    assert rate(steps, steps) == 0


def test_rate_is_a_float32() -> None:
    assert all(rate(step, 1000) == float(np.float32(rate(step, 1000))) for step in range(1000))


@pytest.mark.parametrize(
    ("step", "steps", "gain", "named"),
    [
        (0, 0, 1.0, "steps"),
        (-1, 5, 1.0, "step"),
        (6, 5, 1.0, "step"),
        (0, 5, -1.0, "gain"),
        (0, 5, float("nan"), "gain"),
    ],
)
def test_rate_refuses(step: int, steps: int, gain: float, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is"):
        rate(step, steps, gain=gain)


def test_at_rate_zero_nothing_moves() -> None:
    model = nano()
    # Accumulators a hair below their thresholds: any vote at all would move something.
    model.load_weights({name: _on_the_brink(weight) for name, weight in model.weights().items()})
    before = state_of(model)
    for step in range(3):
        assert model.backward(model.loss(random_ids(2, 12)), rate=rate(100, 100), step=step)
        model.step()
    after = model.weights()
    assert all(
        bool((after[name].tensors()[part] == tensor).all())
        for name, weight in before.items()
        for part, tensor in weight.tensors().items()
    )


def _on_the_brink(weight: TernaryWeight) -> TernaryWeight:
    sign = ops.unpack_trits(weight.packed, weight.shape).sign()
    return weight.with_tensors(
        trit_accum=(15 * sign).to(weight.trit_accum.dtype),
        exponent_accum=weight.exponent_accum.new_full(weight.exponent_accum.shape, 126),
    )
