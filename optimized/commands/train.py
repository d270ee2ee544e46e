"""``arb train``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import FilePath, settings
from arbitor.optimized.training.options import settings_of
from arbitor.optimized.training.shown import Unbreakable, printable, shown

if TYPE_CHECKING:
    from arbitor.optimized.training.run import TrainResult


_Command = TypeVar("_Command", bound=Callable[..., Any])


def run_options(command: _Command) -> _Command:
    """Give a command that trains the options that say where its run is."""
    for give in (
        click.option(
            "--no-save", is_flag=True, help="Write no checkpoints; without --run, write nothing [off]."
        ),
        click.option(
            "--reset",
            is_flag=True,
            help="Remove the run that --run holds, and begin anew there [off].",
        ),
        click.option(
            "--resume", is_flag=True, help="Go on with the run in --run, with its own settings [off]."
        ),
        click.option(
            "--run",
            "--out",
            "run",
            type=FilePath(path_type=Path),
            help="Run folder [runs/<preset>-<number>].",
        ),
    ):
        command = give(command)
    return command


@click.command(cls=Command)
@settings(*settings_of("train"))
@run_options
def train(**options: Any) -> None:
    """Train a model on bytes, and compare it with what counting alone achieves."""
    check_run(options)
    train_and_print(**options)


def check_run(options: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that is not named.

    Args:
        options: of a command with `run_options`.

    Raises:
        click.UsageError: it is not.
    """
    if options["resume"] and options["run"] is None:
        raise click.UsageError("--resume needs --run, the folder of the run to go on with")


def train_and_print(*, no_save: bool, **options: Any) -> None:
    """Train, and print what the run came to, once for all ranks.

    Args:
        no_save: whether no checkpoints are written.
        options: the other ones of `TrainOptions`.
    """
    from rich.console import Console

    from arbitor.optimized.training.loop import train as run_training
    from arbitor.optimized.training.options import TrainOptions

    console = Console(file=cast(Any, Unbreakable(sys.stdout)))
    result = run_training(TrainOptions(save=not no_save, **options), console=console)
    if result.is_of_first:
        _print_result(console, result)


def _print_result(console: Any, result: TrainResult) -> None:
    """Print how a run compares with what counting achieves, a sample, and where the run is."""
    from rich.table import Table
    from rich.text import Text

    from arbitor.optimized.training.plan import preset_in_words

    summary = result.summary
    table = Table("model")
    table.add_column("validation bits per byte", justify="right")
    for name, bpb in summary["baselines"].items():
        table.add_row(name, f"{bpb:.3f}")
    table.add_section()
    value = summary["val_bpb"]
    ours = Text(f"arb {shown(preset_in_words(summary))}")
    table.add_row(ours, "not finite" if value is None else f"{value:.3f}", style="bold")
    # Of a mix this is a mean over its kinds, and the counting models were judged on its text.
    for kind, numbers in summary.get("media", {}).items():
        of_kind = numbers["val_bpb"]
        table.add_row(f"on {kind}", "not finite" if of_kind is None else f"{of_kind:.3f}")
    console.print(table)
    console.print("prompt, from the validation bytes:", highlight=False)
    console.print(Text(printable(result.prompt), style="dim"))
    console.print("sample, which goes on from there:", highlight=False)
    console.print(Text(printable(result.sample)))
    # The state of a base does not change below adapters.
    digest = summary.get("adapter_sha256", summary["state_sha256"])
    what = "adapters" if "adapter_sha256" in summary else "state"
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {what} {digest[:16]}", highlight=False
    )
    if result.folder is not None:
        folder = shown(str(result.folder))
        console.print(f"run folder: {folder}", markup=False, highlight=False, soft_wrap=True)
