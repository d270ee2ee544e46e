"""The examples of README and of the pages for users run as they stand there, and their commands are understood."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch.distributed.run import get_args_parser

from arbitor.optimized.cli import cli
from arbitor.optimized.training.loop import train
from conformance.import_lint import ROOT
from conformance.report import skip
from conformance.training import nano
from conformance.training.runs import options

PAGES = (
    "README.md",
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


SCRIPTS = sorted((ROOT / "docs" / "scripts").glob("*.py"))
"""Scripts that a reader runs from end to end; here they take few steps, and a small model."""


# A command stands at the start of a line. What follows two blanks and a # is a remark. Under torchrun it is a module.
COMMANDS = [
    pytest.param(command.partition("  #")[0].split("   #")[0], id=f"{page.name}-{place}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for place, command in enumerate(
        re.findall(
            r"^arb +\w.*$", re.sub(r"^torchrun .* -m arbitor\.", "arb ", page.read_text(), flags=re.M), re.M
        )
    )
]


def test_every_page_has_examples() -> None:
    pages = {str(example.id).rpartition("-")[0] for example in EXAMPLES}
    assert pages == set(PAGES)
    assert len(COMMANDS) > 5


def test_the_site_shows_every_page() -> None:
    """A page that stands in no part of the site's navigation would fail its build, which only `make docs` runs."""
    shown = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert shown == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    """The parser takes every command of the pages; nothing is run."""
    _, name, *arguments = shlex.split(command)
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, f"there is no command {name}"
    found.make_context(name, arguments)


TORCHRUN = sorted(
    {
        line.strip()
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for line in re.findall(r"^ *torchrun .*$", page.read_text(), re.M)
    }
)


@pytest.mark.parametrize("line", TORCHRUN)
def test_a_line_of_torchrun_is_understood(line: str) -> None:
    """Torchrun takes its part of every such line of the pages, and the parser of `arb train` the rest."""
    found = get_args_parser().parse_args(shlex.split(line)[1:])
    assert found.module and found.training_script == "arbitor.train"
    command = cli.get_command(click.Context(cli), "train")
    assert command is not None
    command.make_context("train", found.training_script_args)


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_runs(source: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in source and importlib.util.find_spec("transformers") is None:
        skip("an example", "it needs transformers, which is not installed")
    monkeypatch.chdir(demo)
    left: dict[str, Any] = {}
    exec(compile(source, "example", "exec"), left)
    if "losses" in left:
        assert left["losses"][-1] < left["losses"][0] - 1
    if "lost" in left:
        assert left["lost"].keys() and all(0 < loss.error < 0.6 for loss in left["lost"].values())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nano.json").write_text(nano.NANO.to_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "20", "nano.json"])
    with torch.random.fork_rng():
        left = runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    # Each ends with what it had at first and at last.
    first, last = (left[name] for name in (("first", "last") if "first" in left else ("begun", "ended")))
    assert last < first - 0.2, said
    assert f"{first:.3f} -> {last:.3f} bits a byte" in said
