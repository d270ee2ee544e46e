"""The suite as others use it: for an implementation outside of this repository's own two, which has some of the ops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance.import_lint import ROOT

GIVEN = [
    *("conformance/ops", "conformance/test_comparison.py", "conformance/test_vectors.py"),
    *("--impl", "conformance.plain_numpy", "--device", "cpu", "-q", "-p", "no:cacheprovider"),
]
"""What each session of the suite is given."""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that begins sessions of the suite."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def suite(*arguments: str, broken: str = "") -> subprocess.CompletedProcess[str]:
    """Run the suite against `conformance.plain_numpy`, after a statement that breaks it."""
    code = (
        "import sys, numpy, pytest, torch\nfrom conformance import plain_numpy\n"
        f"{broken}\nsys.exit(pytest.main(sys.argv[1:]))"
    )
    return run(code, *GIVEN, *arguments)


def test_an_implementation_in_numpy_passes() -> None:
    families = [f"--family={name}" for name in ("packing", "dither", "votes")]
    result = suite("--examples=5", *families)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "compared:       7 of 7 ops (7 EXACT) on 35 examples" in result.stdout
    assert "failed" not in result.stdout


def test_the_summary_counts_the_ops_that_were_chosen() -> None:
    result = suite("--examples=2", "--family=packing", "-k", "unpack_trits")
    assert "compared:       1 of 1 ops (1 EXACT) on 2 examples" in result.stdout, result.stdout[-2000:]
    assert "not compared" not in result.stdout


def test_a_slip_in_it_is_found(tmp_path: Path) -> None:
    """Votes that are rounded away from zero, not to even, differ in ties alone. What fails is in a file too."""
    broken = "numpy.rint = lambda x: numpy.sign(x) * numpy.floor(abs(x) + 0.5)"
    failures = tmp_path / "failures"
    result = suite("--family=votes", "--maxfail=1", f"--failures={failures}", broken=broken)
    name, *said = failures.read_text().splitlines()
    assert name.startswith("conformance/") and name.endswith(", call")
    assert any("stochastic_votes" in line for line in said)
    assert result.returncode == 1 and "stochastic_votes" in result.stdout, result.stdout[-2000:]
    assert " called " in result.stdout and "stochastic_votes of conformance.plain_numpy" in result.stdout


def test_a_missing_op_is_one_failure() -> None:
    """The laws that need it are left out, and the summary says so. Nothing is shrunk."""
    broken = "del plain_numpy.row_exponents, plain_numpy.step_from_loss"
    result = suite("--family=votes", "--examples=2", "-rN", broken=broken)
    assert result.returncode == 1 and result.stdout.count("Falsifying") == 0, result.stdout[-2000:]
    assert " 2 failed, " in f" {result.stdout.splitlines()[-1]}"
    for op in ("row_exponents", "step_from_loss"):
        assert result.stdout.count(f"\nconformance.plain_numpy has no op `{op}`\n") == 1
        assert (
            f"skipped:        laws and vectors of `{op}`: conformance.plain_numpy has no op `{op}`"
            in result.stdout
        )
    assert "not compared:   row_exponents, step_from_loss" in result.stdout
    assert "where:          tensors on the CPU" in result.stdout


REFUSED = {
    "conformance.nosuch": ("--impl=conformance.nosuch", "--family=votes"),
    "nosuch.ops": ("--impl=nosuch.ops", "--family=votes"),
    "pakking": ("--family=pakking",),
}
"""Options of sessions that end before a test runs, by what is wrong in them."""


@pytest.fixture(scope="module")
def refused() -> dict[str, list[Any]]:
    """Return the exit status, stdout and stderr of each of these sessions. One process begins them all: torch takes seconds."""
    code = """
import contextlib, io, json, sys, pytest
given, refused = map(json.loads, sys.argv[1:])
found = {}
for name, options in refused.items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = pytest.main([*given, *options])
    found[name] = [int(status), out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""
    result = run(code, json.dumps(GIVEN), json.dumps(REFUSED))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("conformance.nosuch", "No module named 'conformance.nosuch'\n"),
        (
            "nosuch.ops",
            "No module named 'nosuch'. `python -m pytest` looks for it in the current folder, `pytest` does not\n",
        ),
    ],
)
def test_an_implementation_that_cannot_be_imported_ends_the_session(
    refused: dict[str, list[Any]], name: str, found: str
) -> None:
    """Where the package is missing as a whole, it may lie in the current folder, as that of a port does."""
    status, out, err = refused[name]
    assert status == 4 and "failed" not in out
    assert f"--impl {name} cannot be imported: ModuleNotFoundError: {found}" in err


def test_a_family_that_is_none_is_named(refused: dict[str, list[Any]]) -> None:
    status, _, err = refused["pakking"]
    assert status == 4
    assert "--family is 'pakking', but must be one of activations, attention," in err
