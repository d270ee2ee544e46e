"""What can be done with a run: it is measured, described, drawn and exported, also while it goes on and when it is hostile."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor import ArbModel
from arbitor.optimized.commands import evaluate
from arbitor.optimized.training.checkpoint import load_checkpoint, load_header
from arbitor.optimized.training.evaluate import file_bpb, file_windows
from arbitor.optimized.training.options import PRESET_DEFAULTS
from arbitor.reference import graph
from arbitor.reference.audit import audit
from arbitor.reference.presets import PRESETS
from conformance.system.command import Here, check_refused
from conformance.training.forge import forged
from conformance.training.nano import NANO, TEXT

CONTEXT = 16
"""Bytes of a window of the finished run."""


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize("size", [0, 3, 4, 15, 16, 17, 29, 30, 42, 43, 200])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_of_a_file_predict_each_byte_but_three_once(size: int, batch: int) -> None:
    content = bytes(range(size))
    windows = list(file_windows(io.BytesIO(content), batch=batch, context=CONTEXT))
    predicted = [byte for window_BT in windows for row in window_BT.tolist() for byte in row[3:]]
    assert predicted == list(content[3:])
    for window_BT in windows:
        assert (
            window_BT.dtype == torch.int64 and window_BT.shape[0] <= batch and window_BT.shape[1] <= CONTEXT
        )
        # What is read is what stands there.
        assert all(row == list(range(row[0], row[0] + len(row))) for row in window_BT.tolist())


def test_a_file_is_never_held_whole() -> None:
    class Watched(io.BytesIO):
        most = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None and size >= 0
            self.most = max(self.most, size)
            return super().read(size)

    file = Watched(bytes(100_000))
    assert sum(window.shape[0] for window in file_windows(file, batch=4, context=CONTEXT)) > 7000
    assert file.most <= 4 * CONTEXT


def test_eval_measures_what_the_model_says_byte_by_byte(here: Here, finished: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    texts = {"a.txt": TEXT[:70], "b.txt": TEXT[100:117], "short.txt": b"abc"}
    for name, content in texts.items():
        (data / name).write_bytes(content)
    (data / "binary").write_bytes(b"\0\1\2")
    result = here(
        "eval", "--run", str(finished), "--data", str(data), "--device", "cpu", "--batch", "1", "--json"
    )
    assert result.returncode == 0, result.stderr.decode()
    assert b"left out" in result.stderr and b"1 binary" in result.stderr
    said = json.loads(result.stdout)
    model = ArbModel.from_pretrained(finished, device="cpu")
    assert (said["context"], said["steps"]) == (CONTEXT, model.steps_taken)
    nats: dict[str, float] = {}
    for name, content in texts.items():
        nats[name] = 0.0
        # Windows of 16, each three bytes into the one before it.
        for start in range(0, max(0, len(content) - 3), CONTEXT - 3):
            ids_1T = torch.tensor([list(content[start : start + CONTEXT])])
            with torch.no_grad():
                nats[name] += model.loss(ids_1T).item() * (ids_1T.shape[1] - 3)
    counts = {name: max(0, len(content) - 3) for name, content in texts.items()}
    rows = {row["name"]: row for row in said["files"]}
    assert rows.keys() == texts.keys()
    for name, row in rows.items():
        assert row["predicted_bytes"] == counts[name]
        assert row["bpb"] == (nats[name] / counts[name] / math.log(2) if counts[name] else None)
    assert rows["short.txt"]["bpb"] is None
    whole = sum(nats.values()) / sum(counts.values()) / math.log(2)
    assert said["total"]["bpb"] == whole
    text = here("eval", "--run", str(finished), "--data", str(data), "--device", "cpu").stdout.decode()
    assert f"{whole:.4f}" in text and "too short" in text and "total" in text


def test_eval_reads_a_window_as_long_as_asked_for(finished: Path) -> None:
    """A longer window tells more of what came before, so that the measure is another one."""
    model = ArbModel.from_pretrained(finished, device="cpu")
    by_length = [
        file_bpb(model, io.BytesIO(TEXT[:100]), batch=2, context=length, device="cpu") for length in (8, 50)
    ]
    assert by_length[0].predicted == by_length[1].predicted == 97
    assert by_length[0].nats != by_length[1].nats


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_eval_says_how_far_it_is(
    here: Here, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """On standard error, so that a result that goes into a file is alone there."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("a.txt", 29), ("b.txt", 42), ("short.txt", 2)):
        (data / name).write_bytes(TEXT[:count])
    clock = itertools.count(0, 4)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    words = ("eval", str(finished), "--data", str(data), "--device", "cpu", "--batch", "1", *more)
    result = here(*words)
    assert result.returncode == 0
    lines = result.stderr.decode().splitlines()
    # A batch takes four seconds, of which every second one is told, and the last is not.
    assert lines == [
        "arb: measuring 65 bytes of 2 files.",
        "arb: 26 of 65 bytes, 3 a second, 0:12 left, now in a.txt.",
        "arb: 52 of 65 bytes, 3 a second, 0:04 left, now in b.txt.",
    ]
    assert b"measuring" not in result.stdout and b"left" not in result.stdout


