"""A run survives what happens to real ones: SIGKILL, SIGINT, SIGTERM, a full disk, a second process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arbitor.optimized.cli import cli
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.run_folder import RunFolder
from conformance.report import skip
from conformance.system.command import (
    REPOSITORY,
    STEPS,
    Here,
    arb,
    check_refused,
    digest,
    environment,
    finish,
    finished_line,
    lines_of,
    resume_line,
    start,
    wait_for,
)


def test_same_seed_same_hash_in_another_process(
    here: Here, finished: Path, text: Path, tmp_path: Path
) -> None:
    """The other process is this one."""
    assert here(*finished_line(text, tmp_path / "run")).returncode == 0
    assert digest(tmp_path / "run") == digest(finished)


def test_same_seed_same_hash_in_two_processes_on_a_gpu(num_gpus: int, text: Path, tmp_path: Path) -> None:
    if not num_gpus:
        skip("two processes on a GPU", "torch finds no CUDA device here")
    for name in ("a", "b"):
        result = arb(*finished_line(text, tmp_path / name, "--device", "cuda"))
        assert result.returncode == 0, result.stderr.decode()
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


CAMPAIGNS = """
from arbitor.optimized.cli import cli
from arbitor.optimized.training import monitor
from conformance.system import kills, lines
from conformance.system.campaigns import campaign

ends = campaign(lines.part, count=16, seed=20261129, jobs=1)
assert ends.total() == 16 and len(ends) > 4, ends
lines.WORKS = {"preset": "nano"}
cli.commands["preset"].callback = lambda **options: {}["key"]
try:
    campaign(lines.part, count=6, seed=0, jobs=1)
except AssertionError as error:
    assert "unforeseen" in str(error) and "KeyError" in str(error), error
else:
    raise AssertionError("an error that nobody foresaw went unnoticed")

deaths = campaign(kills.part, count=5, seed=20261129, jobs=1)
assert deaths.total() >= 5 and len(deaths) > 1, deaths
monitor.cut_metrics = lambda path, step: None
try:
    campaign(kills.part, count=5, seed=20261129, jobs=1)
except AssertionError as error:
    assert "its metrics" in str(error), error
else:
    raise AssertionError("a run that reports a step twice went unnoticed")
"""


def test_campaigns_of_kills_and_of_command_lines() -> None:
    """Killed at any moment, also on a slow disk, a run ends as one that was not. A line at random ends in a result or a sentence.

    Each campaign notices a planted fault. They are a process of their own, as they fork: torch's threads would not survive that.
    """
    result = subprocess.run(
        [sys.executable, "-c", CAMPAIGNS], cwd=REPOSITORY, env=environment(), capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]


def test_sigkill_at_random_moments_on_a_gpu(num_gpus: int, text: Path, tmp_path: Path) -> None:
    """Killed three times, on a disk so slow that a checkpoint is being written most of the time."""
    if not num_gpus:
        skip("kills on a GPU", "torch finds no CUDA device here")
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    moments = random.Random(20261121)
    often = ("--save-interval", "1", "--log-interval", "1", "--device", "cuda")
    process = start(["no-pictures", "slow-disk", *finished_line(text, run, *often)])
    for kills in range(1, 4):
        lines = lines_of(metrics) + moments.randint(1, 3)
        assert wait_for(process, metrics, lines), finish(process).stderr.decode()
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL
        checkpoint, refusals = RunFolder(run).load_newest()
        assert not refusals and (checkpoint is not None or kills == 1)
        process = start(["no-pictures", "slow-disk", *resume_line(run)])
    result = finish(process)
    assert result.returncode == 0, result.stderr.decode()
    assert b"resuming" in result.stdout
    assert arb(*finished_line(text, tmp_path / "whole", "--device", "cuda")).returncode == 0
    assert digest(run) == digest(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(metrics)] == list(range(STEPS + 1))
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(
    here: Here, finished: Path, text: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = start(["no-pictures", *finished_line(text, run, "--save-interval", "1000")])
    assert wait_for(process, run / "metrics.jsonl", 3)
    process.send_signal(number)
    result = finish(process)
    told, ended = result.stderr.splitlines(keepends=True)
    assert told == b"arb: stopping after this step; again to quit now.\n"
    ended_alone = subprocess.CompletedProcess(result.args, result.returncode, result.stdout, ended)
    check_refused(ended_alone, code, f"stopped by {number.name}", "--resume")
    assert load_checkpoint(run / "latest.safetensors").step >= 4
    # Who sends SIGTERM does not wait for a picture.
    assert (run / "report.png").exists() == (number == signal.SIGINT)
    if number == signal.SIGTERM:
        check_full_disk_while_resuming(run)
    assert here(*resume_line(run)).returncode == 0
    assert digest(run) == digest(finished)


STARTS = """
import signal
# A shell lets what it starts in the background ignore SIGINT, and so do pytest and this process then.
signal.signal(signal.SIGINT, signal.default_int_handler)
from arbitor.optimized.start import main
main()
"""

SWALLOWS = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
print("it goes on")
raise ImportError("this library is none")
"""


