"""Parameters of the commands: options made from the table of settings, paths, and the refusal of what nothing reads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from arbitor.optimized.training.options import ROWS, default_in_words
from arbitor.optimized.training.setting import AUTO
from arbitor.optimized.training.shown import shown

MIB = 2**20
"""Bytes of a mebibyte, the seeds' unit of state."""


class FilePath(click.Path):
    """A path that names something: an empty one would be the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or refuse an empty one."""
        if value == "":
            self.fail("'' is empty, but must name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:
    # Before click 8.2 it had no type of its words.
    _Choice = click.Choice


class Word(_Choice):
    """One of some words. Where another is given, a message names the one that may be meant."""

    HABITS: Mapping[str, str] = {"gpu": "cuda", "fp32": "float32", "float": "float32", "bf16": "bfloat16"}
    """What other programs call a word here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word, or refuse what is none of them."""
        meant = self.HABITS.get(str(value).lower())
        if value not in self.choices and meant in self.choices:
            self.fail(
                f"{value!r} is not one of {', '.join(map(repr, self.choices))}: did you mean {meant!r}?",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class WholeNumber(click.IntRange):
    """A whole number from a range. What is no number is refused in words."""

    name = "whole number"


class WholeNumberOrAuto(WholeNumber):
    """A whole number from a range, or a word for one that the machine decides."""

    name = "whole number or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the word."""
        return value if value == AUTO else super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number from a range. What is no number, or is no finite one, is refused in words."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; refuse NaN, which is in every range of click, and infinity."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


_Command = TypeVar("_Command", bound=Callable[..., Any])


def setting(
    name: str,
    *,
    help: str | None = None,
    default: Any = None,
    default_help: str | None = None,
    low: int | None = None,
    auto: bool = False,
) -> Callable[[_Command], _Command]:
    """Return the option of a setting, as the table of settings has it.

    Args:
        name: of the setting, which is also the name of the command's parameter.
        help: what the command does with it, where that is not what the trainer does.
        default: of the command, where it has one of its own.
        default_help: what help says of it.
        low: the least number that the command allows, where it has one of its own.
        auto: whether the command lets the machine decide, where the setting allows it.
    """
    row = ROWS[name]
    option = row.option
    flag = "--" + name.replace("_", "-")
    if default_help is None:
        default_help = default_in_words(name) if default is None else str(default)
    if default_help == "False":
        default_help = "off"
    or_auto = f"; {AUTO}: what memory holds" if auto and option.auto else ""
    text = f"{help or option.help}{or_auto} [{default_help}]."
    if row.kind is bool:
        spelling = f"{flag}/--no-{flag.removeprefix('--')}" if option.has_opposite else flag
        return click.option(spelling, *option.also, name, is_flag=True, default=None, help=text)
    kind: click.ParamType | type = row.kind
    if option.choices:
        kind = Word(option.choices)
    elif row.kind is float:
        kind = Number(option.low if low is None else low, option.high)
    elif row.kind is int:
        number = WholeNumberOrAuto if auto and option.auto else WholeNumber
        kind = number(option.low if low is None else low, option.high)
    return click.option(flag, *option.also, name, type=kind, default=default, help=text)


def settings(*names: str) -> Callable[[_Command], _Command]:
    """Give a command the options of several settings."""

    def give(command: _Command) -> _Command:
        for name in reversed(names):
            command = setting(name, auto=True)(command)
        return command

    return give


def warn(sentence: str) -> None:
    """Print one sentence on stderr, where it mixes with no result."""
    with contextlib.suppress(OSError):
        click.echo(f"arb: {shown(sentence)}.", err=True)


def refuse_given(command: click.Context, *names: str, where: str) -> None:
    """Refuse options that the user gave although nothing reads them; at its default an option is never refused."""
    for option in command.command.params:
        source = command.get_parameter_source(str(option.name))
        if option.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} was given, but does nothing {where}")
