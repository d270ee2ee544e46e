"""Runs that end early, by a kill, a signal or a damaged file, and go on."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arbitor.optimized.training import run as run_module
from arbitor.optimized.training.checkpoint import Checkpoint, load_checkpoint
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.facts import read_facts
from arbitor.optimized.training.loop import opened, train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.options import ROWS, TrainOptions
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.run_header import NEEDED, Progress
from arbitor.optimized.training.runtime import Stopped
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from arbitor.reference.types import TernaryWeight
from conformance.training.forge import forged
from conformance.training.nano import NANO, TEXT, WHOLE
from conformance.training.runs import options, train_until_killed


def test_train_remembers_the_best_model_from_before_it_was_killed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    # The untrained model is no candidate.
    script = {0: 1.0, 2: 4.0, 4: 5.0, 6: 4.5, 8: 4.25}

    def scripted(*arguments: object, **named: object) -> float:
        return script[len(steps_taken)]

    steps_taken: list[int] = []
    real = run_module.Run._take_step

    def counted(state: Any, *, measured: bool) -> dict[str, Any] | None:
        result = real(state, measured=measured)
        steps_taken.append(1)
        return result

    monkeypatch.setattr(run_module, "validation_bpb", scripted)
    monkeypatch.setattr(run_module.Run, "_take_step", counted)
    train_until_killed(5, options(text, run, eval_interval=2, save_interval=5))
    assert load_checkpoint(run / "latest.safetensors").best_bpb == 4.0
    summary = train(TrainOptions(run=run, resume=True)).summary
    assert (summary["best_bpb"], summary["val_bpb"]) == (4.0, 4.25)
    assert load_checkpoint(run / "best.safetensors").step == 2


def test_a_resumed_run_holds_its_model_once(text: Path, tmp_path: Path) -> None:
    """The tensors that were read from the checkpoint are as large as the model, and nothing needs them again."""
    run = tmp_path / "run"
    train(options(text, run, steps=4))
    # Other tests may hold theirs.
    before = with_tensors()
    with opened(TrainOptions(run=run, resume=True, steps=5), None) as resumed:
        assert resumed.step == 4
        gc.collect()
        assert not [each for each in with_tensors() if not any(each is other for other in before)]


def with_tensors() -> list[Checkpoint]:
    """Return the checkpoints of this process that hold the tensors of a model."""
    return [each for each in gc.get_objects() if type(each) is Checkpoint and each.state]


def test_a_run_keeps_its_number_of_threads(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every pass of every life, on whatever machine it goes on. Torch is told the number in the first life too, as MKL takes it
    for the largest number until then."""
    machine, told, seen = [7], [], set()
    take = run_module.Run._take_pass

    def tell(count: int) -> None:
        machine[0] = count
        told.append(count)

    def watched(run: run_module.Run, *arguments: Any) -> Any:
        seen.add(torch.get_num_threads() if told else None)
        return take(run, *arguments)

    # Of a machine that would be too slow here if the threads were real.
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine[0])
    monkeypatch.setattr(torch, "set_num_threads", tell)
    monkeypatch.setattr(run_module.Run, "_take_pass", watched)
    run = tmp_path / "run"
    for step in (2, 5):
        asked = options(text, run) if step == 2 else TrainOptions(run=run, resume=True)
        train_until_killed(step, asked)
        if step == 2:
            # Only its settings are left.
            for path in set(run.iterdir()) - {run / "config.json"}:
                path.unlink()
        machine[0] = 3
    summary = train(TrainOptions(run=run, resume=True)).summary
    assert seen == {7} and summary["threads"] == 7 and machine == [3]


def outcome(folder: Path, summary: dict[str, Any]) -> tuple[object, ...]:
    """What two runs that are the same must agree in."""
    columns = ("step", "train_bpb", "val_bpb", "rate", "flip_rate")
    metrics = [[line.get(name) for name in columns] for line in read_metrics(folder / "metrics.jsonl")]
    best = load_checkpoint(folder / "best.safetensors").state_sha256
    return {**summary, "seconds": 0}, metrics, best


def test_train_killed_and_resumed_ends_the_same(text: Path, tmp_path: Path) -> None:
    outcomes = []
    for accum_votes in (None, True):
        asked = {"accum": 2, "accum_votes": accum_votes}
        whole = outcome(
            tmp_path / f"{accum_votes}", train(options(text, tmp_path / f"{accum_votes}", **asked)).summary
        )
        # Before any save but the first, after it, just after one, and in the last step.
        for step in (0, 1, 4, 7):
            folder = tmp_path / f"killed-{accum_votes}-{step}"
            train_until_killed(step, options(text, folder, **asked))
            assert outcome(folder, train(TrainOptions(run=folder, resume=True)).summary) == whole
        outcomes.append(whole[0])
    assert outcomes[0]["state_sha256"] != outcomes[1]["state_sha256"]


