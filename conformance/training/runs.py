"""Runs of the trainer for its tests, of the preset ``nano``. Some end like a killed process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.run import Run


def options(text: Path, run: Path | None, **changes: Any) -> TrainOptions:
    return replace(TrainOptions(preset="nano", data=str(text), device="cpu", run=run), **changes)


class Killed(BaseException):
    """Ends a run as SIGKILL would: between two steps, with no last words."""


def train_until_killed(step: int, asked: TrainOptions, **more: Any) -> None:
    """Train, and die before a step. A run that comes to its end is a failure."""
    real = Run._take_step

    def dying(run: Run, *, measured: bool) -> dict[str, Any] | None:
        if run.step == step:
            raise Killed
        return real(run, measured=measured)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "_take_step", dying)
        train(asked, **more)


def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one with each graph that is replayed: two a pass, and one a step that is not launched."""
    counted: list[None] = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (counted.append(None), real(graph))[1])
    return counted
