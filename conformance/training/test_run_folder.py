"""Run folders as accidents and strangers leave them: what cannot be trusted is refused, and nothing outside is touched."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from rich.console import Console

from arbitor.optimized.training import checkpoint as checkpoints
from arbitor.optimized.training import loop
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.run import TrainResult
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.whole_file import append_to, partial_of, rename, write_whole
from conformance.training import nano
from conformance.training.forge import Change, forged
from conformance.training.runs import options, train_until_killed


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that can be read without waiting."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if stat.S_ISREG(path.lstat().st_mode)}


def resume(run: Path, **changes: Any) -> str:
    """Resume a run, and return what it printed."""
    out = io.StringIO()
    train(TrainOptions(run=run, resume=True, **changes), console=Console(file=out, width=300))
    return out.getvalue()


def check_refused(run: Path, sentence: str) -> None:
    """To resume is refused with the sentence, and no byte of the folder is another."""
    before = content(run)
    with pytest.raises(TrainingError, match=sentence) as caught:
        resume(run)
    assert "\n" not in str(caught.value)
    assert content(run) == before


def test_resume_of_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"'.*none' is no folder of a run, so there is nothing to go on"):
        resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", "'.*empty' holds no run, so there is nothing to go on with")


@pytest.mark.parametrize("left", ["best.safetensors", "final.safetensors", "summary.json", "metrics.jsonl"])
def test_resume_of_a_run_whose_checkpoints_are_gone_is_refused(run: Path, left: str) -> None:
    """What is left of it is not overwritten; with nothing but its start left it starts again."""
    for path in run.iterdir():
        if path.name not in (left, "config.json"):
            path.unlink()
    check_refused(run, f"has {left} but neither latest.safetensors nor previous.safetensors")
    (run / left).unlink()
    assert "starting at step 0" in resume(run)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff", b'{"run": {}}', b"[" * 10**5, b'{"run": 1, "run": 2}']
)
def test_resume_without_checkpoint_or_config_is_refused(run: Path, damage: bytes) -> None:
    for path in run.iterdir():
        path.unlink()
    (run / "config.json").write_bytes(damage)
    check_refused(run, r"config\.json' (cannot be used|does not say how the run was started)")


def test_a_run_goes_on_without_the_file_of_its_preset(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "mine.json"
    preset.write_text(replace(nano.NANO, name="nano", theta=17).to_json())
    more = {"preset": str(preset), "steps": 6, "batch": 2, "context": 16, "save_interval": 2}
    train_until_killed(4, options(text, tmp_path / "run", **more))
    expected = train(options(text, tmp_path / "whole", **more)).summary["state_sha256"]
    preset.unlink()
    assert "at step 4" in resume(tmp_path / "run")
    assert "going on with the configuration that the run has recorded" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state_sha256"] == expected


def test_a_run_folder_that_cannot_be_written_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the first of the files in it that a run looks for: nobody has asked for that."""

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    check_refused(run, rf"^cannot write in the run folder '{run}': Read-only file system$")


def test_the_checkpoint_of_another_run_is_refused(run: Path, text: Path, tmp_path: Path) -> None:
    train(options(text, tmp_path / "other", seed=5))
    shutil.copy(tmp_path / "other" / "latest.safetensors", run)
    check_refused(run, r"is of another run: seed is 5 there and 0 in config\.json")


def setting(field: str, name: str, value: Any) -> Change:
    """Change an entry of a field of the header; None: remove it."""

    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header[field].pop(name, None)
        if value is not None:
            header[field][name] = value

    return change


def top(name: str, value: Any) -> Change:
    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (top("step", -5), "has -5 for step, but it is at least 0"),
        (top("step", 1000), "has 1000 for step, but its run has 8 steps"),
        (top("seed", 4), "has 4 for seed, but its run has 0"),
        (setting("run", "context", None), "the settings of its run have no context"),
        (setting("run", "data_sha256", None), "the settings of its run have no data_sha256"),
        (setting("run", "batch", "2"), "settings of its run are refused: batch is '2'"),
        (setting("run", "threads", 10**9), "have 1000000000 for threads, outside 1 to 4096"),
        (setting("progress", "losses", -1), "its progress has -1 for losses"),
        (
            setting("progress", "more", 1),
            "has an unknown more; another version of this program wrote it, and can go on",
        ),
        (
            setting("config", "volume", 7),
            "has an unknown volume; another version of this program wrote it, and can go on",
        ),
        (setting("run", "batch", "auto"), "batch is 'auto', but must be a whole number"),
        (setting("config", "num_layers", 2**31 - 1), "num_layers is 2147483647, but must be at most 1024"),
        (setting("config", "num_layers", 1000), "it has 1000 layers, but [0-9]+ weights and tables"),
        (setting("config", "width", 2**31 - 1), "its configuration is refused: shape .*2147483647"),
        (setting("config", "embed_dim", 12), r"'embedding.table' is .* there and .* here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forged_headers_are_refused_before_anything_is_written(
    run: Path, change: Change, sentence: str
) -> None:
    """Every digest fits. With the checkpoint before it sound, the run goes on from that."""
    latest, previous = run / "latest.safetensors", run / "previous.safetensors"
    sound = previous.read_bytes()
    forged(latest, change)
    shutil.copy(latest, previous)
    check_refused(run, rf"latest\.safetensors' is refused: .*{sentence}.*no checkpoint is left")
    previous.write_bytes(sound)
    assert "at step 6" in resume(run)
    assert load_checkpoint(latest).step == 8


