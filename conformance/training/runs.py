"""Runs of the trainer for its tests, of the preset ``nano``. Some end like a killed process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training import loop
from arbitor.optimized.training.options import TrainOptions


def options(text: Path, run: Path | None, **changes: Any) -> TrainOptions:
    return replace(TrainOptions(preset="nano", data=str(text), device="cpu", run=run), **changes)


class Killed(BaseException):
    """Ends a run as SIGKILL would: between two steps, with no last words."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = loop.Run._take_step

    def dying(run: loop.Run, *, measured: bool) -> dict[str, Any] | None:
        if run.step == step:
            raise Killed
        return real(run, measured=measured)

    monkeypatch.setattr(loop.Run, "_take_step", dying)
