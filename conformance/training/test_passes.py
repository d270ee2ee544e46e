"""Passes that are recorded and replayed do what passes launched from Python do: the same bits, the same refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training import loop
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.monitor import read_metrics
from arbitor.optimized.training.passes import LAUNCHED_FIRST, Passes
from arbitor.optimized.training.plan import TrainOptions
from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.graph import ArbModel
from conformance.compare import exact
from conformance.graph import models
from conformance.report import needs_cuda
from conformance.subject import Subject

MORE = {"preset": "whole", "steps": 9, "batch": 16, "context": 34}
"""A run in which neighbours are found and codes are revived."""


def test_what_a_pass_leaves_can_be_told_later_and_again() -> None:
    """Held back, nothing has happened but votes; told, the next step is that of a pass which told it at once."""
    lively = replace(models.WHOLE, theta=1, theta_e=1)
    direct, held = models.whole(lively), models.whole(lively)
    for step in (2, 3):
        ids_BT = models.random_ids(3, 24, seed=step)
        direct.backward(direct.losses(ids_BT), rate=models.RATE, step=step)
        direct.step()
        left: list[Any] = []
        with held.voting.open(rate=models.RATE, step=step, held=left):
            held.objective(held.losses(ids_BT)).backward()  # type: ignore[no-untyped-call]
        before = held.tables(), {name: w.packed.clone() for name, w in held.weights().items()}
        tables = {name: table.clone() for name, table in before[0].items()}
        held.step()  # of nothing
        assert all(torch.equal(tables[name], table) for name, table in held.tables().items())
        assert all(torch.equal(before[1][name], w.packed) for name, w in held.weights().items())
        for note, seen in left:
            note(*(None if tensor is None else tensor.clone() for tensor in seen))
        held.step()
        assert not all(torch.equal(tables[name], table) for name, table in held.tables().items())
        for name, want in direct.state().items():
            exact(held.state()[name], want, name)


def test_passes_that_cannot_be_recorded_are_launched() -> None:
    assert Passes(models.nano(), record=True).recording
    assert not Passes(models.nano(), record=False).recording
    assert not Passes(models.nano(vote_rule="sign"), record=True).recording


def test_the_runtime_says_what_can_be_recorded() -> None:
    gpu, no_kernels = (Runtime("cuda", backend, torch.bfloat16) for backend in ("triton", "reference"))
    cpu = Runtime("cpu", "triton", torch.float32)
    assert [gpu.records(asked) for asked in (None, True, False)] == [True, True, False]
    for runtime in (no_kernels, cpu):
        assert [runtime.records(asked) for asked in (None, False)] == [False, False]
        with pytest.raises(ValueError, match=f"cuda_graph is True, .* device {runtime.device} and backend"):
            runtime.records(True)


def options(text: Path, *, cuda_graph: bool, **changes: Any) -> TrainOptions:
    plain = TrainOptions(data=str(text), device="cuda", cuda_graph=cuda_graph, **MORE)
    return replace(plain, **changes)


def outcome(folder: Path, summary: dict[str, Any]) -> tuple[Any, ...]:
    """Return what does not depend on how passes were launched, nor on the clock."""
    clocks = {"seconds": 0, "tokens_per_second": 0}
    lines = [{**line, **clocks} for line in read_metrics(folder / "metrics.jsonl")]
    return lines, {**summary, "seconds": 0, "cuda_graph": None}


def recorded_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the steps of the passes that are replayed, as they come."""
    replayed: list[int] = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(1), real(graph))[1])
    return replayed


@pytest.mark.parametrize("accum", [1, 3])
def test_recorded_passes_train_to_the_same_bits(
    subject: Subject, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accum: int
) -> None:
    """State, losses, and the census of every step: every module, and codes that are revived."""
    needs_cuda(subject, "recorded passes")
    replayed, outcomes = recorded_passes(monkeypatch), []
    for cuda_graph in (False, True):
        folder = tmp_path / str(cuda_graph)
        asked = options(text, cuda_graph=cuda_graph, run=folder, accum=accum, log_interval=1)
        outcomes.append(outcome(folder, train(asked).summary))
        # Two graphs a pass, of all passes but the first two.
        assert len(replayed) == (2 * (9 * accum - LAUNCHED_FIRST) if cuda_graph else 0)
    assert outcomes[1] == outcomes[0]
    assert any(line["codebooks"]["shared_vq.bridge.tables.text"]["dead"] for line in outcomes[0][0][1:])


def test_a_recorded_pass_whose_loss_is_not_finite_changes_nothing(
    subject: Subject, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is NaN for windows that begin in a certain way, inside of the graph as outside: some of them in most steps."""
    needs_cuda(subject, "recorded passes without a finite loss")
    real = ArbModel.losses

    def losses(model: ArbModel, ids_BT: Tensor) -> dict[str, Tensor]:
        found = real(model, ids_BT)
        if not torch.is_grad_enabled():
            return found
        return {**found, "bytes": torch.where(ids_BT[0, 0] % 3 == 0, math.nan, found["bytes"])}

    monkeypatch.setattr(ArbModel, "losses", losses)
    outcomes = []
    for cuda_graph in (False, True):
        folder = tmp_path / str(cuda_graph)
        asked = options(text, cuda_graph=cuda_graph, run=folder, accum=2, steps=12)
        outcomes.append(outcome(folder, train(asked).summary))
    assert 4 < outcomes[0][1]["skipped"] < 20
    assert outcomes[1] == outcomes[0]


def test_a_recorded_run_that_was_killed_is_resumed_to_the_same_bits(
    subject: Subject, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with passes launched from Python, and records others than before."""
    needs_cuda(subject, "recorded passes after a kill")
    whole, folder = train(options(text, cuda_graph=True, save=False)).summary, tmp_path / "run"
    real = loop._step

    def dying(run: Any, *, measured: bool) -> dict[str, Any] | None:
        if run.step == 7:
            raise KeyboardInterrupt
        return real(run, measured=measured)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(options(text, cuda_graph=True, run=folder))
    resumed = train(TrainOptions(run=folder, resume=True)).summary
    assert resumed["cuda_graph"] and resumed["state_sha256"] == whole["state_sha256"]
