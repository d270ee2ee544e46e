"""Under the seeds' rule, `SIGN_VOTES`, trits move by the signs of gradients, and exponents by the signs of scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from arbitor.reference.config import SIGN_VOTES, ArbConfig, with_fields
from arbitor.reference.graph import ArbModel, TernaryLinear
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.ops.packing import trits_of
from conformance.graph import models
from conformance.subject import Subject

CONFIG: ArbConfig = with_fields(models.NANO, **SIGN_VOTES)

THETA, THETA_E, SIZE = 32, 32, 8


def integers(*shape: int, seed: int) -> Tensor:
    """Return floats whose products and sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def test_a_weight_is_moved_as_the_rule_says_by_hand(subject: Subject) -> None:
    """The op set under test leaves what forty steps of one linear leave that are computed trit by trit and group by group."""
    parts = GraphContext(
        models.drawn_by_the_reference(subject.ops), CONFIG, device=subject.device, dtype=torch.float32, seed=7
    )
    layer = TernaryLinear(parts, 13, 3)
    start = subject.ops.to_spec(layer.weight).to("cpu")
    trits, exponents = trits_of(start).tolist(), start.exponents.tolist()
    t_counts, e_counts = [[0] * 13 for _ in range(3)], [[0, 0] for _ in range(3)]
    flips = moves = 0
    for step in range(40):
        x, dy = integers(4, 13, seed=step // 20), integers(4, 3, seed=50 + step // 20)
        size = 1 + step % SIZE
        grad = (dy.T @ x).tolist()
        with parts.voting.taking(rate=1.0, step=step, size=size):
            (layer(x.to(subject.device)) * dy.to(subject.device)).sum().backward()
        layer.step_weight()
        for n in range(3):
            for group, columns in enumerate((range(12), range(12, 13))):
                score = sum(size * sign(grad[n][k]) * trits[n][k] for k in columns)
                e_counts[n][group] += sign(score)
                if abs(e_counts[n][group]) >= THETA_E:
                    exponents[n][group] -= sign(e_counts[n][group])
                    e_counts[n][group] -= THETA_E * sign(e_counts[n][group])
                    moves += 1
            for k in range(13):
                t_counts[n][k] = max(-127, min(127, t_counts[n][k] + size * sign(grad[n][k])))
                if abs(t_counts[n][k]) >= THETA:
                    trits[n][k] = max(-1, min(1, trits[n][k] - sign(t_counts[n][k])))
                    t_counts[n][k] = 0
                    flips += 1
        after = subject.ops.to_spec(layer.weight).to("cpu")
        assert trits_of(after).tolist() == trits and after.trit_accum.tolist() == t_counts, f"step {step}"
        assert after.exponents.tolist() == exponents and after.exponent_accum.tolist() == e_counts, (
            f"step {step}"
        )
    assert flips > 20 and moves > 0, "nothing moved that could tell rules apart"


def test_exponents_and_their_counts_move_with_the_trits() -> None:
    """E_accum is active in most groups, as REFACTOR7 reports, and a model learns meanwhile."""
    model, ids_BT = ArbModel(CONFIG, seed=3), models.random_ids(2, 12)
    before, losses = models.state_of(model), []
    for step in range(60):
        components = model.losses(ids_BT)
        losses.append(components["bytes"].item())
        assert model.backward(components, rate=1.0, step=step)
        model.step()
    voted = [name for name, module in model.ternary_modules().items() if module.steps]
    after = model.weights()
    counts = torch.cat([after[name].exponent_accum.flatten() for name in voted if "embedding" not in name])
    assert counts.count_nonzero() > counts.numel() / 2
    moved = {name for name, field in models.changed_tensors(before, model) if field == "exponents"}
    assert len(moved) > 5, moved
    assert all(weight.mantissa_bits == 0 for weight in after.values()), "scales are whole octaves"
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


@pytest.mark.parametrize(
    ("loss", "size"), [(0.99 * math.log(297), 8), (0.45 * math.log(297), 4), (0.01, 1), (99.0, 8)]
)
def test_a_vote_is_as_large_as_the_loss_says(loss: float, size: int) -> None:
    model, sizes = ArbModel(CONFIG, seed=3), set()
    cast = model.voting.cast

    def watched(*args: object, **kwargs: object) -> None:
        sizes.add(model.voting.current.size)
        cast(*args, **kwargs)

    model.voting.cast = watched
    shown = model.loss(models.random_ids(2, 9))
    model.backward(shown * (loss / shown.item()), rate=1.0, step=0)
    assert sizes == {size}
    counts = torch.cat([weight.trit_accum.flatten() for weight in model.weights().values()])
    assert {abs(count) for count in counts.unique().tolist()} <= {0, size}
    assert (
        max(abs(count) for name, w in model.weights().items() for count in w.exponent_accum.unique().tolist())
        == 1
    )