def test_a_run_from_before_gradients_were_summed_goes_on_with_votes(text: Path, tmp_path: Path) -> None:
    """Whose micro-batches voted one by one. It cannot go on with sums, nor a run with sums with such votes."""
    expected = train(options(text, tmp_path / "whole", accum=2, accum_votes=True)).summary
    folder = tmp_path / "old"
    train_until_killed(5, options(text, folder, accum=2, accum_votes=True))
    for path in folder.glob("*.safetensors"):
        forged(path, lambda tensors, header: header["run"].pop("accum_votes"))
    config = json.loads((folder / "config.json").read_text())
    del config["run"]["accum_votes"]
    (folder / "config.json").write_text(json.dumps(config))
    rates = read_facts(RunFolder(folder))[0].planned_rate()
    with pytest.raises(
        TrainingError, match="started with accum_votes True and cannot go on with accum_votes False"
    ):
        train(TrainOptions(run=folder, resume=True, accum_votes=False))
    summary = train(TrainOptions(run=folder, resume=True)).summary
    assert {**summary, "seconds": 0} == {**expected, "seconds": 0}
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] > 5]
    assert lines and all(line["rate"] == rates(line["step"] - 1) for line in lines if "rate" in line)
    train(options(text, tmp_path / "sums", accum=2))
    with pytest.raises(
        TrainingError, match="started with accum_votes False and cannot go on with accum_votes True"
    ):
        train(TrainOptions(run=tmp_path / "sums", resume=True, accum_votes=True))


