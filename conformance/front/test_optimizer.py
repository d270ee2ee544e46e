"""`ArbOptimizer`: what a loop of torch does with an optimizer works, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
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


@pytest.mark.parametrize("make", [model, lambda: Ternary(Linear(40, 40, seed=0))])
def test_micro_batches_of_a_step_vote_as_the_model_lets_them(make: Any) -> None:
    """At the rate of the last one. A step may have fewer, and a refused loss is none of them."""
    mine, plain = make(), make()
    optimizer, number = ArbOptimizer(mine, rate=20.0, accum=3), 0

    def loss_of(it: Any, place: int) -> Any:
        if isinstance(it, ArbModel):
            return it.loss(IDS[:, place:])
        return it(torch.randn(64, 40, generator=torch.Generator().manual_seed(place))).square().mean()

    for step, passes in enumerate((3, 2, 3)):
        for place in range(passes):
            optimizer.param_groups[0]["lr"] = rate = 20.0 - step - place
            assert optimizer.backward(loss_of(mine, place))
            assert not optimizer.backward(loss_of(mine, place) * float("nan"))
            plain.backward(loss_of(plain, place), rate=rate, step=number, accum=3)
            number += 1
        with pytest.raises(RuntimeError, match="zero_grad must follow step"):
            optimizer.zero_grad()
        if passes == 3:
            with pytest.raises(
                ValueError, match=r"^accum is 3, but so many passes were taken since the last step"
            ):
                optimizer.backward(loss_of(mine, 0))
        for each in (optimizer, plain):
            each.step()
        optimizer.zero_grad()
    assert number == optimizer.passes == 8
    assert state_sha256(mine.state()) == state_sha256(plain.state()) != state_sha256(make().state())
    copied = copy.deepcopy(optimizer)
    assert copied.accum == 3 and copied.model is not mine


def test_a_model_whose_sums_wait_is_not_saved(tmp_path: Path) -> None:
    it = ArbModel(nano.NANO, device="cpu", seed=1)
    it.embedding.requires_grad_(False)
    it.backward(it.loss(IDS), rate=6.0, step=0, accum=2)
    with pytest.raises(RuntimeError, match=r"save_pretrained must follow model.step\(\)"):
        it.save_pretrained(tmp_path / "model")
    it.step()
    it.save_pretrained(tmp_path / "model")


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
        (lambda it: ArbOptimizer(it.model, rate=1.0, accum=0), ValueError, "accum is 0"),
        (lambda it: ArbOptimizer(it.model, rate=1.0, accum=2.0), TypeError, "accum is"),
        (lambda it: ArbOptimizer(it.model.parameters(), rate=1.0), TypeError, "model is a generator"),
    ],
)
def test_wrong_loops_are_named(wrong: Any, error: type[Exception], sentence: str) -> None:
    optimizer = ArbOptimizer(model(), rate=6.0)
    with pytest.raises(error, match=sentence):
        wrong(optimizer)
