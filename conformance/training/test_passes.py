"""Passes that are recorded and replayed do what passes launched from Python do: the same bits, the same refusals."""

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
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.plan import decide, preset_config
from arbitor.optimized.training.recording import LAUNCHED_FIRST, records
from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.graph import ArbModel, TernaryEmbedding
from conformance.compare import exact
from conformance.graph import models
from conformance.report import needs_cuda
from conformance.subject import Subject
from conformance.training.nano import NANO_DEFAULTS, WHOLE
from conformance.training.runs import Killed, kill_at

SAMPLED = NANO_DEFAULTS["sample_bytes"] - 1 - LAUNCHED_FIRST
"""Steps of generation that a run replays at its end. The first byte comes with the prompt."""

MORE = {"preset": "whole", "steps": 9, "batch": 16, "context": 34}
"""A run in which neighbours are found and codes are revived."""


def test_what_a_pass_leaves_can_be_told_later() -> None:
    """With its notes taken back a pass has left votes alone. With the notes left again the next step is that of any pass."""
    lively = replace(models.WHOLE, theta=1, theta_e=1)
    direct, held = models.whole(lively), models.whole(lively)
    for step in (2, 3):
        ids_BT = models.random_ids(3, 24, seed=step)
        direct.backward(direct.losses(ids_BT), rate=models.RATE, step=step)
        direct.step()
        with held.voting.taking(rate=models.RATE, step=step):
            held.objective(held.losses(ids_BT)).backward()  # type: ignore[no-untyped-call]
        left, held.voting.notes = held.voting.notes, []
        before = held.tables(), {name: w.packed.clone() for name, w in held.weights().items()}
        tables = {name: table.clone() for name, table in before[0].items()}
        # The recording holds nothing.
        held.step()
        assert all(torch.equal(tables[name], table) for name, table in held.tables().items())
        assert all(torch.equal(before[1][name], w.packed) for name, w in held.weights().items())
        held.voting.leave([note.on(torch.clone) for note in left], step=step)
        held.step()
        assert not all(torch.equal(tables[name], table) for name, table in held.tables().items())
        for name, want in direct.state().items():
            exact(held.state()[name], want, name)


class Launches:
    """Stands in for a CUDA graph where there is none: a replay launches what was recorded."""

    def __init__(self, run: Any) -> None:
        self.replay = run


def step_without_a_trace(model: ArbModel) -> None:
    """Step the weights and leave no note of it in the modules, as a replay runs no Python."""
    modules, version = model.ternary_modules().values(), model.voting.version
    kept = [
        (module, module.voted, module.steps, list(getattr(module, "used_rows", ()))) for module in modules
    ]
    model.step_weights()
    for module, voted, steps, rows in kept:
        module.voted, module.steps = voted, steps
        if isinstance(module, TernaryEmbedding):
            module.used_rows[:] = rows
    model.voting.version = version


