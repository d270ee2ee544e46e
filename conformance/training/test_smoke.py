"""The times that smoke prints: each is of its own part of a pass."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized.training import smoke
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.schedule import GAIN
from conformance.graph import models


def one_pass(monkeypatch: pytest.MonkeyPatch, *, votes: Any = None) -> tuple[Any, list[str]]:
    """Return what a pass comes to where each look at the clock is a second, and what was waited for.

    `votes` stands in for the backward pass of the model; without it there is none.
    """
    clock, waited = itertools.count(), []
    monkeypatch.setattr(smoke, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = models.nano()
    if votes is not None:
        monkeypatch.setattr(model, "backward", votes)
    taken = smoke.one_pass(
        model,
        models.random_ids(2, 12),
        lambda: waited.append("wait"),
        backward=votes is not None,
        step=3,
    )
    return taken, waited


def test_a_forward_pass_has_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (nats, times), waited = one_pass(monkeypatch)
    assert nats > 4 and times == smoke.PassTimes(1, None) and len(waited) == 2


def test_an_update_is_timed_from_its_own_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, Any]] = []

    def backward(losses: dict[str, torch.Tensor], **options: Any) -> bool:
        assert losses["bytes"].requires_grad
        taken.append(options)
        return True

    (_, times), waited = one_pass(monkeypatch, votes=backward)
    assert times == smoke.PassTimes(1, 1) and len(waited) == 3
    assert taken == [{"rate": GAIN * models.nano().config.theta, "step": 3, "undo": False}]


def test_a_loss_that_is_not_finite_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"the loss of .* on random bytes is not finite"):
        one_pass(monkeypatch, votes=lambda *_, **__: False)
