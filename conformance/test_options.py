"""Options of the suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conformance.system.command import REPOSITORY


def collect(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Let pytest say which tests it would run."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def collected(*arguments: str) -> set[str]:
    """Return the names of the tests that the suite would run, without their parameters, in files of several kinds."""
    files = (
        "graph/test_video.py",
        "distributed/test_distributed.py",
        "sidecars/test_cuda.py",
        "system/test_survival.py",
        "test_options.py",
    )
    result = collect(*(f"conformance/{file}" for file in files), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return set(re.findall(r"^conformance/(\S+?::\w+)", result.stdout, re.MULTILINE))


def test_what_runs_on_a_device_is_found() -> None:
    """Tests of the implementation, of what ranks found, and of the GPUs of the machine; no others."""
    every, on_device = collected(), collected("--on-device")
    assert on_device < every
    assert (
        "distributed/test_distributed.py::test_gradients_are_summed_in_rank_order_before_they_vote"
        in on_device
    )
    assert any(name.startswith("graph/test_video.py") for name in on_device)
    assert any(name.startswith("graph/test_video.py") for name in every - on_device)
    assert {name for name in every if "test_cuda.py" in name or "on_a_gpu" in name} <= on_device
    assert "system/test_survival.py::test_same_seed_same_hash_in_another_process" in every - on_device
    assert "test_options.py::test_what_runs_on_a_device_is_found" in every - on_device


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    """Its tests do not run, so that nothing else tells of them."""
    broken, failures = tmp_path / "test_broken.py", tmp_path / "failures.txt"
    broken.write_text("import no_such_module\n")
    assert collect("conformance/test_options.py", str(broken), f"--failures={failures}").returncode
    told = failures.read_text()
    assert ", collect\n" in told and str(broken) in told and "No module named 'no_such_module'" in told
