"""Whole runs of the trainer, in this process."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from arbitor.optimized import settings
from arbitor.optimized.training import loop
from arbitor.optimized.training import run as run_module
from arbitor.optimized.training.baselines import NAMES
from arbitor.optimized.training.checkpoint import load_checkpoint, state_sha256
from arbitor.optimized.training.data import load_corpus, split_corpus, training_batch, validation_windows
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import validation_bpb
from arbitor.optimized.training.facts import RunFacts
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.monitor import Monitor
from arbitor.optimized.training.runtime import Stopped
from arbitor.optimized.training.schedule import rate
from arbitor.reference.audit import audit
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from conformance.training.nano import NANO, NANO_DEFAULTS, WHOLE
from conformance.training.runs import options


@pytest.mark.parametrize("accum_votes", [False, True])
def test_train_is_the_plain_recipe(text: Path, *, accum_votes: bool) -> None:
    """The same eight steps, written out: the gradients of two micro-batches are summed, or each votes, and then one step."""
    result = train(options(text, None, accum=2, accum_votes=accum_votes, seed=7, save=False))
    how = {"votes": 2} if accum_votes else {}
    corpus = load_corpus(str(text))
    split = split_corpus(corpus, 16)
    model = ArbModel(NANO, seed=7)
    for step in range(8):
        for micro_step in (2 * step, 2 * step + 1):
            ids = training_batch(corpus, split, batch=2, context=16, seed=7, micro_step=micro_step)
            size = rate(step, 8, **how)
            model.backward(model.losses(ids), rate=size, step=micro_step, accum=1 if accum_votes else 2)
        model.step()
    assert result.summary["state_sha256"] == state_sha256(model.state())
    assert result.folder is None


def test_the_time_of_a_run_is_that_of_its_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the page as in the summary: drawing a sample, here an hour long, is no part of it."""
    late, facts = [0.0], {}
    real_generate = run_module.generate

    def generate(*args: Any, **settings: Any) -> bytes:
        late[0] += 3600
        return real_generate(*args, **settings)

    def draw_page(path: Path, of_run: RunFacts) -> None:
        facts.update(of_run.words())

    monkeypatch.setattr(run_module, "generate", generate)
    monkeypatch.setattr(run_module, "draw_page", draw_page)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    summary = train(options(text, tmp_path / "run")).summary
    assert late[0] == 3600 > summary["seconds"] and facts["time"] == f"{summary['seconds']:,.0f} s"