def test_eval_of_nothing_is_no_success(here: Here, finished: Path, tmp_path: Path) -> None:
    """A script that looks at the exit code would take a file of three bytes for one that was measured."""
    (tmp_path / "short").write_bytes(b"abc")
    result = here("eval", "--run", str(finished), "--data", str(tmp_path / "short"), "--device", "cpu")
    check_refused(result, 1, "nothing was measured", "has the 4 bytes that are needed")


def test_eval_of_a_loss_that_is_not_finite(
    here: Here, finished: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph.ArbModel, "loss", lambda model, ids: torch.tensor(math.nan))
    result = here("eval", "--run", str(finished), "--data", str(text), "--device", "cpu", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["total"]["bpb"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["eval", "--run", "RUN"], 2, ["Missing option '--data'"]),
        (["eval", "--run", "RUN", "--data", ""], 2, ["'' is empty"]),
        (["eval", "--run", "RUN", "--data", "missing"], 1, ["cannot read the data 'missing'"]),
        (["eval", "--run", "RUN", "--data", os.devnull], 1, ["is a device, but must be a regular file"]),
        (["eval", "--run", "RUN", "--data", "RUN/final.safetensors"], 1, ["a file of weights by its name"]),
        (
            ["eval", "--run", "missing", "--data", "stdlib"],
            1,
            ["there is no run, folder or checkpoint 'missing'"],
        ),
        (["eval", "--run", "RUN", "--data", "stdlib", "--ctx", "3"], 2, ["--ctx", "3 is not in the range"]),
        (["info", "missing"], 1, ["'missing' holds no run"]),
        (["info", ""], 2, ["'' is empty"]),
        (["report"], 2, ["--run is missing: the folder of a run"]),
        (["report", "missing"], 1, ["'missing' holds no run"]),
        (["report", "RUN", "RUN"], 2, ["--picture is needed with several runs"]),
        (["report", *["RUN"] * 65, "--picture", "x.png"], 2, ["65 runs were named", "at most 64"]),
        (["report", "RUN", "--picture", "missing/x.png"], 1, ["there is no folder 'missing'"]),
        (["report", "RUN", "--picture", os.devnull], 1, ["is a device, but must be a regular file"]),
        (["export", "RUN"], 2, ["RUN and FOLDER are needed"]),
        (["export", "RUN", "RUN"], 2, ["but must be new or empty"]),
        (["export", "missing", "model"], 1, ["there is no run, folder or checkpoint 'missing'"]),
        (["preset", "tinny"], 2, ["'tinny'", "did you mean 'tiny'?"]),
        (["preset", "--disable-moe"], 2, ["--disable-moe was given, but does nothing without NAME"]),
        (["preset", "small", "--disable-vq"], 2, ["disable_vq is True, but changes nothing"]),
        (["generate", "--run", "RUN", "--prompt-file", "missing"], 1, ["cannot read the prompt 'missing'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    here: Here, finished: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    before = sorted(finished.iterdir())
    check_refused(here(*(each.replace("RUN", str(finished)) for each in arguments)), code, *parts)
    assert sorted(finished.iterdir()) == before


def test_info_says_what_a_run_is(here: Here, finished: Path, text: Path) -> None:
    said = json.loads(here("info", str(finished), "--json").stdout)
    summary = json.loads((finished / "summary.json").read_text())
    for name in (
        "preset",
        "weights",
        "val_bpb",
        "best_bpb",
        "baselines",
        "steps",
        "state_sha256",
        "data_sha256",
    ):
        assert said[name] == summary[name], name
    assert said["steps_taken"] == 15 and said["data_bytes"] == len(TEXT) and said["bytes_of_a_step"] == 32
    assert said["canonical_bytes"] == audit(NANO).canonical_bytes < said["resident_bytes"]
    assert said["files"]["final.safetensors"] == (finished / "final.safetensors").stat().st_size
    words = here("info", str(finished)).stdout.decode()
    assert f"{summary['weights']:,}" in words and str(text) in words


def test_info_and_report_read_no_tensor(here: Here, copy: Path) -> None:
    """A run under way may be large. The last byte of a checkpoint, a tensor's, is not looked at."""
    content = bytearray((copy / "latest.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "latest.safetensors").write_bytes(content)
    result = here("info", str(copy), "--json")
    assert result.returncode == 0 and result.stderr == b""
    assert json.loads(result.stdout)["steps_taken"] == 15


def test_a_run_under_way_is_described_and_drawn(here: Here, copy: Path, tmp_path: Path) -> None:
    """Metrics are further than the newest checkpoint, and nothing of the end is there."""
    for name in ("final.safetensors", "best.safetensors", "summary.json", "report.png"):
        (copy / name).unlink()
    (copy / "previous.safetensors").replace(copy / "latest.safetensors")
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"step": 15, "torn')
    at = json.loads(lines[-2])["step"]
    said = json.loads(here("info", str(copy), "--json").stdout)
    saved = load_header(copy / "latest.safetensors")["step"]
    assert saved < at < 15 and (said["steps_taken"], said["steps"]) == (at, 15)
    assert said["state_sha256"] is None and said["best_bpb"] is not None
    result = here("report", str(copy))
    assert result.returncode == 0, result.stderr.decode()
    assert (copy / "report.png").read_bytes().startswith(b"\x89PNG")
    result = here("report", str(copy), str(tmp_path / "copy"), "--picture", str(tmp_path / "x.png"))
    assert result.returncode == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_checkpoints_is_described(here: Here, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "$x$ [/b]"
    more = ["--no-save", "--steps", "2", "--log-interval", "1", "--out", str(run)]
    assert here("train", "--preset", "nano", "--data", str(text), "--device", "cpu", *more).returncode == 0
    said = json.loads(here("info", str(run), "--json").stdout)
    assert (said["steps_taken"], said["steps"], said["preset"]) == (2, 2, "nano")
    other = tmp_path / "_other"
    shutil.copytree(run, other)
    result = here("report", str(run), str(other), "--picture", str(tmp_path / "x.png"))
    assert result.returncode == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "val_bpb": "x", "train_bpb": [1], "kinds": 7}',
        '{"step": 3, "val_bpb": 1e999, "seconds": "\\u001b[31m"}',
        '{"step": 3, "kinds": {"attention": {"exponents": {"counts": {}}}}, "experts": {"a": 1}}',
        '{"step": 14, "seconds": ' + "9" * 400 + "}",
        # Steps that the run does not have.
        '{"step": 10000000, "val_bpb": 0.001}',
        '{"step": -3, "val_bpb": 0.001}',
    ],
)
def test_hostile_metrics_end_in_a_sentence_or_a_picture(here: Here, copy: Path, line: str) -> None:
    sound = json.loads(here("info", str(copy), "--json").stdout)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    said = here("info", str(copy), "--json")
    assert said.returncode == 0 and b"\x1b" not in said.stdout
    told = json.loads(said.stdout)
    assert [told[name] for name in ("steps_taken", "best_bpb")] == [15, sound["best_bpb"]]
    result = here("report", str(copy))
    assert (
        result.returncode in (0, 1) and b"Traceback" not in result.stderr and result.stderr.count(b"\n") <= 1
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is no JSON"),
        ("{}", "does not say how the run was started"),
        ('{"run": 3, "model": {}}', "are no object"),
    ],
)
def test_a_run_of_which_nothing_says_how_it_was_started_is_refused(
    here: Here, copy: Path, content: str, says: str
) -> None:
    for path in copy.glob("*.safetensors"):
        path.unlink()
    (copy / "config.json").write_text(content)
    for command in ("info", "report"):
        check_refused(here(command, str(copy)), 1, says)


def test_a_hostile_folder_is_refused(here: Here, copy: Path) -> None:
    def many_layers(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header["config"]["num_layers"] = 2**31 - 1

    for path in copy.glob("*.safetensors"):
        forged(path, many_layers)
    (copy / "config.json").write_text('{"run": {"a": 1, "a": 2}}')
    (copy / "metrics.jsonl").unlink()
    os.mkfifo(copy / "metrics.jsonl")
    for command in (["info"], ["report"], ["export", str(copy / "model")]):
        result = here(command[0], str(copy), *command[1:])
        assert result.returncode == 1 and b"Traceback" not in result.stderr, result.stderr.decode()
    assert b"num_layers is 2147483647" in result.stderr


def test_export_writes_what_everything_reads(here: Here, finished: Path, tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "model"
    result = here("export", str(finished), str(folder))
    assert result.returncode == 0, result.stderr.decode()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    best = load_checkpoint(finished / "best.safetensors")
    assert load_checkpoint(folder / "model.safetensors").state_sha256 == best.state_sha256
    model = ArbModel.from_pretrained(folder, device="cpu")
    assert (model.steps_taken, model.trained_context, model.seed) == (best.step, CONTEXT, best.seed)
    same = ["--prompt", "7 squared", "--bytes", "12", "--device", "cpu"]
    of_run = here("generate", "--run", str(finished), *same)
    for source in (folder, folder / "model.safetensors"):
        assert here("generate", str(source), *same).stdout == of_run.stdout != b""
    assert json.loads(here("info", str(folder), "--json").stdout)["state_sha256"] == best.state_sha256


@pytest.mark.parametrize("value", [-1, 0, "two", 10**9, True, None])
def test_an_exported_folder_cannot_choose_threads(
    here: Here, finished: Path, tmp_path: Path, value: Any
) -> None:
    """A folder from a stranger may say anything of its run. What cannot be is not known."""
    assert here("export", str(finished), str(tmp_path / "model")).returncode == 0

    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header["run"] = {"threads": value, "context": value}

    forged(tmp_path / "model" / "model.safetensors", change)
    result = here("generate", "--run", str(tmp_path / "model"), "--bytes", "2", "--device", "cpu")
    assert result.returncode == 0, result.stderr.decode()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("value", [3, 2**40])
def test_an_exported_folder_cannot_choose_windows_that_cannot_be(
    here: Here, finished: Path, tmp_path: Path, text: Path, value: int
) -> None:
    """A window of three bytes predicts none. The preset's default takes its place."""
    assert here("export", str(finished), str(tmp_path / "model")).returncode == 0

    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header["run"] = {"context": value}

    forged(tmp_path / "model" / "model.safetensors", change)
    assert ArbModel.from_pretrained(tmp_path / "model", device="cpu").trained_context is None
    result = here("eval", "--run", str(tmp_path / "model"), "--data", str(text), "--device", "cpu", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["context"] == CONTEXT


def test_a_preset_is_printed_to_start_from(here: Here, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(here("preset", "tiny", "--disable-moe").stdout)
    document = json.loads(file.read_text())
    assert document["use_moe"] is False and document["name"] == "tiny"
    says = json.loads(here("audit", "--preset", str(file), "--json").stdout)
    assert says["weights"] == json.loads(here("audit", "--disable-moe", "--json").stdout)["weights"]
    listed = here("preset").stdout.decode()
    assert all(name in listed for name in PRESETS) and f"{audit(NANO).weights:,}" in listed
    file.write_text(json.dumps({**document, "num_layer": 3}))
    check_refused(here("audit", "--preset", str(file)), 2, "'num_layer'", "did you mean 'num_layers'?")
    file.write_text('{"width": 36, "width": 72}')
    check_refused(here("audit", "--preset", str(file)), 2, "the key 'width' stands there twice")


def test_help_shows_defaults_as_numbers(here: Here) -> None:
    words = " ".join(here("train", "--help").stdout.decode().split())
    assert f"Optimisation steps [{PRESET_DEFAULTS['tiny']['steps']} for tiny," in words
    assert "Bytes of a window [256 for small, 256 for r12, else 128]" in words


@pytest.mark.parametrize("command", ["train", "generate", "smoke", "eval"])
def test_one_thing_has_both_of_its_names(here: Here, command: str) -> None:
    words = here(command, "--help").stdout.decode()
    assert "--context, --ctx" in words
    assert ("--run, --out" in words) == (command == "train")
