"""The rate of a step, at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from arbitor.optimized.training.schedule import GAIN, decay_of, rate
from arbitor.reference import ops
from arbitor.reference.constants import DEFAULT_THETA
from arbitor.reference.types import TernaryWeight
from conformance.graph.models import nano, random_ids, state_of


def test_rate_of_a_hundred_steps() -> None:
    """Three steps of warm-up, flat to the fortieth, then down by a sixtieth a step: worked out by hand."""
    rates = [rate(step, 100, theta=64) for step in range(101)]
    up = [6.0 / 3, 12.0 / 3]
    down = [6.0 * (100 - step) / 60 for step in range(41, 101)]
    expected = [*up, *[6.0] * 39, *down]
    assert rates == [float(np.float32(value)) for value in expected]
    assert rates[100] == 0


def test_rate_rounds_its_phases_up() -> None:
    """Of 34 steps, 1.02 are warm-up and 20.4 decay: two and twenty-one."""
    assert [rate(step, 34, theta=64) for step in (0, 1, 13, 14)] == [
        3.0,
        6.0,
        6.0,
        float(np.float32(6.0 * 20 / 21)),
    ]


def test_rate_is_a_share_of_theta() -> None:
    """As many steps of one sign move a trit, whatever it takes to move it."""
    assert [rate(5, 20, theta=theta) for theta in (1, 16, 32)] == [6 / 64, 1.5, 3.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 34, 1000])
def test_rate_is_positive_on_every_step_and_reaches_the_gain(steps: int) -> None:
    rates = [rate(step, steps, theta=64) for step in range(steps)]
    assert all(0 < value <= 64 * GAIN for value in rates)
    assert max(rates) == 64 * GAIN
    assert rate(steps, steps) == 0


def test_rate_falls_over_the_share_asked_for() -> None:
    assert [rate(step, 10, theta=1, gain=1.0, decay=0.2) for step in (7, 8, 9)] == [1.0, 1.0, 0.5]
    for decay in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^decay is"):
            rate(0, 10, decay=decay)


def test_a_long_run_falls_from_the_start() -> None:
    """Over 60 % of up to 1,500 steps, over all of 3,000 and more, and linearly between."""
    assert [decay_of(steps) for steps in (1, 1500, 2250, 3000, 24_000)] == [0.6, 0.6, 0.8, 1.0, 1.0]
    assert rate(1500, 3000, theta=64) == 3.0 and rate(600, 1500, theta=64) == 6.0
    assert rate(1, 24_000, theta=64) == float(np.float32(6.0 * 2 / 720))


def test_micro_batches_share_the_rate_by_the_root_of_their_number() -> None:
    assert [rate(5, 20, theta=64, votes=votes) for votes in (1, 4, 16)] == [6.0, 3.0, 1.5]
    assert rate(5, 20, votes=3) == float(np.float32(6 / 3**0.5))
    with pytest.raises(ValueError, match=r"^votes is 0"):
        rate(5, 20, votes=0)


@pytest.mark.parametrize("votes", [1, 3])
def test_rate_is_a_float32(votes: int) -> None:
    rates = [rate(step, 1000, votes=votes) for step in range(1000)]
    assert rates == [float(np.float32(value)) for value in rates]


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
        trit_accum=((DEFAULT_THETA - 1) * sign).to(weight.trit_accum.dtype),
        exponent_accum=weight.exponent_accum.new_full(weight.exponent_accum.shape, 126),
    )
