"""Runs that go on from a finished one: with its weights, or with more steps. And what a run is judged by."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from arbitor import ArbModel as UserModel
from arbitor.optimized.training import beginning
from arbitor.optimized.training.beginning import begin_with
from arbitor.optimized.training.checkpoint import CheckpointError, load_checkpoint, state_sha256
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.monitor import Monitor
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.run import TrainResult
from arbitor.optimized.training.schedule import rate
from arbitor.reference.config import with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from arbitor.reference.types import TernaryWeight
from conformance.training.forge import first_element, forged
from conformance.training.nano import NANO, TEXT, WHOLE
from conformance.training.runs import Killed, options, train_until_killed

State = Mapping[str, TernaryWeight | Tensor]

OTHER_TEXT = b"".join(b"The number %d follows %d.\n" % (i + 1, i) for i in range(150))
"""Bytes that no run here has seen."""


@pytest.fixture
def source(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "source"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_bytes(OTHER_TEXT)
    return path


def best_of(run: Path) -> State:
    return load_checkpoint(run / "best.safetensors").state


def began(run: Path) -> dict[str, Any]:
    """What ``config.json`` says that a run began with."""
    document: dict[str, Any] = json.loads((run / "config.json").read_text())
    return document["beginning"]


def without_votes(state: State) -> State:
    """The state with empty accumulators."""

    def empty(weight: TernaryWeight) -> TernaryWeight:
        votes = {name: torch.zeros_like(getattr(weight, name)) for name in ("trit_accum", "exponent_accum")}
        return replace(weight, **votes)

    return {name: value if isinstance(value, Tensor) else empty(value) for name, value in state.items()}


def begin(run: Path, source: Path, other: Path, **more: Any) -> State:
    """Start a run with the weights of another, and return the state that it took its first step from."""
    train_until_killed(0, options(other, run, preset=None, init_from=str(source), **more))
    return load_checkpoint(run / "latest.safetensors").state


def test_a_run_begins_with_every_byte_of_another_and_no_votes(
    source: Path, other: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    UserModel.from_pretrained(source, device="cpu").save_pretrained(exported)
    best = best_of(source)
    assert state_sha256(best) != state_sha256(without_votes(best))
    sources = (source, exported, source / "best.safetensors")
    for place, each in enumerate(sources):
        run = tmp_path / f"run-{place}"
        state = begin(run, each, other, seed=5, steps=3)
        assert state_sha256(state) == state_sha256(without_votes(best))
        says = began(run)
        assert says["state_sha256"] == state_sha256(best)
        assert (says["fresh"], says["left_out"], set(says["kept"])) == ([], [], set(best))


def test_votes_are_kept_on_request(source: Path, other: Path, tmp_path: Path) -> None:
    """Then the run goes on from every byte of the source, and a run that begins without a source has none to keep."""
    state = begin(tmp_path / "run", source, other, keep_votes=True, steps=3)
    assert state_sha256(state) == state_sha256(best_of(source))
    assert began(tmp_path / "run")["has_votes"]
    with pytest.raises(ValueError, match="keep_votes is True, but does nothing without init_from"):
        train(options(other, tmp_path / "alone", keep_votes=True))


def test_a_run_with_the_weights_of_another_ends_the_same_when_killed(
    source: Path, other: Path, tmp_path: Path
) -> None:
    """Also where it is killed before its first checkpoint, and where its source is gone after it."""
    asked = {"preset": None, "init_from": str(source), "seed": 3}
    whole = train(options(other, tmp_path / "whole", **asked)).summary
    assert whole["state_sha256"] != train(options(other, None, save=False, seed=3)).summary["state_sha256"]
    for step in (0, 5):
        run = tmp_path / f"killed-{step}"
        train_until_killed(step, options(other, run, **asked))
        if step == 0:
            # As if it had been killed before that.
            (run / "latest.safetensors").unlink()
            (run / "best.safetensors").unlink()
        else:
            source.rename(tmp_path / "gone")
        assert {**train(TrainOptions(run=run, resume=True)).summary, "seconds": 0} == {**whole, "seconds": 0}
        assert began(run) == began(tmp_path / "whole")
    # Nor is a record that nobody can write again in the way of anything.
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"beginning": {', '"beginning": {"x": NaN,'))
    assert train(TrainOptions(run=run, resume=True)).summary["steps"] == 8


def test_a_run_killed_between_its_first_best_and_its_first_line_goes_on(
    source: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A best checkpoint is never alone: a folder that has one and no latest one could not be resumed."""

    def killed(*arguments: object) -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", killed)
        with pytest.raises(Killed):
            train(options(other, run, init_from=str(source), steps=2))
    assert (run / "best.safetensors").exists()
    assert train(TrainOptions(run=run, resume=True)).summary["steps"] == 2


