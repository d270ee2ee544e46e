"""``arb export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from arbitor.optimized.commands.parameters import FilePath, warn
from arbitor.optimized.training.shown import shown

if TYPE_CHECKING:
    from arbitor.optimized.training.checkpoint import Checkpoint
    from arbitor.reference.config import ArbConfig
    from arbitor.reference.graph.adapters import Merge


@click.command()
@click.argument("run", type=FilePath(path_type=Path))
@click.argument("folder", type=FilePath(path_type=Path))
@click.option(
    "--merge",
    type=click.Choice(("ternary", "float")),
    help="Put the adapters of arb finetune into the weights [the adapters alone, in peft's format].",
)
def export(run: Path, folder: Path, merge: str | None) -> None:
    """Write the best model of RUN into FOLDER: config.json and model.safetensors.

    `ArbModel.from_pretrained` reads the folder, and so does every command that takes --run. It holds the canonical form of every
    weight and what votes have gathered, so that training can go on from it.

    Of a run of arb finetune only the adapters are written, unless --merge says into what weights they go. A ternary merge says what
    it lost. A float merge writes a float32 matrix for each weight.
    """
    from arbitor.optimized.training.errors import TrainingError
    from arbitor.optimized.training.model_folder import read_model, trained_context, write_folder

    try:
        config, checkpoint = read_model(run, warn)
    except FileNotFoundError as error:
        raise TrainingError(str(error)) from error
    if checkpoint.adapter is not None:
        _export_adapted(folder, config, checkpoint, merge)
    elif merge is not None:
        raise ValueError(f"merge is {merge!r}, but must be left out, as {str(run)!r} has no adapters")
    else:
        context = trained_context(checkpoint)
        known = {} if context is None else {"context": context}
        write_folder(folder, config, checkpoint.state, step=checkpoint.step, seed=checkpoint.seed, run=known)
    click.echo(f"{shown(config.name)} after {checkpoint.step:,} steps: {shown(str(folder))}")


def _export_adapted(folder: Path, config: ArbConfig, checkpoint: Checkpoint, merge: str | None) -> None:
    """Write the adapters of a checkpoint, or its model with the adapters in the weights."""
    from arbitor.optimized.training.adapter_files import write_adapter, write_floats
    from arbitor.optimized.training.model_folder import load_into, trained_context, write_folder
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.graph.adapters import merge_ternary, merged_floats, stacks_of

    assert checkpoint.adapter is not None
    if merge is None:
        base, stacks = (
            str(checkpoint.run.get("init_from", config.name)),
            stacks_of(ArbModel(config, device="meta")),
        )
        write_adapter(folder, checkpoint.adapter, base=base, stacks=stacks)
        return
    model = ArbModel(config, seed=checkpoint.seed)
    load_into(model, checkpoint)
    if merge == "float":
        write_floats(folder, config, merged_floats(model), model.tables())
        return
    losses = merge_ternary(model)
    context = trained_context(checkpoint)
    known = {} if context is None else {"context": context}
    write_folder(folder, config, model.state(), step=checkpoint.step, seed=checkpoint.seed, run=known)
    _print_losses(losses)


def _print_losses(losses: dict[str, Merge]) -> None:
    """Print what the merge of each weight lost, and of all together."""
    click.echo(f"{'error':>8}  {'change':>8}  {'kept':>7}  weight")
    total = None
    for name, loss in losses.items():
        _print_loss(shown(name), loss)
        total = loss if total is None else total + loss
    if total is not None:
        _print_loss("all", total)


def _print_loss(name: str, loss: Merge) -> None:
    change = loss.change / loss.size if loss.size else 0.0
    click.echo(f"{loss.error:>8.4f}  {change:>8.4f}  {loss.kept:>7.1%}  {name}")