def test_passes_take_buffers_notes_and_refusals_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a recorded pass but the graphs, on the CPU: its buffers, what it leaves, and losses that are not finite.

    The first micro-batches are refused: nothing is recorded before a backward pass has run. Then whole steps, and parts of one.
    """
    records_at: list[int] = []

    def record(passes: RecordedPasses) -> tuple[Any, Any]:
        records_at.append(len(outcomes))
        return Launches(passes._forward), Launches(passes._backward)

    real = ArbModel.losses

    def losses(model: ArbModel, ids_BT: Tensor) -> dict[str, Tensor]:
        found = real(model, ids_BT)
        return {**found, "bytes": torch.where(ids_BT[0, 0] >= 200, math.nan, found["bytes"])}

    monkeypatch.setattr(ArbModel, "losses", losses)
    monkeypatch.setattr(RecordedPasses, "_record", record)
    lively = replace(models.WHOLE, theta=1, theta_e=1)
    both = [kind(ArbModel(lively, seed=3)) for kind in (Passes, RecordedPasses)]
    outcomes: list[list[float | None]] = []
    for micro_step in range(16):
        ids_BT = models.random_ids(3, 24, seed=micro_step)
        ids_BT[0, 0] = 200 if micro_step in (0, 1, 5, 8, 9) else 100
        outcomes.append([each.take(ids_BT, rate=models.RATE, step=micro_step) for each in both])
        if micro_step % 2:
            for each in both:
                each.model.step()
            for name, want in both[0].model.state().items():
                exact(both[1].model.state()[name], want, name)
    assert [launched for launched, _ in outcomes] == [replayed for _, replayed in outcomes]
    assert [step for step, (nats, _) in enumerate(outcomes) if nats is None] == [0, 1, 5, 8, 9]
    # Steps 2 and 3 were accepted.
    assert records_at == [4]
    start = ArbModel(lively, seed=3).tables()
    assert sum(not torch.equal(start[name], table) for name, table in both[1].model.tables().items()) > 5
    with pytest.raises(ValueError, match=r"ids_BT has shape \(1, 24\), but must have that of all passes"):
        both[1].take(models.random_ids(1, 24), rate=models.RATE, step=16)
    for wrong in ({"rate": 128.0}, {"step": -1}, {"step": 2**32}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
            both[1].take(models.random_ids(3, 24), **{"rate": 1.0, "step": 16, **wrong})


def test_at_rate_zero_a_recorded_pass_moves_nothing() -> None:
    passes = RecordedPasses(models.whole())
    before = {name: table.clone() for name, table in passes.model.tables().items()}
    weights = models.state_of(passes.model)
    # None of them is recorded, as there is no GPU here.
    for step in range(LAUNCHED_FIRST + 2):
        assert passes.take(models.random_ids(3, 24), rate=0.0, step=step) is not None
        passes.model.step()
    assert not models.changed_tensors(weights, passes.model)
    assert all(torch.equal(before[name], table) for name, table in passes.model.tables().items())


def test_what_can_be_recorded() -> None:
    gpu, no_kernels = (Runtime("cuda", backend, torch.bfloat16) for backend in ("triton", "reference"))
    cpu = Runtime("cpu", "triton", torch.float32)
    assert [records(asked, gpu, vote_rule="stochastic") for asked in (None, True, False)] == [
        True,
        True,
        False,
    ]
    for runtime, rule in ((no_kernels, "stochastic"), (cpu, "stochastic"), (gpu, "sign")):
        assert [records(asked, runtime, vote_rule=rule) for asked in (None, False)] == [False, False]
        said = (
            f"cuda_graph is True, .* device {runtime.device}, backend {runtime.backend} and vote rule {rule}"
        )
        with pytest.raises(ValueError, match=said):
            records(True, runtime, vote_rule=rule)


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


def options(text: Path, *, cuda_graph: bool, **changes: Any) -> TrainOptions:
    plain = TrainOptions(data=str(text), device="cuda", cuda_graph=cuda_graph, **MORE)
    return replace(plain, **changes)


def outcome(folder: Path, summary: dict[str, Any]) -> tuple[Any, ...]:
    """Return what does not depend on how passes were launched, nor on the clock."""
    clocks = {"seconds": 0, "tokens_per_second": 0}
    lines = [{**line, **clocks} for line in read_metrics(folder / "metrics.jsonl")]
    return lines, {**summary, "seconds": 0, "cuda_graph": None, "recorded_passes": None}


def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one with each graph that is replayed, two a pass."""
    counted: list[None] = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (counted.append(None), real(graph))[1])
    return counted


VARIANTS: dict[str, dict[str, Any]] = {
    "every module": {},
    "two layers, float32": {"num_layers": 2, "dtype": "float32"},
    "nodes of what a batch needs, candidates": {
        "num_codes": 3000,
        "code_search": "candidates",
        "sign_bits": 6,
        "num_probes": 3,
    },
    "every expert of every position": {"dense_dispatch_max_tokens": 10_000},
    "more experts than slots": {"num_experts": 700, "batch": 4},
    "plain gradients, scales that stay": {"orthogonal_steps": 0, "exponent_rule": "frozen"},
    "three micro-batches, signs of scores": {"exponent_rule": "sign", "accum": 3},
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
    replayed = replays(monkeypatch)
    outcomes = [
        outcome(asked.run, train(asked).summary) for asked in (first, second) if asked.run is not None
    ]
    assert len(replayed) == 2 * (9 * (second.accum or 1) - LAUNCHED_FIRST) + SAMPLED
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_of_recorded_passes_are_runs(text: Path, tmp_path: Path, name: str) -> None:
    """On the CPU, where they are launched: what the test above compares exists, and moves."""
    asked = replace(variant(text, tmp_path, name, cuda_graph=False), device="cpu", dtype=None, steps=2)
    summary = train(asked).summary
    start = ArbModel(preset_config(str(asked.preset)), seed=0)
    assert summary["state_sha256"] != state_sha256(start.state()) and not summary["recorded_passes"]


def variant(text: Path, folder: Path, name: str, *, cuda_graph: bool) -> TrainOptions:
    """Return a run that logs every step, of the preset `whole` with fields exchanged."""
    changes = dict(VARIANTS[name])
    settings = {key: changes.pop(key) for key in ("dtype", "batch", "accum") if key in changes}
    preset = folder / "preset.json"
    preset.write_text(replace(WHOLE, **changes).to_json())
    run = folder / f"run-{cuda_graph}"
    return options(text, cuda_graph=cuda_graph, preset=str(preset), run=run, log_interval=1, **settings)


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
    whole, folder = train(options(text, cuda_graph=True, save=False, steps=14)).summary, tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            train(options(text, cuda_graph=True, run=folder, steps=14))
    replayed = replays(monkeypatch)
    resumed = train(TrainOptions(run=folder, resume=True)).summary
    # The last checkpoint is of step 6.
    assert len(replayed) == 2 * (14 - 6 - LAUNCHED_FIRST) + SAMPLED
    assert resumed["state_sha256"] == whole["state_sha256"]