@pytest.mark.usefixtures("pictures")
def test_train_writes_its_folder(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(options(text, folder))
    events = [name for name in os.listdir(folder) if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    assert sorted(set(os.listdir(folder)) - set(events)) == [
        "best.safetensors",
        "config.json",
        "final.safetensors",
        "latest.safetensors",
        "loss.png",
        "metrics.jsonl",
        "previous.safetensors",
        "report.png",
        "sample.txt",
        "summary.json",
    ]
    for picture in ("loss.png", "report.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert tuple(summary["baselines"]) == NAMES
    assert (summary["steps"], summary["preset"], summary["seed"], summary["skipped"]) == (8, "nano", 0, 0)
    assert summary["seconds"] > 0 and summary["weights"] == audit(NANO).weights
    final = load_checkpoint(folder / "final.safetensors")
    assert final.state_sha256 == summary["state_sha256"]
    assert load_checkpoint(folder / "latest.safetensors").state_sha256 == summary["state_sha256"]
    assert load_checkpoint(folder / "previous.safetensors").step == 6
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == json.loads(NANO.to_json())
    assert config["run"]["context"] == NANO_DEFAULTS["context"]
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in metrics if "val_bpb" in line] == [0, 4, 8]
    assert all(0 < line["train_bpb"] < 16 for line in metrics[1:])
    assert (folder / "sample.txt").read_bytes() == result.prompt + result.sample
    assert len(result.sample) == NANO_DEFAULTS["sample_bytes"]


def test_train_reports_bits_per_byte_of_the_final_and_of_the_best_model(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = train(options(text, folder)).summary
    corpus = load_corpus(str(text))
    windows = validation_windows(corpus, split_corpus(corpus, 16), count=8, context=16)
    for name, expected in (("final", summary["val_bpb"]), ("best", summary["best_bpb"])):
        model = ArbModel(NANO)
        model.load_state(load_checkpoint(folder / f"{name}.safetensors").state)
        with torch.no_grad():
            nats = torch.stack([model.loss(window[None]) for window in windows]).double().mean().item()
        assert expected == pytest.approx(nats / math.log(2), rel=1e-6)
    assert validation_bpb(model, windows, batch=3, device="cpu") == pytest.approx(
        summary["best_bpb"], rel=1e-6
    )
    seen = [line["val_bpb"] for line in read_metrics(folder / "metrics.jsonl") if line.get("val_bpb")]
    assert summary["best_bpb"] == min(seen[1:])


def test_losses_of_windows_are_summed_alike_by_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases before 3.12 rounded each sum of `sum`, and lost what is small beside the rest."""
    model, losses = ArbModel(NANO), iter([2.0**60, 100.0, 100.0])
    monkeypatch.setattr(ArbModel, "loss", lambda *_: torch.tensor(next(losses), dtype=torch.float64))
    bpb = validation_bpb(model, torch.zeros(3, 16, dtype=torch.int64), batch=1, device="cpu")
    assert bpb == (2.0**60 + 256.0) / 3 / math.log(2)


def test_train_learns(text: Path) -> None:
    summary = train(options(text, None, save=False, steps=40, batch=8)).summary
    assert summary["val_bpb"] < summary["baselines"]["unigram"] < 5


def test_train_of_every_module_beats_a_bigram_model(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as wide as the other tests have it, so that a few steps are enough."""
    wider = replace(WHOLE, embed_dim=24, width=48, shared_inner=40, head_inner=64)
    monkeypatch.setitem(PRESETS, "whole", wider)
    more = {"preset": "whole", "steps": 32, "batch": 8, "context": 34, "eval_interval": 32}
    summary = train(options(text, None, save=False, **more)).summary
    assert summary["val_bpb"] < summary["baselines"]["bigram"] < 2.1


def test_train_is_deterministic(text: Path) -> None:
    def digest(seed: int) -> str:
        return train(options(text, None, save=False, seed=seed)).summary["state_sha256"]

    first = digest(3)
    torch.manual_seed(5)
    torch.rand(7)
    assert digest(3) == first
    assert digest(4) != first


def test_train_does_not_depend_on_how_it_is_watched(text: Path, tmp_path: Path) -> None:
    plain = train(options(text, None, save=False)).summary
    watched = train(
        options(text, tmp_path / "run", log_interval=1, eval_interval=1, save_interval=1),
        console=Console(file=io.StringIO(), force_terminal=True),
    ).summary
    assert watched["state_sha256"] == plain["state_sha256"]
    assert watched["val_bpb"] == plain["val_bpb"]


def fault(monkeypatch: pytest.MonkeyPatch, faulty: set[int] | range, value: float) -> None:
    """Make the loss of some micro-batches not finite, as an overflow would: through the graph, not beside it."""
    real, count = ArbModel.losses, iter(range(10**6))

    def losses(model: ArbModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        result = real(model, ids)
        if torch.is_grad_enabled() and next(count) in faulty:
            result["bytes"] = result["bytes"] * value
        return result

    monkeypatch.setattr(ArbModel, "losses", losses)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_train_skips_a_loss_that_is_not_finite(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """Micro-batches 3, 8 and 9 of 16 fail: the run equals one in which they never were."""
    corpus = load_corpus(str(text))
    split = split_corpus(corpus, 16)
    model = ArbModel(NANO, seed=0)
    for step in range(8):
        for micro_step in (2 * step, 2 * step + 1):
            if micro_step not in (3, 8, 9):
                ids = training_batch(corpus, split, batch=2, context=16, seed=0, micro_step=micro_step)
                model.backward(model.losses(ids), rate=rate(step, 8), step=micro_step, accum=2)
        model.step()
    expected = state_sha256(model.state())
    fault(monkeypatch, {3, 8, 9}, value)
    summary = train(options(text, None, save=False, accum=2), console=Console(file=io.StringIO())).summary
    assert summary["state_sha256"] == expected
    assert summary["skipped"] == 3
    assert capsys.readouterr().err.count("the loss is not finite") == 1


def test_train_with_nothing_but_nan_changes_no_byte_and_gives_up(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch, range(10**6), math.nan)
    folder = tmp_path / "run"
    untouched = state_sha256(ArbModel(NANO, seed=0).state())
    assert train(options(text, folder)).summary["state_sha256"] == untouched
    with pytest.raises(
        TrainingError, match="not finite in 100 micro-batches in a row, up to step 100; they changed"
    ):
        train(options(text, tmp_path / "long", steps=150))
    assert (tmp_path / "long" / "report.png").exists()
    assert load_checkpoint(tmp_path / "long" / "latest.safetensors").state_sha256 == untouched


def test_train_gives_up_only_where_nothing_finite_comes_between(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "MAX_SKIPPED_IN_A_ROW", 3)
    fault(monkeypatch, {0, 1, 3, 4, 6, 7, 9, 10}, math.nan)
    assert train(options(text, None, save=False, accum=2)).summary["skipped"] == 8


def test_train_refuses_a_folder_that_holds_a_run(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(options(text, folder, steps=1))
    before = (folder / "latest.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run: continue it with --resume"):
        train(options(text, folder, steps=1))
    assert (folder / "latest.safetensors").read_bytes() == before


def test_train_creates_no_folder_for_a_run_it_refuses(text: Path, tmp_path: Path) -> None:
    for changes, error in (
        ({"preset": "none"}, ValueError),
        ({"data": str(tmp_path / "missing")}, TrainingError),
        ({"context": 4000}, TrainingError),
        ({"steps": 0}, ValueError),
    ):
        with pytest.raises(error):
            train(options(text, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


def test_train_refuses_a_folder_that_is_no_folder(text: Path) -> None:
    with pytest.raises(TrainingError, match="is a file, but must be a folder"):
        train(options(text, text))
    with pytest.raises(TrainingError, match="cannot use the run folder"):
        train(options(text, text / "below"))


def test_train_says_what_ended_it_although_its_metrics_are_torn(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(monitor: Monitor, step: int, values: Any) -> None:
        assert monitor._metrics is not None
        monitor._metrics.write('{"step": 0, "val_')
        monitor._metrics.flush()
        raise TrainingError("the disk is full")

    monkeypatch.setattr(Monitor, "log", torn)
    with pytest.raises(TrainingError, match="the disk is full"):
        train(options(text, tmp_path / "run"))
    assert not (tmp_path / "run" / "report.png").exists()


def test_train_without_saving_writes_no_checkpoint(text: Path, tmp_path: Path) -> None:
    train(options(text, tmp_path / "run", save=False))
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("save", "says"),
    [(False, "nothing was saved"), (True, "the checkpoint is written, go on with --resume")],
)
def test_a_run_that_is_asked_to_stop_says_what_is_saved(
    text: Path, tmp_path: Path, save: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes during the first step, and the run ends after it."""
    before = run_module.Run._take_pass

    def interrupted(run: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return before(run, *args)

    monkeypatch.setattr(run_module.Run, "_take_pass", interrupted)
    folder = tmp_path / "run" if save else None
    with pytest.raises(Stopped, match=f"stopped by SIGTERM after step 1 of 8; {says}"):
        train(options(text, folder, save=save))
    assert not save or load_checkpoint(tmp_path / "run" / "latest.safetensors").step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_while_it_starts_writes_nothing(
    text: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = loop.prepare

    def interrupted(*args: Any, **settings: Any) -> Any:
        signal.raise_signal(number)
        return prepare(*args, **settings)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        monkeypatch.setattr(loop, "prepare", interrupted)
        sentence = f"stopped by {number.name} before its first step; nothing was written"
        with pytest.raises(Stopped, match=sentence):
            train(options(text, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not (tmp_path / "run").exists()


def test_the_trainer_vouches_for_its_values_until_it_ends(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ops never wait for a device to look at ids and rows."""
    seen: list[bool] = []
    take = run_module.Run.take_steps

    def watched(run: run_module.Run) -> None:
        seen.append(settings.value_checks())
        take(run)

    monkeypatch.setattr(run_module.Run, "take_steps", watched)
    train(options(text, None, steps=1, save=False))
    assert seen == [False] and settings.value_checks()
