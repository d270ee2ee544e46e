"""Names that are no plain words: they change nothing of what a command does, and no terminal gets them raw."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from arbitor.optimized.training import machine_memory
from arbitor.optimized.training.checkpoint import load_checkpoint
from conformance.system.command import (
    REPOSITORY,
    Here,
    arb,
    check_refused,
    digest,
    environment,
    finish,
    finished_line,
    resume_line,
    start,
    wait_for,
)
from conformance.training.forge import forged
from conformance.training.nano import NANO, TEXT

NAMES = {
    "dollars": "a$b$c_{",
    "markup": "[/x][bold]",
    "escape": "a\x1b[31mb\x1b]0;title\x07",
    "not UTF-8": "a\udcffb",
    "line end": "a\nb",
    "other letters": "日本語 😀",
}


IN_TURN = """
import json, sys
from conformance.system import nano_arb
for command in json.loads(sys.stdin.read()):
    try:
        nano_arb.main(command)
    except SystemExit as end:
        print(f"{end.code}", file=sys.stderr)
"""
"""A process takes longer to start than a run of nano. This one takes runs one after the other, and says how each of them ends."""


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that have written without a fault, on a terminal that knows ASCII only, by what is strange in their names.

    The preset, the data and the folder have the name. Pictures are drawn.
    """
    runs, commands = {}, []
    for what, name in NAMES.items():
        folder = tmp_path_factory.mktemp("named") / name
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(TEXT)
        preset = folder / f"{name}.json"
        values = {**json.loads(NANO.to_json()), "name": f"nano{name}"}
        preset.write_bytes(json.dumps(values).encode())
        runs[what] = folder / "run"
        commands.append(
            finished_line(
                folder / name, runs[what], "--preset", str(preset), "--batch", "2", "--context", "16"
            )
        )
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        cwd=REPOSITORY,
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        input=json.dumps(commands).encode(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"0\n" * len(NAMES)
    assert all(byte >= 32 or byte == 10 for byte in done.stdout)
    return runs


@pytest.mark.parametrize("what", NAMES)
def test_a_run_of_any_name_ends_as_others_do(finished: Path, named: dict[str, Path], what: str) -> None:
    assert (named[what] / "report.png").read_bytes().startswith(b"\x89PNG")
    assert digest(named[what]) == digest(finished)


def test_no_sentence_has_a_name_raw(here: Here, text: Path, tmp_path: Path) -> None:
    for name in NAMES.values():
        check_refused(here("audit", "--preset", f"{name}x"), 2)
        check_refused(here("train", f"--{name}"), 2)
        result = here(
            "train", "--preset", "nano", "--data", str(tmp_path / name), "--run", str(tmp_path / "run")
        )
        check_refused(result, 1, "cannot read the data")
        assert b"\x1b" not in result.stderr
        (tmp_path / "mine.json").write_text(json.dumps({**json.loads(NANO.to_json()), "name": name}))
        audited = here("audit", "--preset", str(tmp_path / "mine.json"))
        assert audited.returncode == 0 and b"\x1b" not in audited.stdout


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        (["train", "--run", ""], 2, "'--run' / '--out': '' is empty, but must name"),
        (["generate", "--run", ""], 2, "'--run': '' is empty, but must name"),
        (["train", "--data", "", "--no-save"], 2, "data is '', but must not be empty"),
        (["generate", "--run", "x", "--bytes", str(10**12)], 2, "is not in the range 0<=x<=16777216"),
        (["train", "--batch", str(10**9)], 2, "is not in the range"),
        (["train", "--batch", "100000", "--context", "100000"], 2, "batch times context is 10000000000"),
        (["train", "text.txt"], 2, "extra argument (text.txt): options name what is meant, such as --data"),
        (["audit", "--preset", "smal"], 2, "did you mean 'small'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused_at_once(
    here: Here, command: list[str], code: int, sentence: str
) -> None:
    check_refused(here(*command), code, sentence)


@pytest.mark.parametrize("command", ["audit", "smoke", "train"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": 2**31 - 1}, "num_layers is 2147483647, but must be at most 1024"),
        ({"num_layers": 100_000}, "num_layers is 100000, but must be at most 1024"),
        ({"video_steps": 10**6, "video_latent": 8}, "video_steps is 1000000, but must be at most 1024"),
        ({"width": 2**31 - 1}, "2147483647"),
        ({"num_layer": 3}, "unknown field 'num_layer': did you mean 'num_layers'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_cannot_be_are_refused_on_every_path(
    here: Here, tmp_path: Path, command: str, changes: dict[str, int], sentence: str
) -> None:
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps({**json.loads(NANO.to_json()), **changes}))
    check_refused(here(command, "--preset", str(preset)), 2, sentence)


def test_a_model_that_no_memory_holds_is_refused(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of one GiB. The audit counts it all the same."""
    monkeypatch.setattr(machine_memory, "os", SimpleNamespace(sysconf=lambda name: 2**15))
    result = here("smoke", "--preset", "r14", "--device", "cpu")
    check_refused(result, 1, "the model 'r14' has a state of 4.", "GiB, but cpu has 1.0 GiB of memory")
    assert here("audit", "--preset", "r14").returncode == 0


def test_a_preset_names_no_field_twice_and_may_be_that_of_a_run(
    here: Here, finished: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "mine.json"
    preset.write_text(NANO.to_json().replace("{", '{"width": 24,', 1))
    check_refused(here("audit", "--preset", str(preset)), 2, "the key 'width' stands there twice")
    preset.write_text("[]")
    check_refused(here("audit", "--preset", str(preset)), 2, "holds a JSON list, but must be an object")
    of_run = here("audit", "--json", "--preset", str(finished / "config.json"))
    assert of_run.stdout == here("audit", "--json", "--preset", "nano").stdout


def test_generate_refuses_a_forged_folder(here: Here, finished: Path, tmp_path: Path) -> None:
    def deep(tensors: object, header: dict[str, dict[str, int]]) -> None:
        header["config"]["num_layers"] = 2**31 - 1

    shutil.copy(finished / "best.safetensors", tmp_path)
    forged(tmp_path / "best.safetensors", deep)
    result = here("generate", "--run", str(tmp_path))
    assert result.returncode == 1 and b"num_layers is 2147483647, but must be at most 1024" in result.stderr


def test_a_run_whose_output_goes_away_goes_on(finished: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(["no-pictures", *finished_line(text, run, "--log-interval", "1")])
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(), process.stderr.read()) == (0, b"")
    assert digest(run) == digest(finished)


def test_a_run_whose_output_is_full_goes_on(finished: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "conformance.system.nano_arb", "no-pictures", *finished_line(text, run)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=environment(), cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert digest(run) == digest(finished)


def test_a_hangup_saves_and_a_nohup_stays(here: Here, finished: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # A child ignores what its parent ignores, and the suite itself may run under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = start(["no-pictures", *finished_line(text, run, "--save-interval", "1000")])
        assert wait_for(process, run / "metrics.jsonl", 3)
        process.send_signal(signal.SIGHUP)
        result = finish(process)
        told, ended = result.stderr.decode().splitlines()
        assert told == "arb: stopping after this step; again to quit now."
        assert result.returncode == 129 and "stopped by SIGHUP" in ended
        assert load_checkpoint(run / "latest.safetensors").step >= 4
        assert not (run / "report.png").exists()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        process = start(["no-pictures", *resume_line(run)])
        assert wait_for(process, run / "metrics.jsonl", 4)
        os.kill(process.pid, signal.SIGHUP)
        assert finish(process).returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert digest(run) == digest(finished)


def test_a_run_says_what_it_does_and_keeps_its_threads(text: Path, tmp_path: Path) -> None:
    """Started with one thread and resumed where the environment has three: one, as other sums have other bits."""
    run = tmp_path / "run"
    out = arb("no-pictures", *finished_line(text, run, "--steps", "4")).stdout.decode()
    for line in (
        "data: ",
        "1 file, ",
        "validation: ",
        "steps: 4 of 2 windows of 16 bytes",
        "float32, 1 CPU thread\n",
    ):
        assert line in out
    command = [sys.executable, "-m", "conformance.system.nano_arb", "no-pictures", *resume_line(run)]
    environ = {**environment(), "OMP_NUM_THREADS": "3"}
    done = subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True)
    assert b"is finished: all of its 4 steps are taken" in done.stdout
    assert b"float32, 1 CPU thread\n" in done.stdout
    assert json.loads((run / "summary.json").read_text())["threads"] == 1
