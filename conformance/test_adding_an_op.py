"""An op is added by docs/adding-an-op.md alone, to a new family and to an old one. A check names each piece that is left out.

The tests work on copies of the tree, in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
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
"""The tests that run everything of an op, beside the tests of its family."""

RUNNER = """
import json, os, sys
import hypothesis, pytest, torch, triton  # once for all runs: most of the time of a small one

sys.dont_write_bytecode = False  # what one run compiles the later ones in its copy find
for place, (folder, arguments, name, text) in enumerate(json.load(sys.stdin)):
    os.chdir(folder)
    if name is not None:
        os.rename(name, name + ".kept")
    if text is not None:
        with open(name, "w") as file:
            file.write(text)
    child = os.fork()
    if child == 0:
        output = os.open(f"output_{place}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path.insert(0, folder)
        if arguments == "inputs":  # what `pytest bench` checks of them, without the plugin that its other tests need
            from bench.inputs import faults
            print(*faults(), sep="\\n", flush=True)
            os._exit(0)
        pytest.main(["-v", "--device", "cpu", "-p", "no:cacheprovider", *arguments.split()])
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, (folder, arguments)
    if name is not None:
        os.replace(name + ".kept", name)
"""
"""Runs tests in copies of the tree, each run in a process of its own that leaves what it prints in a file of the copy."""


@dataclass(frozen=True)
class Run:
    """Tests in a copy of the tree, chosen by the arguments of pytest, or the check of what goes into a benchmark (`inputs`).

    changed: a file of the copy that has another text for the time of the run, or is not there if `text` is None
    """

    folder: Path
    arguments: str
    changed: str | None = None
    text: str | None = None


def outputs(runs: list[Run]) -> list[str]:
    """Return what each run prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    environment.pop("PYTHONPATH", None)
    asked = json.dumps([(str(run.folder), run.arguments, run.changed, run.text) for run in runs])
    done = subprocess.run(
        (sys.executable, "-c", RUNNER), env=environment, input=asked, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [(run.folder / f"output_{place}").read_text() for place, run in enumerate(runs)]


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
    tests = "conformance/test_families.py conformance/ops/test_{0}.py " + " ".join(
        f"conformance/{name}" for name in OF_THE_OP
    )
    runs = [Run(tmp_path / family, tests.format(family) + " -k mirror") for family in (FAMILY, "packing")]
    *passed, faults = outputs([*runs, Run(tmp_path / FAMILY, "inputs")])
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
"""The file of each piece, how the piece is taken away (None: with the whole file), and the sentence that names it."""


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    """Each piece is taken away from a complete family. A check then fails and names the piece."""
    folder, runs = copy_of_the_tree(tmp_path), []
    add(folder, FAMILY)
    for piece, (name, taken_away, _) in TAKEN_AWAY.items():
        whole = (folder / name).read_text()
        text = None if taken_away is None else taken_away(whole)
        assert text != whole, f"nothing was taken from {name}"
        runs.append(Run(folder, "inputs" if piece == "bench inputs" else " ".join(COMPLETENESS), name, text))
    complete, *found = outputs([Run(folder, " ".join(COMPLETENESS)), *runs])
    assert " passed" in complete and "failed" not in complete, complete
    silent = [
        f"{piece}:\n{output}"
        for piece, output in zip(TAKEN_AWAY, found, strict=True)
        if TAKEN_AWAY[piece][2] not in output
    ]
    assert not silent, "not named: " + "\n".join(silent)


def test_every_file_of_the_guide_is_taken_away_once() -> None:
    """No file of the guide is superfluous. Without any one of them a check fails."""
    tried = {name for name, *_ in TAKEN_AWAY.values()}
    assert tried == {path_of(pattern, FAMILY) for pattern in {*PIECES, *HEADS}}
