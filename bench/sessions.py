"""Sessions of pytest for tests of the benchmarks, each in a process of its own that need not import torch.

A process forks them that has imported the libraries and computed nothing. An import of torch takes two seconds of a core, which is
more than most of these sessions take.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine

SECONDS = 300
"""Seconds after which a session hangs."""

LIBRARIES = ["torch", "triton"]
"""What sessions find imported. pytest must import its plugins itself, and nothing of this repository is older than the session."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(LIBRARIES)


def session(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest at the root of the repository, and return its exit status and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = FORKS.Process(target=_begin, args=(arguments, out, err))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"pytest {' '.join(arguments)} hung for {SECONDS} s")
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _begin(arguments: tuple[str, ...], out: Path, err: Path) -> None:
    """Be the process of a session."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(machine.ROOT)
    # Where the suite itself is spread over processes, this session is not.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]
    import pytest

    sys.exit(int(pytest.main(list(arguments))))
