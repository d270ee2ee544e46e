"""Kills runs with SIGKILL at random moments until each has ended, and looks for one that ended differently.

    python -m conformance.system.kills --kills 1000 --seed 1 --jobs 2 --of text|mix|adapters

A run has several lives. It learns from a text with the preset ``nano``, from a mix of every kind of data, or adapters. A life
ends at a moment of the clock, or at one of the calls that open, rename, remove or flush a file, just before or just after it. The
next life goes on with ``--resume``, as a user would. After every death the folder must hold what a run can go on from. The last
life must leave the state, the metrics and the files of a run that nothing happened to.

What a life does before it imports anything is no part of a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.metrics import last_step, read_metrics
from arbitor.optimized.training.run_folder import RunFolder
from conformance.system.campaigns import arguments_of, ended, live, main, wait
from conformance.system.nano_arb import make_disk_slow

LIVES = 12
"""Lives of a run at most; nobody kills the last."""

FLUSH = "arbitor.fsync"
"""The event of a flush, which Python itself does not tell of."""

CALLS = ("os.rename", "os.remove", "os.mkdir", "fcntl.flock", FLUSH)
"""Events of the calls that change files or folders, beside opening one to write."""

DIFFERS = (
    *("state_sha256", "adapter_sha256", "val_bpb", "best_bpb", "baselines", "steps", "skipped", "faulty_rows"),
    "media",
)  # fmt: skip
"""What a summary says of the result, and not of the time or the place. A run has the numbers of what it learns."""

MEASURED = ("step", "val_bpb", "train_bpb", "flip_rate", "rate", "media")
"""What a line of metrics says of it."""

WRITTEN = ("codec.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
"""Files of a finished run that hold nothing of the time, where it has them."""


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


def result_of(run: Path) -> dict[str, Any]:
    """Return all of a finished run that depends on its settings alone."""
    summary = json.loads((run / "summary.json").read_text())
    metrics = [
        {name: line[name] for name in MEASURED if name in line}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    files = {path.name for path in run.iterdir() if not path.name.startswith("events.")}
    checkpoints = {name: load_checkpoint(run / f"{name}.safetensors") for name in ("latest", "best", "final")}
    return {
        "summary": {name: summary[name] for name in DIFFERS if name in summary},
        "metrics": metrics,
        "sample": (run / "sample.txt").read_bytes(),
        "files": files,
        "content": {name: (run / name).read_bytes() for name in WRITTEN if (run / name).exists()},
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
    whole_seconds = json.loads((scratch / "seconds.json").read_text())
    deaths: Counter[str] = Counter()
    # The step of the newest checkpoint that an earlier life has left.
    reached = -1
    for life in range(LIVES):
        begun = RunFolder(run).has_run()
        arguments = [begin[0], "--run", str(run), "--resume"] if begun else begin
        slow = draw.randrange(4) == 0
        kind = draw.choice(("clock", "before a call", "after a call"))
        call, seconds = draw.randint(1, 70), draw.uniform(0, whole_seconds)

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
        if status is None:
            status = ended(process, f"life {life}")
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


def part(scratch: Path, seed: int, first: int, count: int) -> Counter[str]:
    """Take runs through deaths until there were so many.

    Raises:
        AssertionError: a run ended differently; the message names its seed, and what it said.
    """
    deaths: Counter[str] = Counter()
    number = 0
    while deaths.total() < count:
        name = f"{seed}-{first}-{number}"
        try:
            deaths += trial(scratch, name)
        except Exception as error:
            said = (scratch / f"{name}.out").read_text(errors="replace")
            raise AssertionError(f"run {name}: {type(error).__name__}: {error}\n{said}") from error
        number += 1
    return deaths


if __name__ == "__main__":
    main(part, "kills", default=100)
