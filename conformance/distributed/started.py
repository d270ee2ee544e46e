"""Ranks that torchrun starts for the tests, and how many of them a test asks what they found."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from arbitor.optimized.training.metrics import last_step
from conformance.system.command import REPOSITORY, environment, until

SECONDS = {"cpu": 300, "cuda": 900}
"""Seconds after which ranks hang, by device. On two busy cores they are slow, and for a GPU each of them compiles every kernel."""

STEPS, SAVED_EVERY, KILLED_AT, STOPPED_AT = 30, 3, 5, 12
"""Steps of the run that is killed and then stopped."""


def torchrun(
    count: int, *arguments: str, restarts: int = 0, nodes: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    """Start ranks, without a terminal, on a port that is free. On a CPU kernels of Triton run in its interpreter."""
    interpreted = {name: os.environ[name] for name in ("TRITON_INTERPRET",) if name in os.environ}
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc-per-node={count}",
            f"--max-restarts={restarts}", "-m", *arguments,
        ],
        cwd=REPOSITORY,
        # A rank that a library aborts says where it was.
        env={**environment(), **interpreted, "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONFAULTHANDLER": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def once(place: Path, name: str, make: Callable[[Path], Any]) -> Any:
    """Return what `make` returns when it is given a new folder: JSON data, or the error that it raised as an AssertionError.

    Of several processes, or threads, that name the same place and name, the first calls `make`, and the others wait for it.
    """
    folder, made = place / name, place / f"{name}.json"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder.mkdir()
            try:
                found = {"made": make(folder)}
            except Exception as error:
                made.write_text(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
                raise
            made.write_text(json.dumps(found))
    found = json.loads(made.read_text())
    assert "made" in found, found["failed"]
    return found["made"]


def copied(run: Path, folder: Path) -> Path:
    """Return a copy of a run for a test that goes on with it. Other tests may read the run meanwhile, in another process."""
    return Path(shutil.copytree(run, folder / run.name))


def meeting_place() -> TCPStore:
    """Return a store of this process at which ranks meet, as long as it is held. The system chose its port.

    A port that is merely free now may be taken by another process before ranks listen at it.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def device_of_ranks() -> str:
    """Return on which device ranks work. The suite has set the variable, or has a GPU."""
    return "cpu" if "TRITON_INTERPRET" in os.environ else "cuda"


def ended(process: subprocess.Popen[str], seconds: float | None = None) -> tuple[int, str, str]:
    """Return the exit code of ranks and what they wrote. Ranks that hang are aborted, and say where they were.

    torchrun by itself would leave them behind, on the device that they hold.
    """
    seconds = SECONDS[device_of_ranks()] if seconds is None else seconds
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # A rank that ends is no sign to torchrun then, which would end the others or start new ones.
        process.send_signal(signal.SIGSTOP)
        # One after the other, so that what they write is no muddle.
        for rank in ranks_of(process).values():
            os.kill(rank, signal.SIGABRT)
            until(lambda rank=rank: not is_running(rank))
        process.kill()
        _, err = process.communicate()
        raise AssertionError(f"ranks hung for {seconds} s:\n{err}") from None
    return process.returncode, out, err


def is_running(process_id: int) -> bool:
    """Return whether a process runs. One that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def succeeded(process: subprocess.Popen[str]) -> str:
    """Wait for ranks that must end well, and return what they printed. A failure shows what the ranks themselves said."""
    code, out, err = ended(process)
    # torchrun says after them, at length, which of them failed.
    assert code == 0, err.partition("failed (exitcode: ")[0]
    return out


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Return the process ids of the ranks that torchrun has started, by number."""
    found = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found.update({int(each[5:]): child for each in variables if each.startswith(b"RANK=")})
    return found


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    assert until(lambda: last_step(run / "metrics.jsonl") >= step, process), ended(process)


both = pytest.mark.parametrize("found", [2, 3], indirect=True, ids=["two_ranks", "three_ranks"])
two = pytest.mark.parametrize("found", [2], indirect=True, ids=["two_ranks"])
three = pytest.mark.parametrize("found", [3], indirect=True, ids=["three_ranks"])
Found = tuple[Path, list[dict[str, Any]]]