@pytest.mark.parametrize("library", ["torch", "click"])
def test_an_interrupt_while_something_is_imported_ends_it(text: Path, tmp_path: Path, library: str) -> None:
    """Whatever is imported may catch what is raised meanwhile, and some of torch does, so that the run went on to its end."""
    (tmp_path / f"{library}.py").write_text(SWALLOWS)
    process = subprocess.run(
        [sys.executable, "-c", STARTS, *finished_line(text, tmp_path / "run")],
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
        capture_output=True,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, b"", b"arb: stopped by SIGINT.\n")
    assert not (tmp_path / "run").exists()


def test_an_interrupt_at_another_time_ends_in_the_same_sentence(
    here: Here, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends then may clean up, and the handler of whoever calls the command is there again."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(
            cli.commands["info"], "callback", lambda **options: signal.raise_signal(signal.SIGINT)
        )
        result = here("info", str(tmp_path))
        # Click ends the line that a terminal shows ^C in.
        assert (result.returncode, result.stderr.lstrip()) == (130, b"arb: stopped by SIGINT.\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def check_full_disk_while_resuming(run: Path) -> None:
    """A run that meets a full disk ends with a sentence, and leaves what was saved before and nothing else."""
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    assert {"latest.safetensors", "previous.safetensors"} <= before.keys()
    check_refused(
        arb("no-pictures", "full-disk=8000", *resume_line(run)),
        1,
        "cannot write the checkpoint",
        "too large",
        "intact",
    )
    assert {path.name: path.read_bytes() for path in run.glob("*.safetensors")} == before
    assert not list(run.glob(".*"))


def test_two_processes_do_not_share_a_run(here: Here, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(["no-pictures", "slow-disk", *finished_line(text, run, "--save-interval", "1")])
    try:
        assert wait_for(process, run / "metrics.jsonl", 1)
        check_refused(here(*resume_line(run)), 1, "another process is training")
        assert process.poll() is None
    finally:
        process.kill()
        finish(process)


def test_full_disk_from_the_start(text: Path, tmp_path: Path) -> None:
    result = arb("no-pictures", "full-disk=8000", *finished_line(text, tmp_path / "run"))
    check_refused(result, 1, "cannot write the checkpoint", "latest.safetensors", "File too large")
    assert not [name for name in os.listdir(tmp_path / "run") if "safetensors" in name]


def test_damaged_checkpoints(here: Here, finished: Path, tmp_path: Path) -> None:
    """The newest checkpoint is refused, and the run goes on from the one before it. Without either nothing is done."""
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    latest = tmp_path / "latest.safetensors"
    latest.write_bytes(latest.read_bytes()[:-100])
    (tmp_path / "summary.json").unlink()
    result = here(*resume_line(tmp_path))
    assert result.returncode == 0
    assert result.stderr.count(b"\n") == 1
    assert (
        b"latest.safetensors' is damaged" in result.stderr
        and b"going on from the one before" in result.stderr
    )
    assert b"at step 12" in result.stdout
    assert digest(tmp_path) == digest(finished)
    for name in ("latest", "previous"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"\0" * 10)
    check_refused(here(*resume_line(tmp_path)), 1, "no checkpoint is left to resume from")


def test_resume_of_a_run_that_has_only_begun(here: Here, finished: Path, text: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, a run starts again. Where no run began, none is resumed."""
    run = tmp_path / "run"
    check_refused(here(*finished_line(text, run, "--resume")), 1, "is no folder of a run")
    assert not run.exists()
    run.mkdir()
    (run / "config.json").write_bytes((finished / "config.json").read_bytes())
    result = here(*resume_line(run))
    assert result.returncode == 0, result.stderr.decode()
    assert b"starting at step 0" in result.stdout
    assert digest(run) == digest(finished)
