"""`ArbOptimizer`: what a loop of torch does with an optimizer works, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from arbitor import ArbModel, ArbOptimizer
from arbitor.nn import Linear, Ternary
from arbitor.optimized.training.checkpoint import state_sha256
from conformance.training import nano
from conformance.training.nano import IDS


def model() -> ArbModel:
    return ArbModel(nano.NANO, device="cpu", seed=1)


def test_it_does_what_the_model_does() -> None:
    mine, plain = model(), model()
    optimizer = ArbOptimizer(mine, rate=6.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(4):
        optimizer.zero_grad()
        assert optimizer.backward(mine.losses(IDS))
        optimizer.step()
        schedule.step()
        plain.backward(plain.losses(IDS), rate=6.0 * 0.5**step, step=step)
        plain.step()
    assert state_sha256(mine.state()) == state_sha256(plain.state())
    assert schedule.get_last_lr() == [6.0 / 16] and optimizer.passes == 4


def test_it_goes_on_as_it_was_saved() -> None:
    first = ArbOptimizer(model(), rate=6.0)
    first.backward(first.model.losses(IDS))
    first.param_groups[0]["lr"] = 3.0
    second = ArbOptimizer(model(), rate=6.0)
    second.load_state_dict(first.state_dict())
    assert second.passes == 1 and second.param_groups[0]["lr"] == 3.0
    with pytest.raises(ValueError, match="must be of an ArbOptimizer"):
        second.load_state_dict(torch.optim.SGD([nn.Parameter(torch.ones(1))]).state_dict())
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.model.steps_taken == 1
    for steps in (-1, 1.5):
        with pytest.raises((TypeError, ValueError), match="steps_taken"):
            second.load_state_dict({**first.state_dict(), "passes": 7, "steps_taken": steps})
    assert (second.model.steps_taken, second.passes) == (1, 1)
    # A state of an earlier version says nothing of it.
    second.load_state_dict(
        {name: value for name, value in first.state_dict().items() if name != "steps_taken"}
    )
    assert second.model.steps_taken == 1
    net = ArbOptimizer(Ternary(Linear(12, 12)), rate=6.0)
    net.load_state_dict(net.state_dict())
    assert "steps_taken" not in net.state_dict()


def test_a_refused_loss_takes_no_number() -> None:
    optimizer = ArbOptimizer(model(), rate=6.0)
    assert not optimizer.backward(optimizer.model.loss(IDS) * float("inf")) and optimizer.passes == 0


def test_it_steps_ternary_layers() -> None:
    net = Ternary(Linear(40, 40, seed=0))
    optimizer, x = ArbOptimizer(net, rate=20.0), torch.randn(64, 40)
    trits = net.snapshot_trits()
    for _ in range(20):
        optimizer.backward(net(x).square().mean())
        optimizer.step()
    assert int(net.changed_trits(trits)["module"])


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (lambda it: (it.model.loss(IDS).backward(), it.step()), RuntimeError, "outside of model.backward"),
        (
            lambda it: (it.backward(it.model.loss(IDS)), it.zero_grad()),
            RuntimeError,
            "zero_grad must follow step",
        ),
        (lambda it: it.step(lambda: 1.0), ValueError, "closure is given"),
        (lambda it: it.add_param_group({"params": []}), ValueError, "have one group"),
        (lambda it: ArbOptimizer(it.model, rate=-1.0), ValueError, "rate is -1"),
        (lambda it: ArbOptimizer(it.model.parameters(), rate=1.0), TypeError, "model is a generator"),
    ],
)
def test_wrong_loops_are_named(wrong: Any, error: type[Exception], sentence: str) -> None:
    optimizer = ArbOptimizer(model(), rate=6.0)
    with pytest.raises(error, match=sentence):
        wrong(optimizer)