def deep_header(sound: bytes) -> bytes:
    return (10**5).to_bytes(8, "little") + b"[" * 10**5 + sound


def deep_document(sound: bytes) -> bytes:
    text = json.dumps({"__metadata__": {"arbitor": '{"run":' * 10**5}}).encode()
    return len(text).to_bytes(8, "little") + text


def twice(sound: bytes) -> bytes:
    length = int.from_bytes(sound[:8], "little")
    header = sound[8 : 8 + length].rstrip()[:-1] + b', "__metadata__": {}}'
    return len(header).to_bytes(8, "little") + header + sound[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        deep_header,
        deep_document,
        twice,
        lambda sound: (2**40).to_bytes(8, "little") + sound,
        lambda sound: b"",
    ],
    ids=["deep header", "deep document", "twice", "long header", "empty"],
)
def test_whatever_is_wrong_with_the_latest_the_one_before_is_tried(
    run: Path, damage: Callable[[bytes], bytes]
) -> None:
    latest = run / "latest.safetensors"
    latest.write_bytes(damage(latest.read_bytes()))
    assert "at step 6" in resume(run)


def test_nothing_but_regular_files_is_read(run: Path) -> None:
    """A pipe would wait for ever."""
    latest = run / "latest.safetensors"
    latest.unlink()
    os.mkfifo(latest)
    (run / "previous.safetensors").rename(run / "kept")
    check_refused(run, "latest.safetensors' is damaged .*: it is a pipe, but must be a regular file")
    (run / "kept").rename(run / "previous.safetensors")
    (run / "config.json").unlink()
    (run / "config.json").symlink_to("/dev/zero")
    assert "at step 6" in resume(run)
    latest.unlink()
    os.mkfifo(latest)
    assert RunFolder(run).load_best(lambda refusal: None).step == 8
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl.*it is a pipe"):
        resume(run)
    refusals: list[str] = []
    for name in ("best", "final", "previous"):
        (run / f"{name}.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="holds no checkpoint that can be used"):
        RunFolder(run).load_best(refusals.append)
    assert len(refusals) == 4 and "it is a pipe" in refusals[2]


def test_a_sparse_file_takes_no_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of a model a few kilobytes large, and three GiB after it; also where a tensor claims them."""
    latest = run / "latest.safetensors"
    sound = latest.read_bytes()
    length = int.from_bytes(sound[:8], "little")

    def read(*arguments: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoints, "read_tensor", read)
    os.truncate(latest, 3 * 2**30)
    (run / "previous.safetensors").unlink()
    check_refused_without_reading(run, "its header says")
    header = json.loads(sound[8 : 8 + length])
    last = max(header, key=lambda name: header[name].get("data_offsets", [0, 0])[1])
    start, _ = header[last]["data_offsets"]
    header[last].update(shape=[2**30, 3], data_offsets=[start, start + 3 * 2**30], dtype="I8")
    text = json.dumps(header).encode()
    latest.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(latest, 8 + len(text) + start + 3 * 2**30)
    check_refused_without_reading(run, "is refused")


def check_refused_without_reading(run: Path, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        resume(run)


def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path) -> None:
    """Links in the places of all files that a run writes, and of their halves, point to files that stay as they are."""
    outside = tmp_path / "outside"
    outside.mkdir()
    names = ["config.json", "summary.json", "sample.txt", "report.png", "loss.png", "final.safetensors"]
    for name in (*names, "best.safetensors", "metrics.jsonl"):
        (outside / name).write_bytes((run / name).read_bytes())
        (run / name).unlink()
        (run / name).symlink_to(outside / name)
        (run / f".{name}.partial").symlink_to(outside / f"{name}.partial")
    (run / ".latest.safetensors.partial").symlink_to(outside / "latest")
    before = content(outside)
    resume(run)
    assert content(outside) == before


def test_a_device_or_a_folder_is_never_replaced_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that root asked for in /dev/null would take the place of the device."""
    other, folder = tmp_path / "other", tmp_path / "folder"
    other.write_bytes(b"content")
    folder.mkdir()
    monkeypatch.setattr(os, "replace", lambda source, target: pytest.fail(f"{target} was replaced"))
    for place, kind in ((folder, "a folder"), (Path(os.devnull), "a device")):
        for write in (lambda place=place: write_whole(place, b"x"), lambda place=place: rename(other, place)):
            with pytest.raises(OSError, match=f"it is {kind}, but must be a regular file"):
                write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "other"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_whatever_stops_a_file_leaves_nothing_beside_it(tmp_path: Path, error: type[BaseException]) -> None:
    def content(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(error):
        write_whole(tmp_path / "file", content)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_reset_that_is_started_again_is_refused(run: Path) -> None:
    """Nothing tells whether the folder holds the run that was to be removed, or the one that began in its place."""
    ranks = SimpleNamespace(restarts=1)
    assert loop._after_restart(TrainOptions(run=run), ranks).resume  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="reset cannot tell its folder"):
        loop._after_restart(TrainOptions(run=run, reset=True), ranks)  # type: ignore[arg-type]


def test_a_run_is_reset_with_its_codec_and_its_events(run: Path) -> None:
    (run / "codec.safetensors").write_bytes(b"a codec")
    (run / "mine.txt").write_bytes(b"mine")
    assert "codec.safetensors" in {path.name for path in RunFolder(run).files_there()}
    RunFolder(run).reset()
    assert {path.name for path in run.iterdir()} <= {"mine.txt", "adapter"}


def test_a_picture_is_never_drawn_through_a_link(tmp_path: Path) -> None:
    """Nor is a file that is whole written through a link put in the place of its half while the run goes on."""
    outside, path = tmp_path / "outside", tmp_path / "report.png"
    outside.write_bytes(b"mine")
    partial_of(path).symlink_to(outside)
    path.symlink_to(outside)
    write_whole(path, b"a picture")
    assert outside.read_bytes() == b"mine" and path.read_bytes() == b"a picture" and not path.is_symlink()
    (tmp_path / "log").symlink_to(outside)
    with pytest.raises(OSError):
        append_to(tmp_path / "log")


def test_a_link_to_nothing_is_a_run_too(text: Path, tmp_path: Path) -> None:
    """A new run would write its metrics through it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(TrainingError, match="already holds a run"):
        train(options(text, tmp_path / "run"))
    assert not (tmp_path / "outside").exists()


def test_a_bad_byte_costs_its_line_of_metrics_only(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"', b"\xff", 1)
    lines[2] = b"[" * 10**5 + b"\n"
    metrics.write_bytes(b"".join(lines))
    assert [line["step"] for line in read_metrics(metrics)] == [0, 6, 8]
    resume(run)
    assert metrics.read_bytes().splitlines(keepends=True) == [lines[0], *lines[3:]]


def test_a_finished_run_says_so(run: Path) -> None:
    assert "is finished: all of its 8 steps are taken" in resume(run)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(TrainingError, match=r"^cannot use the run folder '.*file/run': Not a directory$"),
        RunFolder(tmp_path / "file" / "run").owned(),
    ):
        pass


def test_runs_without_a_name_that_start_together_have_two(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and ends while the first still reads its data."""
    monkeypatch.chdir(tmp_path)
    real, second = loop.prepare, list[TrainResult]()

    def prepare(*args: Any, **more: Any) -> Any:
        if not second:
            monkeypatch.setattr(loop, "prepare", real)
            second.append(train(options(text, None)))
        return real(*args, **more)

    monkeypatch.setattr(loop, "prepare", prepare)
    first = train(options(text, None))
    assert (first.folder, second[0].folder) == (Path("runs/nano-001"), Path("runs/nano-002"))
    assert first.summary["state_sha256"] == second[0].summary["state_sha256"]


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_is_refused_leaves_no_folder(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Whether its data are refused, or the disk is full before the first file."""
    monkeypatch.chdir(tmp_path)
    run = Path("mine/run") if named else None
    with pytest.raises(TrainingError, match="missing"):
        train(options(tmp_path / "missing", run))
    assert os.listdir(tmp_path) == ["text.txt"]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"config\.json.*No space left on device"):
        train(options(text, run))
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_number_that_another_process_takes_first_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "nano-001").symlink_to("nowhere")
    real = Path.mkdir

    def faster(path: Path, *args: Any, **more: Any) -> None:
        if path.name == "nano-002":
            real(path)
        real(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", faster)
    with RunFolder.new("nano") as folder:
        assert folder.path == Path("runs/nano-003") and folder.path.is_dir()
    with pytest.raises(ZeroDivisionError), RunFolder.new("nano") as folder:
        assert folder.path == Path("runs/nano-004")
        raise ZeroDivisionError
    assert sorted(os.listdir("runs")) == ["nano-001", "nano-002", "nano-003"]


def test_how_a_run_was_started_is_read_of_what_is_left(run: Path) -> None:
    """Without a checkpoint its settings say it. A checkpoint that is refused says why."""
    known = RunFolder(run).read_start()
    checkpoint_files = sorted(run.glob("*.safetensors"))
    for path in checkpoint_files:
        path.rename(path.with_suffix(".away"))
    start = RunFolder(run).read_start()
    assert (start.run, start.config) == (known.run, known.config) and known.header is not None
    assert start.header is None and not start.refusals
    for path in checkpoint_files:
        path.write_bytes(b"x")
    with pytest.raises(TrainingError, match="is damaged or not a safetensors file") as told:
        RunFolder(run).read_start()
    assert str(told.value).count("; ") == len(RunFolder(run)._checkpoints()) - 1
