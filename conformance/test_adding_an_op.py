"""An op is added by docs/adding-an-op.md alone, to a new family and to an old one; a piece that is left out is named.

Each test works on a copy of the tree, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import import_lint
from conformance.imaginary import HEADS, OP, PIECES, add, copy_of_the_tree, path_of
from conformance.import_lint import ROOT

FAMILY = "mirror"
MOST_FILES = {"of a new family": 12, "of an old family": 8}

COMPLETENESS = (
    "conformance/test_families.py",
    "conformance/test_mutants.py::test_every_law_rejects_a_mutant",
)
"""The tests that name a missing piece."""

OF_THE_OP = (
    "test_comparison.py",
    "test_mutants.py",
    "test_vectors.py",
    "test_op_table.py",
    "test_contract.py",
)
"""The tests that run whatever belongs to an op, beside those of its family."""

RUNNER = """
import os, sys
import hypothesis, pytest, torch, triton  # once for all copies: most of the time of a small run

for folder, *arguments in map(str.split, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path.insert(0, folder)
        if arguments[0] == "inputs":  # what `pytest bench` checks of them, without the plugin that its other tests need
            from bench.inputs import faults
            print(*faults(), sep="\\n", flush=True)
            os._exit(0)
        pytest.main(["-v", "--device", "cpu", "-p", "no:cacheprovider", *arguments])
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, folder
"""
"""Runs tests in copies of the tree, each in a process of its own, and leaves what they print in the file `output` of the copy."""


def outputs(runs: dict[Path, str]) -> list[str]:
    """Return what the tests print that are chosen for each copy by the arguments of pytest; for `inputs`, the faults of those."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
    environment.pop("PYTHONPATH", None)
    chosen = [f"{folder} {arguments}" for folder, arguments in runs.items()]
    done = subprocess.run(
        (sys.executable, "-c", RUNNER, *chosen), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [(folder / "output").read_text() for folder in runs]


def files_of_the_guide(*, new_family: bool) -> list[str]:
    """Return the files that the tables of the guide name, of the second table for a new family alone."""
    guide = (ROOT / "docs" / "adding-an-op.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", guide, re.MULTILINE)
    assert len(tables) == 2, "the guide has a table of every op and one of a new family"
    return re.findall(r"^\| `([^`]+)` \|", "".join(tables if new_family else tables[:1]), re.MULTILINE)


@pytest.mark.parametrize("family", [FAMILY, "packing"])
def test_guide_lists_the_files_of_an_op(tmp_path: Path, family: str) -> None:
    """The files that were written are the files of the guide, and they are few."""
    listed = files_of_the_guide(new_family=family == FAMILY)
    written = add(copy_of_the_tree(tmp_path), family)
    assert {path_of(pattern, family) for pattern in listed} == written
    most = MOST_FILES["of a new family" if family == FAMILY else "of an old family"]
    assert len(listed) <= most, f"{len(listed)} files"


def test_op_added_by_the_guide_passes(tmp_path: Path) -> None:
    """Everything that runs for an op runs for this one, in a new family and in an old one."""
    for family in (FAMILY, "packing"):
        add(copy_of_the_tree(tmp_path / family), family)
    add(copy_of_the_tree(tmp_path / "inputs"), FAMILY)
    tests = "conformance/test_families.py conformance/ops/test_{0}.py " + " ".join(
        f"conformance/{name}" for name in OF_THE_OP
    )
    runs = {tmp_path / family: tests.format(family) + " -k mirror" for family in (FAMILY, "packing")}
    *passed, faults = outputs({**runs, tmp_path / "inputs": "inputs"})
    for output in passed:
        assert re.search(r"\d\d passed", output) and "failed" not in output and "error" not in output, output
        for test in (
            f"test_op_equals_reference[{OP}]",
            "test_mirror_trits_twice",
            f"test_vector[{OP}-three]",
        ):
            assert f"{test} PASSED" in output, output
    assert not faults.strip(), faults
    for family in (FAMILY, "packing"):
        assert not import_lint.breaches(tmp_path / family)


def without(text: str, start: str, end: str) -> str:
    """Return a text without the part from `start` up to `end`."""
    assert start in text and end in text[text.index(start) + 1 :], f"{start} ... {end} is not there"
    first = text.index(start)
    return text[:first] + text[text.index(end, first + 1) :]


LAW_FILE = f"conformance/ops/test_{FAMILY}.py"
LACKS = f"family `{FAMILY}` lacks"

TAKEN_AWAY = {
    "spec page": (f"docs/spec/{FAMILY}.md", None, f"{LACKS} the page docs/spec/{FAMILY}.md"),
    "heading": (
        f"docs/spec/{FAMILY}.md",
        lambda text: text.replace(f"### {OP}", ""),
        f"{LACKS} the heading `{OP}` in docs/spec/{FAMILY}.md",
    ),
    "reference op": (
        f"reference/ops/{FAMILY}.py",
        lambda text: text[: text.index("\n__all__ = [*")],
        f"{LACKS} `{OP}` among what arbitor.reference.ops exports",
    ),
    "reference export": (
        "reference/ops/__init__.py",
        lambda text: text.replace(HEADS["reference/ops/__init__.py"], ""),
        f"{LACKS} `{OP}` among what arbitor.reference.ops exports",
    ),
    "row": (
        f"reference/op_table/{FAMILY}.py",
        None,
        f"{LAW_FILE}: no family of the op table has this name",
    ),
    "law file": (LAW_FILE, None, f"{LACKS} the file {LAW_FILE}"),
    "calls": (
        LAW_FILE,
        lambda text: without(text, "@calls", "@law"),
        f"{LACKS} calls of `{OP}` to compare",
    ),
    "law": (LAW_FILE, lambda text: without(text, "@law", "test_refusals_of_"), f"{LACKS} a law"),
    "mutant of a law": (
        LAW_FILE,
        lambda text: re.sub(r"rejects=\[mutant\(\"mirror_rolls.*\]", "rejects=[]", text),
        f"{LAW_FILE}: test_mirror_trits_twice rejects no mutant",
    ),
    "mutant that is compared": (
        LAW_FILE,
        lambda text: text.replace(f', compared="{OP}"', ""),
        f"{LACKS} a mutant that comparing `{OP}` rejects",
    ),
    "refusals": (
        LAW_FILE,
        lambda text: text[: text.index("test_refusals_of_")],
        f"{LACKS} a call that `{OP}` refuses",
    ),
    "vector": (
        f"conformance/vectors/{OP}.json",
        None,
        f"{LACKS} the golden vector conformance/vectors/{OP}.json",
    ),
    "optimized op": (
        f"optimized/ops/{FAMILY}.py",
        lambda text: text[: text.index("\n__all__ = [*")],
        f"family `{FAMILY}`: arbitor.optimized.ops does not export {OP}",
    ),
    "optimized export": (
        "optimized/ops/__init__.py",
        lambda text: text.replace(HEADS["optimized/ops/__init__.py"], ""),
        f"family `{FAMILY}`: arbitor.optimized.ops does not export {OP}",
    ),
    "bench inputs": (f"bench/inputs/{FAMILY}.py", None, f"bench/inputs/{FAMILY}.py is missing"),
    "kernel": (f"optimized/kernels/{FAMILY}.py", None, f"cannot import name '{FAMILY}'"),
}
"""By the name of a piece: its file, how it is taken away (None: the whole file), and the sentence that names it."""


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    """Piece by piece is taken away from a complete family: a check fails and names it."""
    runs = {}
    for piece, (name, taken_away, _) in TAKEN_AWAY.items():
        folder = copy_of_the_tree(tmp_path / piece.replace(" ", "_"))
        add(folder, FAMILY)
        path = folder / name
        whole = path.read_text()
        path.unlink()
        if taken_away is not None:
            path.write_text(taken_away(whole))
            assert path.read_text() != whole, f"nothing was taken from {name}"
        runs[folder] = "inputs" if piece == "bench inputs" else " ".join(COMPLETENESS)
    found = zip(TAKEN_AWAY, outputs(runs), strict=True)
    silent = [f"{piece}:\n{output}" for piece, output in found if TAKEN_AWAY[piece][2] not in output]
    assert not silent, "not named: " + "\n".join(silent)


def test_every_file_of_the_guide_is_taken_away_once() -> None:
    """No file of the guide is superfluous: without each of them a check fails."""
    tried = {name for name, *_ in TAKEN_AWAY.values()}
    assert tried == {path_of(pattern, FAMILY) for pattern in {*PIECES, *HEADS}}
