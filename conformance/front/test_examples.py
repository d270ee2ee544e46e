"""The examples of README and of the pages for users run as they stand there, and so do the scripts."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import arbitor
import arbitor.adapters
import arbitor.nn
from arbitor.optimized.training.loop import train
from conformance.import_lint import ROOT
from conformance.report import skip
from conformance.training import nano
from conformance.training.runs import options

PAGES = (
    "README.md",
    "reference/README.md",
    "docs/implementing.md",
    "docs/python.md",
    *(f"docs/tutorials/{page.name}" for page in (ROOT / "docs/tutorials").glob("*.md")),
)
EXAMPLES = [
    pytest.param(block, id=f"{page}-{place}")
    for page in PAGES
    for place, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    )
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples run: with a run, and a text to learn from."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_bytes(nano.TEXT)
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        nano.without_pictures(patch)
        train(options(folder / "text.txt", folder / "runs" / "demo"))
    return folder


def in_docstrings() -> Iterator[tuple[str, str]]:
    """Yield name and text of every block in a docstring of `arbitor` that is Python and does something."""
    for path in sorted((ROOT / "arbitor").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = f"\n\n{ast.get_docstring(node) or ''}\n"
            for block in re.findall(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", text):
                with contextlib.suppress(SyntaxError):
                    if any(
                        isinstance(each, ast.Assign | ast.For)
                        for each in ast.parse(textwrap.dedent(block)).body
                    ):
                        yield getattr(node, "name", path.stem), textwrap.dedent(block)


DOCSTRINGS = [pytest.param(block, id=name) for name, block in in_docstrings()]

SCRIPTS = sorted((ROOT / "docs" / "scripts").glob("*.py"))
"""Scripts that a reader runs from end to end; here they take few steps, and a small model."""


def test_every_page_has_examples() -> None:
    assert {str(example.id).rpartition("-")[0] for example in EXAMPLES} == set(PAGES)


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_runs(source: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in source and importlib.util.find_spec("transformers") is None:
        skip("an example", "it needs transformers, which is not installed")
    monkeypatch.chdir(demo)
    left: dict[str, Any] = {}
    exec(compile(source, "example", "exec"), left)
    if isinstance(left.get("losses"), list):
        assert left["losses"][-1] < left["losses"][0] - 1
    if "lost" in left:
        assert left["lost"].keys() and all(0 < loss.error < 0.6 for loss in left["lost"].values())


def test_docstrings_have_examples() -> None:
    assert {example.id for example in DOCSTRINGS} >= {"ArbModel", "ArbOptimizer", "nn", "adapters"}


@pytest.mark.parametrize("source", DOCSTRINGS)
def test_an_example_of_a_docstring_runs(source: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it takes for granted: a model, batches, a module of others, and what the module of the docstring offers."""
    if "transformers" in source and importlib.util.find_spec("transformers") is None:
        skip("an example", "it needs transformers, which is not installed")
    monkeypatch.chdir(demo)
    arbitor.ArbModel.from_pretrained("runs/demo").save_pretrained("my-model")
    ids = torch.tensor([list(nano.TEXT[:24])])
    x = torch.randn(4, 24)
    given: dict[str, Any] = {
        **{name: getattr(arbitor, name) for name in ("ArbModel", "ArbOptimizer")},
        **{
            name: getattr(module, name)
            for module in (arbitor.nn, arbitor.adapters)
            for name in module.__all__
        },
        "torch": torch,
        "model": arbitor.ArbModel(nano.NANO, device="cpu"),
        "batches": [ids, ids],
        "ids": ids,
        "net": torch.nn.Sequential(arbitor.nn.Linear(24, 12), torch.nn.Linear(12, 2)),
        "x": x,
        "loss_of": lambda y: y.square().mean(),
        "step": 0,
    }
    exec(compile(source, "docstring", "exec"), given)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nano.json").write_text(nano.NANO.to_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [str(script), "20", *(["--preset", "nano.json"] if "preset" in script.read_text() else [])],
    )
    with torch.random.fork_rng():
        left = runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    # Each ends with what it had at first and at last.
    first, last = (left[name] for name in (("first", "last") if "first" in left else ("begun", "ended")))
    assert last < first - 0.2, said
    assert f"{first:.3f} -> {last:.3f} bits a byte" in said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize(
    ("steps", "says"),
    [("0", "steps is 0, but must be at least 1"), ("-3", "-3"), ("many", "'many'"), ("1.5", "'1.5'")],
)
def test_a_script_refuses_steps_that_cannot_be(
    script: Path, steps: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), steps])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["torch", "arbitor"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_what_is_not_installed(
    script: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a Python in which nothing is installed. A string is printed as it is, and the exit code is 1."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == (
        f"the package {missing!r} is not installed: run `make install`, and then `source .venv/bin/activate`"
    )
