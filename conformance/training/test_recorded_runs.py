"""Runs whose passes are recorded and replayed end as runs whose passes are launched: state, losses, census."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.options import CHANGES, TrainOptions
from arbitor.optimized.training.plan import decide, preset_config
from arbitor.optimized.training.recording import LAUNCHED_FIRST
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.moe import SharedProjectionMoE
from conformance.subject import Subject, needs_cuda
from conformance.training.nano import NANO_DEFAULTS, WHOLE
from conformance.training.runs import replays, train_until_killed

SAMPLED = NANO_DEFAULTS["sample_bytes"] - 1 - LAUNCHED_FIRST
"""Steps of generation that a run replays at its end. The first byte comes with the prompt."""

MORE = {"preset": "whole", "steps": 9, "batch": 16, "context": 34}
"""A run in which neighbours are found and codes are revived."""


def options(text: Path, *, cuda_graph: bool, **changes: Any) -> TrainOptions:
    plain = TrainOptions(data=str(text), device="cuda", cuda_graph=cuda_graph, **MORE)
    return replace(plain, **changes)


def outcome(folder: Path | None, summary: dict[str, Any]) -> tuple[Any, ...]:
    """Return what does not depend on how passes were launched, nor on the clock."""
    assert folder is not None
    clocks = {"seconds": 0, "tokens_per_second": 0}
    lines = [{**line, **clocks} for line in read_metrics(folder / "metrics.jsonl")]
    return lines, {**summary, "seconds": 0, "cuda_graph": None, "recorded_passes": None}


VARIANTS: dict[str, dict[str, Any]] = {
    "every module": {},
    "two layers, float32": {"num_layers": 2, "dtype": "float32"},
    "nodes of what a batch needs, candidates": {
        "num_codes": 3000,
        "code_search": "candidates",
        "sign_bits": 6,
        "num_probes": 3,
    },
    "the chosen experts alone": {"num_experts": 206},
    "more experts than slots": {"num_experts": 700, "batch": 4},
    "plain gradients, scales that stay": {"orthogonal_steps": 0, "exponent_rule": "frozen"},
    "three micro-batches, signs of scores": {"exponent_rule": "sign", "accum": 3},
    "gradients led by their mean": {"average_gradients": True, "average_memory": 3},
}
"""Fields of the model and settings of the run that take other paths."""


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_passes_train_to_the_same_bits(
    subject: Subject, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """State, losses, and the census of every step."""
    needs_cuda(subject, f"recorded passes: {name}")
    first, second = (
        variant(text, tmp_path, name, cuda_graph=False),
        variant(text, tmp_path, name, cuda_graph=True),
    )
    replayed, steps, passes = replays(monkeypatch), 9, 9 * (second.accum or 1) - LAUNCHED_FIRST
    launched = outcome(first.run, train(first).summary)
    assert not replayed
    assert outcome(second.run, train(second).summary) == launched
    # The census of each step has had the notes delivered, so each step is launched.
    assert len(replayed) == 2 * passes + SAMPLED
    replayed.clear()
    rarely = train(replace(second, run=tmp_path / "rarely", log_interval=steps)).summary
    assert rarely["state_sha256"] == launched[1]["state_sha256"]
    replayed_steps = 0 if second.accum else steps - LAUNCHED_FIRST - 1
    assert len(replayed) == 2 * passes + replayed_steps + SAMPLED


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_of_recorded_passes_are_runs(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On the CPU, where they are launched: what the test above compares exists, and moves."""
    took_all: set[bool] = set()
    real = SharedProjectionMoE.takes_all

    def takes_all(moe: SharedProjectionMoE, num_positions: int) -> bool:
        taken = real(moe, num_positions)
        if torch.is_grad_enabled():
            took_all.add(taken)
        return taken

    monkeypatch.setattr(SharedProjectionMoE, "takes_all", takes_all)
    asked = replace(variant(text, tmp_path, name, cuda_graph=False), device="cpu", dtype=None, steps=2)
    summary = train(asked).summary
    start = ArbModel(preset_config(str(asked.preset)), seed=0)
    assert summary["state_sha256"] != state_sha256(start.state()) and not summary["recorded_passes"]
    # The products of all experts would be of more than DENSE_RANKS ranks.
    assert took_all == {"num_experts" not in VARIANTS[name]}


def variant(text: Path, folder: Path, name: str, *, cuda_graph: bool) -> TrainOptions:
    """Return a run that logs every step, of the preset `whole` with fields exchanged."""
    changes = dict(VARIANTS[name])
    settings = {key: changes.pop(key) for key in ("dtype", "batch", "accum") if key in changes}
    preset = folder / "preset.json"
    preset.write_text(replace(WHOLE, **changes).to_json())
    run = folder / f"run-{cuda_graph}"
    return options(text, cuda_graph=cuda_graph, preset=str(preset), run=run, log_interval=1, **settings)


@pytest.mark.parametrize("accum", [1, 2])
def test_a_recorded_pass_whose_loss_is_not_finite_changes_nothing(
    subject: Subject, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accum: int
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
        asked = options(
            text, cuda_graph=cuda_graph, run=folder, accum=accum, steps=24 // accum, log_interval=5
        )
        outcomes.append(outcome(folder, train(asked).summary))
    assert 4 < outcomes[0][1]["skipped"] < 20
    assert outcomes[1] == outcomes[0]


def test_a_recorded_run_that_was_killed_is_resumed_to_the_same_bits(
    subject: Subject, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with passes launched from Python, and records others than before."""
    needs_cuda(subject, "recorded passes after a kill")
    whole, folder = train(options(text, cuda_graph=True, save=False, steps=14)).summary, tmp_path / "run"
    train_until_killed(7, options(text, cuda_graph=True, run=folder, steps=14))
    replayed = replays(monkeypatch)
    resumed = train(TrainOptions(run=folder, resume=True)).summary
    # The last checkpoint is of step 6.
    passes = 14 - 6 - LAUNCHED_FIRST
    # Every second step is counted by the census, and launched.
    assert len(replayed) == 2 * passes + passes // 2 + SAMPLED
    assert resumed["state_sha256"] == whole["state_sha256"]


def test_a_run_from_before_an_option_goes_on_without_it() -> None:
    recorded = decide(TrainOptions(preset="nano"), None).as_json()
    for name in CHANGES:
        del recorded[name]
    assert decide(TrainOptions(), recorded).as_json() == decide(TrainOptions(preset="nano"), None).as_json()
    with pytest.raises(
        TrainingError, match="started with sign_votes False and cannot go on with sign_votes True"
    ):
        decide(TrainOptions(sign_votes=True), recorded)


@pytest.mark.parametrize("changes", [{"backend": "reference"}, {"device": "cpu"}])
def test_a_run_goes_on_elsewhere_although_its_passes_were_recorded(changes: dict[str, str]) -> None:
    first = decide(TrainOptions(preset="nano", cuda_graph=True), None)
    recorded = {**first.as_json(), "device": "cuda", "backend": "triton"}
    assert decide(TrainOptions(), recorded).cuda_graph is True
    assert decide(TrainOptions(**changes), recorded).cuda_graph is None  # type: ignore[arg-type]
