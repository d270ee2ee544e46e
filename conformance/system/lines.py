"""Types command lines at random, and looks for one that ends in anything but a result or a sentence.

    python -m conformance.system.lines --lines 2000 --seed 1 --jobs 2

A line begins as one that works on a small run. Then options and arguments of its command are added, each with a value at random:
one that is allowed, one out of range, another type, a name that a terminal would obey. Mostly an option takes the place of the one
that works, so that lines that work become lines that do not. A line must end within seconds, with status 0, 1 or 2. It says one
sentence on stderr unless it ends with 0. It never prints an escape byte, and never writes outside of its folder.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import click

from arbitor.optimized.cli import cli
from conformance.system.campaigns import ended, live, main
from conformance.system.command import last_counts
from conformance.training import nano

WORKS = {
    "train": "--preset nano --data text.txt --steps 2 --device cpu --run new",
    "finetune": "--base whole --data text.txt --steps 2 --device cpu --run new",
    "generate": "--run whole --bytes 3 --device cpu --prompt de",
    "eval": "--run whole --data text.txt --device cpu",
    "info": "whole",
    "report": "whole --picture new.png",
    "export": "whole new",
    "preset": "nano",
    "audit": "--preset nano",
    "smoke": "--preset nano --device cpu",
}
"""A line of each command that works. Commands without one are no part of the fuzzer."""

NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "3",
    "4",
    "16",
    "10000000000000",
    "1e3",
    "nan",
    "inf",
    "0.5",
    "-0",
    "0x10",
    "٣",
    "",
)
"""Numbers, and what is none. No number in between would be slow."""

TEXTS = (
    "whole",
    "new",
    "missing",
    "text.txt",
    "nano",
    "mine.json",
    ".",
    "..",
    "/dev/null",
    "",
    "-",
    "--",
    "$HOME",
    "[/bold]",
    "a=b",
)
"""Names that are there, that are not, and that something may take for more than a name."""

HOSTILE = ("\x1b[31mred", "\udcff\udcfe", "line\nbreak", "x" * 5000, "\u202e", "{}", "%s%n")
"""What no terminal may get raw."""


def value_of(kind: click.ParamType, draw: random.Random) -> str:
    """Return a value for an option: mostly one of its kind."""
    if draw.randrange(8) == 0:
        return draw.choice(HOSTILE + NUMBERS + TEXTS)
    if isinstance(kind, click.Choice):
        return draw.choice([*map(str, kind.choices), "CPU", ""])
    numeric = isinstance(kind, (click.types.IntParamType, click.types.FloatParamType))
    return draw.choice(NUMBERS if numeric else TEXTS)


def line_of(draw: random.Random) -> list[str]:
    """Return the words of a line."""
    name = draw.choice(sorted(WORKS))
    words = [name, *WORKS[name].split()]
    for _ in range(draw.choice((0, 1, 1, 2, 3, 6))):
        if draw.randrange(12) == 0:
            words.insert(draw.randrange(len(words) + 1), draw.choice(HOSTILE + TEXTS))
            continue
        options = [each for each in cli.commands[name].params if isinstance(each, click.Option)]
        option = draw.choice(options)
        # Without these a run would take minutes, and read the library of Python.
        if option.name in ("preset", "steps") and draw.randrange(4):
            continue
        words.append(draw.choice([*option.opts, *option.secondary_opts]))
        if not option.is_flag:
            words.append(value_of(option.type, draw))
    words = [word.replace("\0", "") for word in words]
    # What is given twice is refused, which is tried too.
    return last_counts(*words) if words[0] == name and draw.randrange(8) else words


def check(words: list[str], folder: Path, output: Path) -> str:
    """Run a line in a folder, and return how it ended.

    Raises:
        AssertionError: it ended otherwise than a line may end.
    """

    def prepare() -> None:
        os.chdir(folder)
        # What asks for standard input gets none.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    outside = listing(folder.parent, but=folder)
    status = ended(live(words, output, prepare, errors=output.with_suffix(".err")), "it")
    assert os.WIFEXITED(status), f"it ended by signal {os.WTERMSIG(status)}"
    code, said = os.WEXITSTATUS(status), output.with_suffix(".err").read_bytes()
    assert code in (0, 1, 2), f"it ended with {code}: {said!r}"
    assert b"\x1b" not in said, f"stderr has an escape byte: {said!r}"
    # What `generate` prints is the model's bytes, whatever they are.
    if "generate" not in words:
        printed = output.read_bytes()
        assert b"\x1b" not in printed, f"stdout has an escape byte: {printed!r}"
    lines = said.decode().splitlines()
    assert b"Traceback" not in said and "arb --traceback shows" not in said.decode(), f"unforeseen: {said!r}"
    assert all(line.startswith("arb: ") for line in lines), f"stderr has more than sentences: {said!r}"
    assert code == 0 or lines, f"it ended with {code}, and said nothing"
    assert listing(folder.parent, but=folder) == outside, "it wrote outside of its folder"
    return f"{words[0] if words[0] in WORKS else 'none'} {code}"


def listing(folder: Path, but: Path) -> set[str]:
    """Return the names in a folder but one, and those that belong to the outputs of lines."""
    return {path.name for path in folder.iterdir() if path != but and path.suffix not in (".out", ".err")}


def part(scratch: Path, seed: int, first: int, count: int) -> Counter[str]:
    """Check some lines, and count how often each command ended with each status.

    Raises:
        AssertionError: a line ended otherwise than a line may end; the message has the line.
    """
    ends: Counter[str] = Counter()
    for number in range(first, first + count):
        words = line_of(random.Random(f"{seed} {number}"))
        # A folder of its own each, in one of its own: what it writes beside is seen.
        yard = scratch / f"yard-{number}"
        folder = yard / "here"
        shutil.copytree(scratch / "whole", folder / "whole")
        (folder / "text.txt").write_bytes(nano.TEXT)
        (folder / "mine.json").write_text(nano.NANO.to_json())
        try:
            ends[check(words, folder, yard / "line.out")] += 1
        except AssertionError as error:
            raise AssertionError(f"line {number} of seed {seed}, arb {words!r}: {error}") from error
        shutil.rmtree(yard)
    return ends


if __name__ == "__main__":
    main(part, "lines", default=200)
