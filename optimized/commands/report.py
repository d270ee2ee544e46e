"""``arb report``."""

from __future__ import annotations

from pathlib import Path

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import FilePath, warn
from arbitor.optimized.training.shown import shown

MOST_RUNS = 64
"""Runs that a picture compares at most."""


@click.command(cls=Command)
@click.argument("runs", type=FilePath(path_type=Path), nargs=-1)
@click.option(
    "--run",
    "named_runs",
    type=FilePath(path_type=Path),
    multiple=True,
    help="One of RUNS by an option [none].",
)
@click.option(
    "--picture",
    type=FilePath(path_type=Path),
    help="PNG file to write [report.png in the folder of one run; of several: needed].",
)
def report(runs: tuple[Path, ...], named_runs: tuple[Path, ...], picture: Path | None) -> None:
    """Draw the page of a run, as far as it has come, or several in one picture. RUNS are their folders.

    The runs may be under way.
    """
    from arbitor.optimized.training.errors import TrainingError
    from arbitor.optimized.training.facts import read_facts
    from arbitor.optimized.training.report import compare_runs, draw_page
    from arbitor.optimized.training.run_folder import RunFolder

    runs = (*named_runs, *runs)
    if not runs:
        raise click.UsageError("--run is missing: the folder of a run", click.get_current_context())
    if picture is None and len(runs) > 1:
        raise click.UsageError("--picture is needed with several runs: the PNG file to write")
    if len(runs) > MOST_RUNS:
        raise click.UsageError(f"{len(runs)} runs were named, but a picture compares at most {MOST_RUNS}")
    if picture is not None and not picture.parent.is_dir():
        raise TrainingError(f"cannot write {str(picture)!r}: there is no folder {str(picture.parent)!r}")
    facts = {}
    for folder in map(RunFolder, dict.fromkeys(runs)):
        facts[folder], refusals = read_facts(folder)
        for refusal in refusals:
            warn(refusal)
        if not facts[folder].metrics:
            raise TrainingError(f"{str(folder)!r} has no metrics yet, so there is nothing to draw")
    folder, first = next(iter(facts.items()))
    target = folder.report if picture is None else picture
    try:
        if len(facts) > 1:
            compare_runs(target, {str(each): facts[each].metrics for each in facts})
        else:
            draw_page(target, first)
    except TrainingError:
        raise
    # Lines that no run of ours wrote can hold anything.
    except Exception as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise TrainingError(f"the metrics cannot be drawn: {reason}") from error
    for each, of_run in facts.items():
        best = "not measured" if of_run.best_bpb is None else f"{of_run.best_bpb:.4f}"
        click.echo(
            f"{shown(str(each))}: {of_run.step:,} of {of_run.run['steps']:,} steps, best {best} bits per byte"
        )
    click.echo(f"picture: {shown(str(target))}")
