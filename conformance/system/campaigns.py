"""What the campaigns against the trainer share: a finished run to attack, forked processes of ``arb``, and the command line.

A campaign is a function that does a part of it: `part(scratch, seed, first, count)` attacks, with the draws of the numbers from
`first` on, so often, and returns how often what came of it. It raises AssertionError at the first fault, with what it takes to see
the fault again. The folder `scratch` has ``text.txt`` and the finished run ``whole``.

All is forked from a process that has imported everything, so that a run takes a second.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from arbitor.optimized import cli
from conformance.system.beginnings import BEGINNINGS
from conformance.training import nano

SLOW_SECONDS = 60.0
"""Seconds after which a process hangs. A whole run on a text takes one or two, and one on a mix ten."""

Part = Callable[[Path, int, int, int], Counter[str]]


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


def ended(process: int, what: str) -> int:
    """Wait for the end of a process, and return its status as `os.waitpid` has it. Kill it and fail if it hangs."""
    status = wait(process, SLOW_SECONDS)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise AssertionError(f"{what} took more than {SLOW_SECONDS} s")
    return status


def arguments_of(scratch: Path, run: Path) -> list[str]:
    """Return the command line that begins a run."""
    return [*json.loads((scratch / "begin.json").read_text()), "--run", str(run)]


@contextmanager
def prepared(of: str = "text") -> Iterator[Path]:
    """Return a folder with a text and the run that nothing happens to, and have the preset nano within the block.

    Args:
        of: what the run learns, one of `BEGINNINGS`.
    """
    # Before the first fork, as threads do not survive one.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        nano.register(patch)
        nano.without_pictures(patch)
        scratch = Path(folder)
        (scratch / "text.txt").write_bytes(nano.TEXT)

        def whole(arguments: list[str], name: str) -> None:
            # Not in this process, so that it can be forked still.
            process = live(arguments, scratch / f"{name}.out", lambda: None)
            assert ended(process, f"the run {name}") == 0, (scratch / f"{name}.out").read_text()

        (scratch / "begin.json").write_text(json.dumps(BEGINNINGS[of](scratch, whole)))
        began = time.monotonic()
        whole(arguments_of(scratch, scratch / "whole"), "whole")
        (scratch / "seconds.json").write_text(json.dumps(time.monotonic() - began))
        yield scratch


def campaign(part: Part, *, count: int, seed: int, jobs: int, of: str = "text") -> Counter[str]:
    """Attack so often, and return how often what came of it.

    Args:
        part: of the campaign.
        count: how often, at least.
        seed: of the draws.
        jobs: processes that do it side by side.
        of: what the attacked run learns, one of `BEGINNINGS`.

    Raises:
        AssertionError: the first fault.
    """
    with prepared(of) as scratch:
        return side_by_side(functools.partial(part, scratch, seed), count, jobs)


def side_by_side(part: Callable[[int, int], Counter[str]], count: int, jobs: int) -> Counter[str]:
    """Do a part for each of some forked processes, given its first number and its count. Return the sum of what they count."""
    if jobs == 1:
        return part(0, count)
    sizes = [count // jobs + (number < count % jobs) for number in range(jobs)]
    parts = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return sum(pool.imap_unordered(functools.partial(_given, part), parts), Counter())


def _given(part: Callable[[int, int], Counter[str]], numbers: tuple[int, int]) -> Counter[str]:
    return part(*numbers)


def main(part: Part, what: str, *, default: int) -> None:
    """Run a campaign from the command line.

    Args:
        part: of the campaign.
        what: is counted, in the plural; the name of the option too.
        default: how often.
    """
    parser = argparse.ArgumentParser(description=(sys.modules[part.__module__].__doc__ or "").split("\n")[0])
    parser.add_argument(f"--{what}", type=int, default=default, dest="count", help=f"how many [{default}]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side [1]")
    parser.add_argument("--of", choices=list(BEGINNINGS), default="text", help="what the run learns [text]")
    options = parser.parse_args()
    began = time.monotonic()
    ends = campaign(part, count=options.count, seed=options.seed, jobs=options.jobs, of=options.of)
    print(
        f"{ends.total():,} {what} of seed {options.seed} ({options.of}) in {time.monotonic() - began:.0f} s, no fault"
    )
    for end, count in ends.most_common():
        print(f"{count:8,}  {end}")
