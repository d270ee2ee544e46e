"""``arb export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import FilePath, warn
from arbitor.optimized.training.shown import shown

if TYPE_CHECKING:
    from arbitor.optimized.training.checkpoint import Checkpoint, State
    from arbitor.reference.config import ArbConfig
    from arbitor.reference.graph.adapters import Merge

NOTHING, MOST = 0.0005, 0.5
"""Share of a change that a table shows as 0.0%, and that below which a ternary merge says what else there is to do."""


@click.command(cls=Command)
@click.argument("run", type=FilePath(path_type=Path), required=False)
@click.argument("folder", type=FilePath(path_type=Path), required=False)
@click.option("--run", "named_run", type=FilePath(path_type=Path), help="RUN by an option [the first word].")
@click.option(
    "--merge",
    type=click.Choice(("ternary", "float")),
    help="Put the adapters of arb finetune into the weights [the adapters alone, in peft's format].",
)
def export(run: Path | None, folder: Path | None, named_run: Path | None, merge: str | None) -> None:
    """Write the best model of RUN into FOLDER, which must be new or empty: config.json and model.safetensors.

    `ArbModel.from_pretrained` reads the folder, and so does every command that takes a run. It holds the canonical form of every
    weight and what votes have gathered, so that training can go on from it.

    Of a run of arb finetune only the adapters are written, unless --merge says into what weights they go. A ternary merge says what
    it lost. A float merge writes a float32 matrix for each weight, for `arbitor.adapters.float_model`: no command reads it.
    """
    if named_run is not None:
        if folder is not None:
            raise click.UsageError(f"Got unexpected extra argument ({folder})", click.get_current_context())
        run, folder = named_run, run
    if run is None or folder is None:
        raise click.UsageError(
            "RUN and FOLDER are needed, what to export and where to", click.get_current_context()
        )
    _export(run, folder, merge)


def _export(run: Path, folder: Path, merge: str | None) -> None:
    from arbitor.optimized.training.adapter_files import check_new
    from arbitor.optimized.training.model_folder import read_model

    check_new(folder)
    config, checkpoint = read_model(run, warn)
    if checkpoint.adapter is not None:
        _export_adapted(folder, config, checkpoint, merge)
    elif merge is not None:
        raise ValueError(f"merge is {merge!r}, but must be left out, as {str(run)!r} has no adapters")
    else:
        _write_model(folder, config, checkpoint, checkpoint.state)
    what = "the adapters of " if checkpoint.adapter is not None and merge is None else ""
    click.echo(f"wrote {what}{shown(config.name)} after {checkpoint.step:,} steps to {shown(str(folder))}")


def _write_model(folder: Path, config: ArbConfig, checkpoint: Checkpoint, state: State) -> None:
    """Write a state that a checkpoint came to. Of its run only the context is said."""
    from arbitor.optimized.training.model_folder import trained_context, write_folder

    context = trained_context(checkpoint)
    known = {} if context is None else {"context": context}
    write_folder(folder, config, state, step=checkpoint.step, seed=checkpoint.seed, run=known)


def _export_adapted(folder: Path, config: ArbConfig, checkpoint: Checkpoint, merge: str | None) -> None:
    """Write the adapters of a checkpoint, or its model with the adapters in the weights."""
    from arbitor.optimized.training.adapter_files import write_adapter, write_floats
    from arbitor.optimized.training.model_folder import load_into
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.graph.adapters import merge_ternary, merged_floats, stacks_of

    assert checkpoint.adapter is not None
    if merge is None:
        base = str(checkpoint.run.get("init_from", config.name))
        stacks = stacks_of(ArbModel(config, device="meta"))
        write_adapter(folder, checkpoint.adapter, base=base, stacks=stacks)
        return
    model = ArbModel(config, seed=checkpoint.seed)
    load_into(model, checkpoint)
    if merge == "float":
        write_floats(folder, config, merged_floats(model), model.tables())
        return
    losses = merge_ternary(model)
    _write_model(folder, config, checkpoint, model.state())
    print_losses(losses)


def print_losses(losses: dict[str, Merge]) -> None:
    """Print what the merge lost: of each weight that kept some of its change, and of all together."""
    click.echo(f"{'error':>8}  {'change':>8}  {'kept':>7}  weight")
    total, lost, still = None, 0, 0
    for name, loss in losses.items():
        total = loss if total is None else total + loss
        if not loss.change:
            still += 1
        elif abs(loss.kept) < NOTHING:
            lost += 1
        else:
            _print_loss(shown(name), loss)
    if total is None:
        return
    _print_loss("all", total)
    if lost:
        click.echo(f"{lost:,} of {len(losses):,} weights keep nothing of their change, and are not listed.")
    if still:
        click.echo(f"{still:,} of {len(losses):,} weights have no change, and are not listed.")
    if total.kept < MOST:
        click.echo(
            f"{_share(total.kept)} of the change is kept: most of it is smaller than a step of a ternary weight. "
            "arb train --init-from trains the weights themselves."
        )


def _print_loss(name: str, loss: Merge) -> None:
    change = loss.change / loss.size if loss.size else 0.0
    click.echo(f"{loss.error:>8.4f}  {change:>8.4f}  {_share(loss.kept):>7}  {name}")


def _share(share: float) -> str:
    """Return a share in words. A small negative one is no -0.0%."""
    return f"{round(100 * share, 1) + 0.0:.1f}%"
