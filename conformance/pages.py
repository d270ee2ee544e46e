"""What the pages give to be typed: every line of their blocks, and every command that a sentence names.

`understood` checks one without running it. Each program has its own way: the parsers of `arb` and of the modules take the words,
pytest takes the options that it knows, and pip and make are held against the files that they read.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
import pytest
from torch.distributed.run import get_args_parser

from arbitor.optimized.cli import cli
from conformance.families import FAMILIES
from conformance.import_lint import ROOT

LOG = ROOT / "docs" / "log.md"
"""What it names was typed on its day. It is never edited, so commands in it may be of an earlier version."""

PAGES = sorted(
    {
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "reference" / "README.md",
        ROOT / "conformance" / "vectors" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    }
    - {LOG}
)

OF_OTHERS = {"git": "what a release does to the repository is no command of ours"}
"""Programs whose lines are not checked, each with the reason."""


class Shown(NamedTuple):
    """A command on a page.

    Attributes:
        page: its path in the repository.
        words: of the command, the program first.
        whole: whether it can be typed as it is. A sentence may name the beginning of a command, and stand-ins.
    """

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        """Return page and command, as an id of a test."""
        return f"{self.page}: {shlex.join(self.words)}"


def fences(page: Path) -> list[tuple[str, str]]:
    """Return language and text of each block between ``` of a page. A block without a language is of commands."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)


def shown() -> list[Shown]:
    """Return every command of the pages, once each."""
    found: dict[Shown, None] = {}
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        lines = [line for language, block in fences(page) if not language for line in block.splitlines()]
        lines += re.findall(rf"^ {{4}}((?:{'|'.join(UNDERSTOOD)}) .*)$", text, re.M)
        for line in filter(None, lines):
            found[Shown(name, typed(line), True)] = None
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for span in re.findall(r"`([^`]+)`", prose):
            if re.match(rf"(?:{'|'.join(UNDERSTOOD)}) ", span):
                found[Shown(name, typed(span), False)] = None
    return list(found)


def typed(line: str) -> tuple[str, ...]:
    """Return the words of a line, without a remark after two blanks and a #, and without where its output goes."""
    words = shlex.split(re.split(r" # | {2,}#", line)[0])
    return tuple(words[: words.index(">")] if ">" in words else words)


def understood(command: Shown, *, of_pytest: pytest.Parser) -> None:
    """Check a command without running it.

    Args:
        command: from a page.
        of_pytest: the options of pytest and of the suite that this test is part of.

    Raises:
        AssertionError: a program, module, command, option, file or extra is not there.
        click.UsageError, SystemExit, pytest.UsageError: the command's own parser refuses it.
    """
    program, *words = command.words
    assert program in UNDERSTOOD, (
        f"{command}: no program is called {program}, and only commands stand in a block without language"
    )
    if program == "python" and words[:2] == ["-m", "pytest"]:
        program, *words = words[1:]
    if program == "pytest":
        _pytest(words, command.whole, of_pytest)
    else:
        UNDERSTOOD[program](words, command.whole)


def _options_are_known(words: list[str], known: set[str]) -> None:
    """Check the options of a command that a sentence names. `--[no-]x` is both of its options."""
    for word in words:
        for each in (word.replace("[no-]", ""), word.replace("[", "").replace("]", "")):
            assert not re.match("--?[a-z]", each) or each.partition("=")[0] in known, (
                f"there is no option {each}"
            )


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", parser.format_help()))


def _arb(words: list[str], whole: bool) -> None:
    name, *arguments = words
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    _click(command, arguments, whole)


def _click(command: click.Command, arguments: list[str], whole: bool) -> None:
    if whole:
        MAKE_CONTEXT(command, command.name, list(arguments))
    else:
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        _options_are_known(arguments, options | {"--help"})


MAKE_CONTEXT = click.Command.make_context


def _torchrun(words: list[str], whole: bool) -> None:
    parser = get_args_parser()
    if not whole and "-m" not in words:
        _options_are_known(words, _options_of(parser))
        return
    found = parser.parse_args(words)
    module, arguments = found.training_script, found.training_script_args
    assert found.module and _path_of(module) is not None, f"there is no module {module} for ranks"
    package, _, command = module.partition(".")
    if package == "arbitor":
        _arb([command, *arguments], whole)
    else:
        _python(["-m", module, *arguments], whole)


class _Parsed(BaseException):
    """Ends a module once its parser has taken the words. Its own handlers of errors let this pass."""


def _path_of(module: str) -> str | None:
    """Return the file that `python -m` runs, or None where there is none."""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations:
            found = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        return None
    return None if found is None else found.origin


def _python(words: list[str], whole: bool) -> None:
    kind, what, *arguments = words
    if kind == "-c":
        exec(compile(what, "a page", "exec"), {})
        return
    path = _path_of(what) if kind == "-m" else None
    assert path is not None, f"there is no module {what}"
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        if whole:
            parse(parser, args, namespace)
        else:
            _options_are_known(arguments, _options_of(parser))
        raise _Parsed

    def make_context(command: click.Command, name: str | None, args: list[str], **extra: Any) -> NoReturn:
        (_arb if command is cli else functools.partial(_click, command))(args, whole)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(click.Command, "make_context", make_context)
        patch.setattr(sys, "argv", [what, *arguments])
        try:
            runpy.run_path(path, run_name="__main__")
        except _Parsed:
            return
    raise AssertionError(f"{what} parsed no arguments")


def _pytest(words: list[str], whole: bool, parser: pytest.Parser) -> None:
    found = parser.parse([word for word in words if not word.endswith("<name>")])
    for path in getattr(found, "file_or_dir", []):
        assert getattr(found, "pyargs", False) or (ROOT / path).exists(), f"there is no {path}"
    for family in getattr(found, "family", []):
        assert family in FAMILIES, f"there is no family {family}"


def _pip(words: list[str], whole: bool) -> None:
    from packaging.requirements import Requirement

    assert words[0] == "install"
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rest = iter(words[1:])
    for word in rest:
        if word == "--constraint":
            assert (ROOT / next(rest)).exists()
            continue
        if word == "--editable":
            word = "arbitor" + next(rest).removeprefix(".")
        asked = Requirement(word)
        if asked.name == "arbitor":
            assert asked.extras <= extras.keys(), f"{word}: there is no such extra"
        elif asked.specifier:
            assert asked.specifier.contains(pinned[asked.name]), f"{word} is not what constraints.txt pins"


def _make(words: list[str], whole: bool) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    variables = {"PYTHON", *re.findall(r"^([A-Z]+) \?=", makefile, re.M)}
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets), f"make knows no {name}"


def _ci(name: str) -> Callable[[list[str], bool], None]:
    def there(words: list[str], whole: bool) -> None:
        assert (ROOT / name).stat().st_mode & 0o100, f"{name} cannot be run"

    return there


UNDERSTOOD: dict[str, Callable[..., None]] = {
    "arb": _arb,
    "torchrun": _torchrun,
    "python": _python,
    "pytest": _pytest,
    "pip": _pip,
    "make": _make,
    **{f".ci/{path.name}": _ci(f".ci/{path.name}") for path in sorted((ROOT / ".ci").iterdir())},
    **{name: lambda words, whole: None for name in OF_OTHERS},
}
"""What checks the words behind each program."""


def is_of_bench(command: Shown) -> bool:
    """Return whether a command belongs to the benchmarks, whose options and modules their own tests know."""
    return command.words[:2] == ("pytest", "bench") or any(
        word.startswith("bench.") for word in command.words[:3]
    )


def helped() -> Iterator[Shown]:
    """Yield the examples that `make` alone prints."""
    for line in re.findall(r'^\t@echo "  (make .*)"$', (ROOT / "Makefile").read_text(), re.M):
        words = shlex.split(re.split(r" {3,}", line.replace('\\"', '"'))[0])
        yield Shown("Makefile", tuple(words), True)
