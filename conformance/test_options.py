"""Options of the suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.system.command import REPOSITORY

FILES = (
    "graph/test_video.py",
    "distributed/test_distributed.py",
    "sidecars/test_cuda.py",
    "system/test_survival.py",
    "test_compiles.py",
    "test_options.py",
)
"""Files of several kinds, whose tests are collected."""

COLLECT = """
import pathlib, sys, pytest

class Notes:
    def pytest_deselected(self, items):
        pathlib.Path(sys.argv[1]).write_text("".join(item.nodeid + chr(10) for item in items))

sys.exit(pytest.main(sys.argv[2:], plugins=[Notes()]))
"""
"""A program that lets pytest collect, and notes in a file which tests an option leaves out."""


class Collected:
    """What pytest says of the tests that it would run with `--on-device`, beside a file that cannot be imported.

    chosen, left_out:  names of tests without their parameters, in their order
    broken:            the file that cannot be imported
    failures:          what `--failures` keeps of it
    status:            the exit status
    """

    def __init__(self, folder: Path) -> None:
        self.broken, left_out, failures = (
            folder / name for name in ("test_broken.py", "left_out.txt", "failures.txt")
        )
        self.broken.write_text("import no_such_module\n")
        files = [f"conformance/{file}" for file in FILES]
        options = ["--on-device", f"--failures={failures}", "--collect-only", "-q", "-p", "no:cacheprovider"]
        result = subprocess.run(
            [sys.executable, "-c", COLLECT, str(left_out), *files, str(self.broken), *options],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
        self.status = result.returncode
        self.chosen, self.left_out = (
            list(dict.fromkeys(re.findall(r"^conformance/(\S+?::\w+)", text, re.MULTILINE)))
            for text in (result.stdout, left_out.read_text())
        )
        self.failures = failures.read_text()


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Let pytest say which tests it would run: once, as a process takes seconds to import them."""
    return Collected(tmp_path_factory.mktemp("collected"))


def test_what_runs_on_a_device_is_found(collected: Collected) -> None:
    """Tests of the implementation, of what ranks found, and of the GPUs of the machine; no others."""
    on_device, others = collected.chosen, collected.left_out
    assert (
        "distributed/test_distributed.py::test_gradients_are_summed_in_rank_order_before_they_vote"
        in on_device
    )
    for names in (on_device, others):
        assert any(name.startswith("graph/test_video.py") for name in names)
    assert not [name for name in others if "test_cuda.py" in name or "on_a_gpu" in name]
    assert any("test_cuda.py" in name for name in on_device)
    assert "system/test_survival.py::test_same_seed_same_hash_in_another_process" in others
    assert "test_options.py::test_what_runs_on_a_device_is_found" in others
    assert not set(on_device) & set(others)


def test_the_longest_test_comes_first(collected: Collected) -> None:
    assert collected.chosen[0] == "test_compiles.py::test_every_kernel_compiles"


def test_a_file_that_cannot_be_imported_is_a_failure(collected: Collected) -> None:
    """Its tests do not run, so that nothing else tells of them."""
    assert collected.status
    told = collected.failures
    assert ", collect\n" in told and str(collected.broken) in told
    assert "No module named 'no_such_module'" in told
