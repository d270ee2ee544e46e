"""Kills runs with SIGKILL at random moments until each has ended, and looks for one that ended differently.

    python -m conformance.system.kills --kills 1000 --seed 1 --jobs 2

A run of the preset ``nano`` has several lives. A life ends at a moment of the clock, or at one of the calls that open, rename,
remove or flush a file, just before or just after it. The next life goes on with ``--resume``, as a user would. After every death
the folder must hold what a run can go on from. The last life must leave the state, the metrics and the files of a run that
nothing happened to.

Lives are forked from a process that has imported everything, so that hundreds of them take a minute. What a life does before it
imports anything is no part of a run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized import cli
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.metrics import last_step, read_metrics
from arbitor.optimized.training.run_folder import RunFolder
from conformance.system.nano_arb import make_disk_slow
from conformance.training import nano

STEPS = 8
"""Steps of a run."""

LIVES = 12
"""Lives of a run at most; nobody kills the last."""

SLOW_SECONDS = 60.0
"""Seconds after which a life hangs. A whole run takes one or two."""

FLUSH = "arbitor.fsync"
"""The event of a flush, which Python itself does not tell of."""

CALLS = ("os.rename", "os.remove", "os.mkdir", "fcntl.flock", FLUSH)
"""Events of the calls that change files or folders, beside opening one to write."""

DIFFERS = ("state_sha256", "val_bpb", "best_bpb", "baselines", "steps", "skipped", "faulty_rows")
"""What a summary says of the result, and not of the time or the place."""


def die_at_call(number: int, *, after: bool) -> None:
    """End this process at the n-th call that changes files, as the system ends one that it kills.

    Args:
        number: of the call, counted from 1.
        after: whether the call is done then. Python tells of a call before it is made, so what it tells next ends the process.
    """
    left = number + 1 if after else number
    passed = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left, passed
        # The kill is told of too.
        if event == "os.kill":
            return
        changes = event in CALLS or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
        left -= changes
        if left == 0 or (passed and after):
            os.kill(os.getpid(), signal.SIGKILL)
        passed = left == 1

    sys.addaudithook(watch)
    flush = os.fsync

    def flushed(descriptor: Any) -> None:
        sys.audit(FLUSH, descriptor)
        flush(descriptor)

    os.fsync = flushed


def live(
    arguments: list[str], output: Path, prepare: Callable[[], None], *, errors: Path | None = None
) -> int:
    """Fork a process that runs ``arb``, and return its number.

    Args:
        arguments: of the command line.
        output: file that gets what it says.
        errors: file that gets what it says on stderr, if that is another one.
        prepare: is called first in the new process.
    """
    process = os.fork()
    if process:
        return process
    try:
        for number, path in ((1, output), (2, errors or output)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        prepare()
        cli.main(arguments)
    except SystemExit as error:
        sys.stdout.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(99)


def wait(process: int, seconds: float) -> int | None:
    """Wait for the end of a process for so many seconds at most. Return its status as `os.waitpid` has it, None if it lives."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def result_of(run: Path) -> dict[str, Any]:
    """Return all of a finished run that depends on its settings alone."""
    summary = json.loads((run / "summary.json").read_text())
    metrics = [
        {name: line[name] for name in ("step", "val_bpb", "train_bpb", "flip_rate", "rate") if name in line}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    files = {path.name for path in run.iterdir() if not path.name.startswith("events.")}
    checkpoints = {name: load_checkpoint(run / f"{name}.safetensors") for name in ("latest", "best", "final")}
    return {
        "summary": {name: summary[name] for name in DIFFERS},
        "metrics": metrics,
        "sample": (run / "sample.txt").read_bytes(),
        "files": files,
        "checkpoints": {name: (each.step, each.state_sha256) for name, each in checkpoints.items()},
    }


def trial(scratch: Path, name: str) -> Counter[str]:
    """Take a run through several deaths to its end, and return how it was killed.

    Args:
        scratch: folder with ``text.txt``, and with the finished run ``whole``.
        name: of the run, which decides every draw.

    Raises:
        AssertionError: it ended differently.
    """
    draw = random.Random(name)
    run, output = scratch / name, scratch / f"{name}.out"
    begin = arguments_of(scratch, run)
    deaths: Counter[str] = Counter()
    # The step of the newest checkpoint that an earlier life has left.
    reached = -1
    for life in range(LIVES):
        begun = RunFolder(run).has_run()
        arguments = ["train", "--run", str(run), "--resume"] if begun else begin
        slow = draw.randrange(4) == 0
        kind = draw.choice(("clock", "before a call", "after a call"))
        call, seconds = draw.randint(1, 70), draw.uniform(0, 1.5)

        def prepare(
            slow: bool = slow, kind: str = kind, call: int = call, last: bool = life == LIVES - 1
        ) -> None:
            if slow:
                make_disk_slow()
            if kind != "clock" and not last:
                die_at_call(call, after=kind == "after a call")

        process = live(arguments, output, prepare)
        status = None
        if kind == "clock" and life < LIVES - 1:
            status = wait(process, seconds)
            if status is None:
                os.kill(process, signal.SIGKILL)
        status = wait(process, SLOW_SECONDS) if status is None else status
        if status is None:
            os.kill(process, signal.SIGKILL)
            wait(process, SLOW_SECONDS)
            raise AssertionError(f"life {life} took more than {SLOW_SECONDS} s")
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, f"life {life} ended with {os.WEXITSTATUS(status)}"
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"life {life} ended by signal {os.WTERMSIG(status)}"
        deaths[kind + (", slow disk" if slow else "")] += 1
        newest, refusals = RunFolder(run).load_newest()
        assert not refusals, f"life {life} left a checkpoint that is refused: {refusals}"
        before, reached = reached, -1 if newest is None else newest.step
        assert reached >= before, f"life {life} left step {reached} as the newest, but found step {before}"
        logged = last_step(run / "metrics.jsonl")
        assert reached >= logged - 1, (
            f"life {life} left step {reached} as the newest, but metrics of {logged}"
        )
    found, wanted = result_of(run), result_of(scratch / "whole")
    for part, value in wanted.items():
        assert found[part] == value, f"its {part} are {found[part]!r}, but those of a whole run {value!r}"
    return deaths


def arguments_of(scratch: Path, run: Path) -> list[str]:
    """Return the command line that begins a run."""
    sizes = ["--steps", str(STEPS), "--save-interval", "1", "--log-interval", "1", "--eval-interval", "2"]
    return [
        "train", "--preset", "nano", "--data", str(scratch / "text.txt"), "--device", "cpu", "--run", str(run), *sizes
    ]  # fmt: skip


def prepared(scratch: Path) -> None:
    """Write the text, and train the run that nothing happens to."""
    (scratch / "text.txt").write_bytes(nano.TEXT)
    process = live(arguments_of(scratch, scratch / "whole"), scratch / "whole.out", lambda: None)
    status = wait(process, SLOW_SECONDS)
    assert status == 0, (scratch / "whole.out").read_text()


def shard(scratch: Path, *, seed: int, part: int, kills: int) -> Counter[str]:
    """Take runs through deaths until there were so many.

    Raises:
        AssertionError: a run ended differently; the message names its seed, and what it said.
    """
    deaths: Counter[str] = Counter()
    number = 0
    while deaths.total() < kills:
        name = f"{seed}-{part}-{number}"
        try:
            deaths += trial(scratch, name)
        except Exception as error:
            said = (scratch / f"{name}.out").read_text(errors="replace")
            raise AssertionError(f"run {name}: {type(error).__name__}: {error}\n{said}") from error
        number += 1
    return deaths


def campaign(*, kills: int, seed: int, jobs: int) -> Counter[str]:
    """Kill runs so many times, and return how often in which way.

    Args:
        kills: at least.
        seed: of the draws.
        jobs: processes that do it side by side.

    Raises:
        AssertionError: a run ended differently.
    """
    # Before the first fork, as threads do not survive one.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        nano.register(patch)
        nano.without_pictures(patch)
        scratch = Path(folder)
        prepared(scratch)
        parts = [(scratch, seed, part, kills // jobs + (part < kills % jobs)) for part in range(jobs)]
        return beside(_part, parts)


def beside(part: Callable[[Any], Counter[str]], parts: list[Any]) -> Counter[str]:
    """Do the parts of a campaign in forked processes side by side, and return the sum of their counts."""
    if len(parts) == 1:
        return part(parts[0])
    with multiprocessing.get_context("fork").Pool(len(parts)) as pool:
        return sum(pool.imap_unordered(part, parts), Counter())


def _part(given: tuple[Path, int, int, int]) -> Counter[str]:
    scratch, seed, part, kills = given
    return shard(scratch, seed=seed, part=part, kills=kills)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill runs at random moments until each has ended.")
    parser.add_argument("--kills", type=int, default=100, help="how many, at least [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side [1]")
    options = parser.parse_args()
    began = time.monotonic()
    deaths = campaign(kills=options.kills, seed=options.seed, jobs=options.jobs)
    print(
        f"{deaths.total():,} kills of seed {options.seed} in {time.monotonic() - began:.0f} s, no run ended differently"
    )
    for kind, count in deaths.most_common():
        print(f"{count:8,}  {kind}")


if __name__ == "__main__":
    sys.exit(main())
