"""Runs ``arb`` in processes of its own, for the tests of the whole system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from arbitor.optimized import cli

NANO_ARB = "conformance.system.nano_arb"
"""The command with the preset nano."""

PLAIN = "arbitor.optimized.cli"
"""The command without the preset nano and without torch, until a command needs it."""

REPOSITORY = Path(__file__).resolve().parents[2]
"""Where the processes run."""

STEPS = 15
"""Steps of the run `finished`."""

TIMEOUT = 300
"""Seconds after which a process hangs."""


def environment() -> dict[str, str]:
    """The environment of a user with one core and no settings."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ARB_", "TRITON_INTERPRET"))
    }
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def start(
    arguments: Sequence[str], *, module: str = NANO_ARB, stdout: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start ``arb`` with the preset nano, or another module."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> subprocess.CompletedProcess[bytes]:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def arb(
    *arguments: str, module: str = NANO_ARB, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """Run ``arb`` to its end. Where it writes to a descriptor, the result has no output."""
    return finish(start(arguments, module=module, stdout=stdout))


class Here:
    """Runs ``arb`` in this process, where torch is imported already: for the many cases that need no other one."""

    def __init__(self, capture: pytest.CaptureFixture[bytes]) -> None:
        self.capture = capture

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        self.capture.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        out, err = self.capture.readouterr()
        assert isinstance(end.value.code, int)
        return subprocess.CompletedProcess(arguments, end.value.code, out, err)


def last_counts(*words: str) -> list[str]:
    """Return the words of a line without what a later option of the same name replaces: a line that works, and what is changed."""
    options = {
        spelling: option
        for option in cli.cli.commands[words[0]].params
        if isinstance(option, click.Option) and not option.multiple
        for spelling in (*option.opts, *option.secondary_opts)
    }
    given: dict[str | int, list[str]] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        option = options.get(word)
        key: str | int = len(left) if option is None else str(option.name)
        value = [] if option is None or option.is_flag else left[:1]
        del left[: len(value)]
        given.pop(key, None)
        given[key] = [word, *value]
    return [word for piece in given.values() for word in piece]


def train_line(text: Path, run: Path, *more: str) -> list[str]:
    """Return the words that train nano on a text, and more."""
    works = ("train", "--preset", "nano", "--data", str(text), "--device", "cpu", "--run", str(run))
    return last_counts(*works, *more)


def finished_line(text: Path, run: Path, *more: str) -> list[str]:
    """Return the words that train nano on a text for as many steps as the run `finished` took, and more."""
    return train_line(text, run, "--steps", str(STEPS), *more)


def resume_line(run: Path, *more: str) -> list[str]:
    """Return the words that go on with a run."""
    return ["train", "--run", str(run), "--resume", *more]


def generate_line(run: Path, *more: str) -> list[str]:
    """Return the words that generate from a run."""
    return last_counts("generate", "--run", str(run), "--device", "cpu", *more)


def until(
    holds: Callable[[], bool], process: subprocess.Popen[Any] | None = None, *, seconds: float = TIMEOUT
) -> bool:
    """Wait until something holds, and fail if it does not within some seconds. Return False if the process ends before."""
    end = time.monotonic() + seconds
    while not holds():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.01)
    return True


def lines_of(path: Path) -> int:
    """Return how many lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: subprocess.Popen[bytes], path: Path, lines: int) -> bool:
    """Wait until a file has so many lines. Return False if the process ends before."""
    return until(lambda: lines_of(path) >= lines, process)


def digest(run: Path) -> str:
    """Return the state hash of a run that has ended."""
    return json.loads((run / "summary.json").read_text())["state_sha256"]


def check_refused(result: subprocess.CompletedProcess[bytes], code: int, *parts: str) -> None:
    """One sentence on stderr with each of the parts, the exit code, and no traceback."""
    err = result.stderr.decode()
    assert result.returncode == code, (result.returncode, err)
    assert err.startswith("arb: ") and err.count("\n") == 1 and err.rstrip().endswith((".", ")", "?")), err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, (part, err)