def test_train_killed_and_resumed_ends_the_same_with_every_module(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters, neighbours, strengths and loads come back. Codes are revived before the kill and after it."""
    more = {"preset": "whole", "steps": 9, "batch": 16, "context": 34}
    expected = outcome(tmp_path / "whole", train(options(text, tmp_path / "whole", **more)).summary)
    final = load_checkpoint(tmp_path / "whole" / "final.safetensors").state
    still = {name for name, table in ArbModel(WHOLE).tables().items() if torch.equal(final[name], table)}
    untouched = ("tables.image.usage", "tables.audio.usage", "leak_shifts")
    assert len(still) == 3 and all(name.endswith(untouched) for name in still)

    revived: list[int] = []
    real = reference_ops.revive_codes

    def watched(weight: TernaryWeight, *arguments: Any, out: TernaryWeight, **named: Any) -> TernaryWeight:
        before = weight.packed.clone()
        result = real(weight, *arguments, out=out, **named)
        if not torch.equal(before, out.packed):
            revived.append(named["first"])
        return result

    monkeypatch.setattr(reference_ops, "revive_codes", watched)
    folder = tmp_path / "killed"
    train_until_killed(7, options(text, folder, **more))
    assert load_checkpoint(folder / "latest.safetensors").step == 6
    assert revived
    revived.clear()
    assert outcome(folder, train(TrainOptions(run=folder, resume=True)).summary) == expected
    assert revived


def test_train_killed_and_resumed_reports_nothing_twice_and_nothing_wrong(text: Path, tmp_path: Path) -> None:
    """Killed in step 5, resumed at step 3. Of line 4 only what spans steps differs: no drift, and the loads of one step."""

    def reports(folder: Path) -> dict[int, dict[str, Any]]:
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
        return {line["step"]: line for line in lines[1:]}

    more = {"preset": "whole", "context": 34}
    train(options(text, tmp_path / "whole", **more))
    train_until_killed(4, options(text, tmp_path / "killed", **more))
    assert not (tmp_path / "killed" / "report.png").exists()
    train(TrainOptions(run=tmp_path / "killed", resume=True))
    whole, resumed = reports(tmp_path / "whole"), reports(tmp_path / "killed")
    for step in (2, 6, 8):
        for group in ("kinds", "codebooks", "experts", "flip_rate"):
            assert resumed[step][group] == whole[step][group]
    for kind, numbers in whole[4]["kinds"].items():
        assert resumed[4]["kinds"][kind] == {k: v for k, v in numbers.items() if k != "drift"}
        assert "drift" in numbers and "drift" not in whole[2]["kinds"][kind]
    for layer, loads in whole[4]["experts"].items():
        assert 2 * sum(resumed[4]["experts"][layer]["load"]) == sum(loads["load"])


def test_train_resumed_after_its_end_changes_nothing(text: Path, tmp_path: Path) -> None:
    first = train(options(text, tmp_path / "run")).summary
    again = train(TrainOptions(run=tmp_path / "run", resume=True)).summary
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_train_resumes_from_the_previous_checkpoint_where_the_latest_is_damaged(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = train(options(text, folder)).summary
    content = bytearray((folder / "latest.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "latest.safetensors").write_bytes(content)
    out = io.StringIO()
    again = train(TrainOptions(run=folder, resume=True), console=Console(file=out, width=300)).summary
    assert again["state_sha256"] == first["state_sha256"]
    assert "at step 6" in out.getvalue()
    assert "latest.safetensors' is refused" in capsys.readouterr().err
    assert load_checkpoint(folder / "previous.safetensors").step == 6


def test_train_with_no_checkpoint_left_refuses(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(options(text, folder))
    for name in ("latest", "previous"):
        (folder / f"{name}.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="no checkpoint is left to resume from"):
        train(TrainOptions(run=folder, resume=True))


def test_train_refuses_to_resume_with_other_data(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(options(text, folder))
    same = tmp_path / "same.txt"
    same.write_bytes(TEXT)
    train(TrainOptions(run=folder, resume=True, data=str(same)))
    text.write_bytes(TEXT[:-1] + b"!")
    with pytest.raises(TrainingError, match=r"started with data .*text\.txt.* and cannot go on with data"):
        train(TrainOptions(run=folder, resume=True, data=str(text)))


def test_train_refuses_to_resume_another_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options(text, tmp_path / "run"))
    monkeypatch.setitem(PRESETS, "nano", replace(NANO, theta=17))
    says = (
        "started with theta 64 and cannot go on with theta 17, which its preset 'nano' has now: put the preset back, or begin "
        r"another run with the weights \(--init-from\)$"
    )
    with pytest.raises(TrainingError, match=says):
        train(TrainOptions(run=tmp_path / "run", resume=True))
    # Nor does a run that was killed before its first checkpoint begin as another.
    for path in set((tmp_path / "run").iterdir()) - {tmp_path / "run" / "config.json"}:
        path.unlink()
    with pytest.raises(TrainingError, match=says):
        train(TrainOptions(run=tmp_path / "run", resume=True))


def make_old(document: dict[str, Any], *, model: str) -> None:
    """Take out of a header or a ``config.json`` what has been added since checkpoints were first written."""
    first = {*NEEDED, "data", "threads"}
    document["run"] = {name: value for name, value in document["run"].items() if name in first}
    document["progress"] = {}
    document[model] = {
        field.name: document[model][field.name]
        for field in fields(ArbConfig)
        if document[model][field.name] != field.default
    }


@pytest.mark.parametrize("saves", [True, False], ids=["checkpoint", "config alone"])
def test_a_run_from_before_settings_were_added_goes_on(text: Path, tmp_path: Path, saves: bool) -> None:
    """It ends as it would have, and then has every setting, counter and field."""
    expected = train(options(text, None, save=False)).summary
    folder = tmp_path / "run"
    train_until_killed(5, options(text, folder))
    for path in folder.iterdir():
        if path.suffix == ".safetensors" and saves:
            forged(path, lambda tensors, header: make_old(header, model="config"))
        elif path.name != "config.json" and not saves:
            path.unlink()
    config = json.loads((folder / "config.json").read_text())
    make_old(config, model="model")
    (folder / "config.json").write_text(json.dumps(config))
    read_facts(RunFolder(folder))
    summary = train(TrainOptions(run=folder, resume=True)).summary
    assert {**summary, "seconds": 0} == {**expected, "seconds": 0}
    latest = load_checkpoint(folder / "latest.safetensors")
    assert latest.config == json.loads(NANO.to_json()) and latest.run.keys() > ROWS.keys()
    assert latest.progress.keys() == vars(Progress()).keys()


def test_a_run_with_a_setting_of_another_version_does_not_go_on(text: Path, tmp_path: Path) -> None:
    """What the setting decides would be lost without a word. The run can still be read."""
    folder = tmp_path / "run"
    train_until_killed(5, options(text, folder))

    def add(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header["run"]["volume"] = 7

    forged(folder / "latest.safetensors", add)
    assert read_facts(RunFolder(folder))[0].step == 4
    with pytest.raises(
        TrainingError, match="has the setting volume 7, which this program does not know: go on with the"
    ):
        train(TrainOptions(run=folder, resume=True))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_stops_between_two_steps_on_a_signal(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    real = run_module.Run._take_step
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def signalled(run: Any, *, measured: bool) -> dict[str, Any] | None:
        if run.step == 4:
            os.kill(os.getpid(), number)
        return real(run, measured=measured)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_take_step", signalled)
        with pytest.raises(
            Stopped, match=rf"stopped by {number.name} after step 5 of 8; the checkpoint"
        ) as caught:
            train(options(text, tmp_path / "run"))
    assert caught.value.signal_number == number
    assert load_checkpoint(tmp_path / "run" / "latest.safetensors").step == 5
    # Who sends SIGTERM does not wait for a picture.
    assert (tmp_path / "run" / "report.png").exists() == (number == signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = train(TrainOptions(run=tmp_path / "run", resume=True)).summary
    assert resumed["state_sha256"] == train(options(text, None, save=False)).summary["state_sha256"]
