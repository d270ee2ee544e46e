"""Runs and `arb smoke` have the kernels of their first pass compiled ahead, and say so. `conformance.test_ahead` has the rest."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from arbitor.optimized.ahead.start import Order
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training import prepared, smoke
from arbitor.optimized.training.batch_size import most_windows
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.plan import decide
from arbitor.optimized.training.runtime import Runtime
from conformance.pretend_cuda import H200
from conformance.training import nano
from conformance.training.runs import options

SMOKE = Order(
    config=nano.NANO.to_json(), dtype="bfloat16", context=16, windows=(2,), passes="smoke", gpu=H200
)
RUN = replace(SMOKE, passes="run")


class Told:
    """In the place of `Ahead`: all is compiled when it is asked for the second time."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.looks, self.waited = 0, 0

    def start(self, runtime: Runtime, **order: Any) -> Told:
        self.asked = order
        return self

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        self.waited += 1
        yield

    def has_ended(self) -> bool:
        self.looks += 1
        return self.looks > 1

    def finish(self) -> str:
        return "kernels: 7 compiled"


def test_smoke_compiles_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(smoke, "compiled_ahead", told.start)
    runtime = Runtime(device="cpu", backend="reference", dtype=torch.float32)
    report = smoke.smoke(nano.NANO, runtime, context=16, batch=2, backward=True, seed=1)
    assert report.compiled == "kernels: 7 compiled" and told.waited == 1
    assert Order(dtype="bfloat16", gpu=H200, **told.asked) == SMOKE


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"accum": 3}, {"accum": 2, "sums": True}),
        ({"accum": 3, "accum_votes": True}, {"accum": 2}),
        ({"batch": "auto"}, {"windows": (1, most_windows(16))}),
    ],
)
def test_a_run_compiles_ahead(
    monkeypatch: pytest.MonkeyPatch, text: Path, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    """The run says once what was compiled, after the step in which the last of it was."""
    told, out = Told(), io.StringIO()
    monkeypatch.setattr(prepared, "compiled_ahead", told.start)
    if "batch" in asked:
        monkeypatch.setattr(prepared, "fitting_batch", lambda *_: SimpleNamespace(windows=2, reason="few"))
    train(options(text, None, save=False, **asked), console=Console(file=out, width=1000))
    lines = out.getvalue().splitlines()
    [place] = [number for number, line in enumerate(lines) if line == "kernels: 7 compiled"]
    assert lines[place + 1].startswith("step 2/8") and told.waited == 2
    assert Order(dtype="bfloat16", gpu=H200, **told.asked) == replace(RUN, **expected)


def test_the_ranks_of_a_host_compile_ahead_together(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """They give one order, so that one of them carries it out for all."""
    told, orders = Told(), []
    monkeypatch.setattr(prepared, "compiled_ahead", told.start)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    runtime = Runtime(device="cuda", backend="triton", dtype=torch.bfloat16)
    settings = decide(options(text, None, save=False, batch=8, exchange="mxint8"), None)
    for number in (2, 3):
        monkeypatch.setenv("LOCAL_RANK", str(number - 2))
        prepared._ahead(nano.NANO, settings, runtime, World(number, 4), recorded=True, auto_batch=False)
        orders.append(Order(dtype="bfloat16", gpu=H200, **told.asked))
    ranks = replace(RUN, recorded=True, windows=(2,), ranks=(2, 3), of_ranks=4, exchange="mxint8")
    assert orders == [ranks, ranks]