def test_a_run_killed_before_its_first_checkpoint_begins_with_no_other_weights(
    source: Path, other: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begin(run, source, other)
    (run / "latest.safetensors").unlink()
    (run / "best.safetensors").unlink()
    shutil.copy(source / "previous.safetensors", source / "best.safetensors")
    with pytest.raises(TrainingError, match=r"started with the weights of .* which are there now"):
        train(TrainOptions(run=run, resume=True))


def test_what_a_run_begins_with_may_stay_its_best(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is a model that somebody trained, unlike weights that were drawn."""
    script = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("arbitor.optimized.training.run.validation_bpb", lambda *_, **__: next(script))
    summary = train(options(text, tmp_path / "run", init_from=str(source))).summary
    assert (summary["best_bpb"], summary["val_bpb"]) == (1.0, 3.0)
    assert load_checkpoint(tmp_path / "run" / "best.safetensors").step == 0


def test_a_model_that_grew_keeps_every_old_byte_and_draws_the_new(
    text: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and experts are added: the new parts are those of a new model, by their names."""
    small = with_fields(WHOLE, memory_rows=0, use_moe=False)
    monkeypatch.setitem(PRESETS, "small-whole", small)
    source, run = tmp_path / "source", tmp_path / "run"
    train(options(text, source, preset="small-whole", context=34, batch=2, steps=3))
    out = io.StringIO()
    train_until_killed(
        0,
        options(other, run, preset="whole", init_from=str(source), context=34, batch=2, seed=7),
        console=Console(file=out, width=1000),
    )
    state, old = load_checkpoint(run / "latest.safetensors").state, without_votes(best_of(source))
    new = ArbModel(WHOLE, seed=7).state()
    says = began(run)
    assert set(says["kept"]) | set(says["fresh"]) == set(new) and not set(says["kept"]) & set(says["fresh"])
    assert any(name.startswith("memory.") for name in says["fresh"])
    assert any(".moe." in name for name in says["fresh"])
    assert {"byte_head.vocabulary", "embedding.table", "graph.edges.neighbours"} <= set(says["kept"])
    assert not any(name.startswith("memory.") for name in says["kept"])
    for name, value in state.items():
        expected = old[name] if name in says["kept"] else new[name]
        assert state_sha256({name: value}) == state_sha256({name: expected}), name
    assert set(says["left_out"]) == set(old) - set(new)
    assert f"{len(says['kept'])} of {len(new)} parts are those of {source}" in out.getvalue()


def test_what_does_not_fit_is_named(
    source: Path,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A head that is half as wide begins anew, and the rest of the model does not."""
    monkeypatch.setitem(PRESETS, "thin", replace(NANO, head_inner=NANO.head_inner // 2))
    monkeypatch.setitem(PRESETS, "alien", replace(NANO, group_size=6))
    result = train(
        options(other, None, save=False, preset="thin", init_from=str(source), steps=1),
        console=Console(file=io.StringIO()),
    )
    assert result.summary["steps"] == 1
    said = capsys.readouterr().err
    assert f"begin anew, as {source} has no such parts that fit: byte_head.gate" in said
    assert "embedding.table" not in said
    with pytest.raises(TrainingError, match=r"no weight of .* fits the model"):
        begin_with(ArbModel(PRESETS["alien"]), str(source))


def test_a_table_goes_with_its_module(text: Path, tmp_path: Path) -> None:
    """Counts of the use of codes mean nothing for codes that begin anew; nor do integers that the model cannot have."""
    source = tmp_path / "source"
    train(options(text, source, preset="whole", context=34, batch=2, steps=2))
    grown = ArbModel(replace(WHOLE, code_dim=WHOLE.code_dim * 2))
    found = begin_with(grown, str(source))
    of_codes = {
        "shared_vq.bridge.tables.text",
        "shared_vq.bridge.tables.text.usage",
        "graph.edges.neighbours",
    }
    assert of_codes <= set(found.fresh)
    for name, table in grown.tables().items():
        if name in found.fresh:
            assert torch.equal(table, ArbModel(grown.config).tables()[name])


def test_names_are_many_at_most() -> None:
    names = tuple(f"part.{i}" for i in range(25))
    found = beginning.Beginning("x", 1, "0", ("a",), (), names, ()).all_warnings()
    assert len(found) == 1 and found[0].endswith("part.19 and 5 more")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: shutil.rmtree(run), "there is no such folder or file"),
        (lambda run: [path.unlink() for path in run.glob("*.safetensors")], "no checkpoint that can be used"),
        (
            lambda run: [path.write_bytes(b"x") for path in run.glob("*.safetensors")],
            "no checkpoint that can be used",
        ),
        (lambda run: (run / "config.json").unlink(), "preset is the file .*config.json"),
    ],
    ids=["missing", "empty", "damaged", "no config"],
)
def test_a_source_that_cannot_be_used_is_refused_before_anything_is_written(
    source: Path, other: Path, tmp_path: Path, change: Any, says: str
) -> None:
    change(source)
    with pytest.raises(TrainingError, match=says):
        train(options(other, tmp_path / "run", preset=None, init_from=str(source)))
    assert not (tmp_path / "run").exists()


def test_no_model_begins_with_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^there is no run, folder or checkpoint '.*nowhere'$"):
        begin_with(ArbModel(NANO), str(tmp_path / "nowhere"))
    with pytest.raises(
        TrainingError, match=r"^the folder '.*' holds no checkpoint: it is no run, and has no"
    ):
        begin_with(ArbModel(NANO), str(tmp_path))


def test_a_forged_source_is_refused(text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    train(options(text, source, preset="whole", context=34, batch=2, steps=1))
    forged(source / "best.safetensors", first_element("graph.edges.neighbours", 10**9))
    with pytest.raises(CheckpointError, match="neighbours holds 1000000000"):
        train(options(text, tmp_path / "run", preset=None, context=34, init_from=str(source)))


def test_a_file_without_a_suffix_names_no_model(source: Path, other: Path, tmp_path: Path) -> None:
    shutil.copy(source / "best.safetensors", tmp_path / "model")
    with pytest.raises(ValueError, match=r"init_from is .* but must be a folder or a file that ends in"):
        train(options(other, None, save=False, preset=None, init_from=str(tmp_path / "model")))
    asked = options(other, None, save=False, steps=1, init_from=str(tmp_path / "model"))
    assert train(asked).summary["steps"] == 1


# --- more steps


def longer(run: Path, steps: int) -> TrainResult:
    return train(TrainOptions(run=run, resume=True, steps=steps))


def rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["rate"] for line in read_metrics(run / "metrics.jsonl") if "rate" in line}


def outcome(run: Path, summary: dict[str, Any]) -> tuple[object, ...]:
    columns = ("step", "train_bpb", "val_bpb", "rate", "flip_rate")
    metrics = [[line.get(name) for name in columns] for line in read_metrics(run / "metrics.jsonl")]
    return {**summary, "seconds": 0}, metrics, load_checkpoint(run / "best.safetensors").state_sha256


def test_more_steps_have_the_rate_of_a_longer_run_from_there_on(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(options(text, run, log_interval=1, rate=5)).summary
    before = (run / "final.safetensors").read_bytes()
    summary = longer(run, 20).summary
    assert (first["steps"], summary["steps"]) == (8, 20)
    for step, found in rates(run).items():
        assert found == rate(step - 1, 8 if step <= 8 else 20, theta=NANO.theta, gain=5 / NANO.theta)
    assert (run / "final.safetensors").read_bytes() != before
    assert load_checkpoint(run / "final.safetensors").step == 20
    assert json.loads((run / "config.json").read_text())["run"]["steps"] == 20
    again = train(TrainOptions(run=run, resume=True)).summary
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_more_steps_killed_and_resumed_end_the_same(source: Path, tmp_path: Path) -> None:
    """Killed at once, before a save, and after one. Who resumes need not say the steps again."""
    whole = tmp_path / "whole"
    short = source
    shutil.copytree(short, whole)
    expected = outcome(whole, longer(whole, 16).summary)
    for step in (8, 10, 13):
        run = tmp_path / f"killed-{step}"
        shutil.copytree(short, run)
        train_until_killed(step, TrainOptions(run=run, resume=True, steps=16))
        if step == 10:
            # As if it had been killed between the checkpoint and the file.
            shutil.copy(short / "config.json", run / "config.json")
        assert outcome(run, train(TrainOptions(run=run, resume=True)).summary) == expected


def test_an_interrupted_run_may_be_given_more_steps(text: Path, tmp_path: Path) -> None:
    """In its flat part, long before either run falls, it ends as a run that had as many from the start."""
    train_until_killed(3, options(text, tmp_path / "run"))
    found = longer(tmp_path / "run", 10).summary
    assert found["state_sha256"] == train(options(text, None, save=False, steps=10)).summary["state_sha256"]


def test_fewer_steps_are_refused_and_more_are_announced(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run)
    with pytest.raises(TrainingError, match="started with steps 8 and cannot go on with steps 7"):
        longer(run, 7)
    out = io.StringIO()
    train(TrainOptions(run=run, resume=True, steps=9), console=Console(file=out, width=300))
    assert (
        "going on at step 8 of 8 with 9 steps in all: from here on the rate is that of a run of 9"
        in out.getvalue()
    )


# --- what a run is judged by


def test_a_run_is_judged_by_other_bytes_and_learns_from_all_of_its_own(
    text: Path, other: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    out = io.StringIO()
    summary = train(
        options(text, run, val_data=str(other), steps=2), console=Console(file=out, width=300)
    ).summary
    model = UserModel.from_pretrained(run / "final.safetensors", device="cpu")
    windows = len(OTHER_TEXT) // 16
    starts = [i * windows // 8 * 16 for i in range(8)]
    ids_WT = torch.tensor([list(OTHER_TEXT[start : start + 16]) for start in starts])
    with torch.no_grad():
        expected = sum(2 * model.loss(ids_WT[i : i + 2]).item() for i in range(0, 8, 2)) / 8 / NATS_PER_BIT
    assert summary["val_bpb"] == expected
    assert summary["val_data"] == str(other) and len(summary["val_data_sha256"]) == 64
    assert f"validation: {other}: 1 file, {len(OTHER_TEXT):,} bytes" in out.getvalue()
    assert "times what is there to learn from" in out.getvalue()


def test_a_run_with_val_data_ends_the_same_when_killed(text: Path, other: Path, tmp_path: Path) -> None:
    whole = train(options(text, tmp_path / "whole", val_data=str(other))).summary
    run = tmp_path / "run"
    train_until_killed(5, options(text, run, val_data=str(other)))
    moved = tmp_path / "moved.txt"
    other.rename(moved)
    summary = train(TrainOptions(run=run, resume=True, val_data=str(moved))).summary
    assert summary["state_sha256"] == whole["state_sha256"] and summary["val_bpb"] == whole["val_bpb"]
    moved.write_bytes(OTHER_TEXT[:-1] + b"!")
    with pytest.raises(
        TrainingError, match=r"started with val_data of SHA-256 .* cannot go on with val_data"
    ):
        train(TrainOptions(run=run, resume=True, val_data=str(moved)))


def test_val_data_that_cannot_be_is_refused(text: Path, source: Path, other: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.txt"
    same.write_bytes(TEXT)
    inner = text.parent / "inner"
    inner.mkdir()
    (inner / "a").write_bytes(OTHER_TEXT)
    short = tmp_path / "short.txt"
    short.write_bytes(b"0123456")
    for data, val_data, says in (
        (text, same, "has bytes of the data"),
        (text.parent, inner, "has bytes of the data"),
        (inner / "a", inner, "has bytes of the data"),
        (text, short, "has 7 bytes, too few for a context of 16"),
        (short, text, "the data .* has 7 bytes, too few"),
        (text, tmp_path / "missing", "cannot read the data"),
    ):
        with pytest.raises(TrainingError, match=says):
            train(options(data, None, save=False, val_data=str(val_data)))
    with pytest.raises(TrainingError, match="started without val_data and cannot go on with"):
        train(TrainOptions(run=source, resume=True, val_data=str(other)))
