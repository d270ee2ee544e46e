"""``arb export``."""

from __future__ import annotations

from pathlib import Path

import click

from arbitor.optimized.commands.parameters import FilePath, warn
from arbitor.optimized.training.shown import shown


@click.command()
@click.argument("run", type=FilePath(path_type=Path))
@click.argument("folder", type=FilePath(path_type=Path))
def export(run: Path, folder: Path) -> None:
    """Write the best model of RUN into FOLDER: config.json and model.safetensors.

    `ArbModel.from_pretrained` reads the folder, and so does every command that takes --run. It holds the canonical form of every
    weight and what votes have gathered, so that training can go on from it.
    """
    from arbitor.optimized.training.errors import TrainingError
    from arbitor.optimized.training.model_folder import read_model, trained_context, write_folder

    try:
        config, checkpoint = read_model(run, warn)
    except FileNotFoundError as error:
        raise TrainingError(str(error)) from error
    context = trained_context(checkpoint)
    known = {} if context is None else {"context": context}
    write_folder(folder, config, checkpoint.state, step=checkpoint.step, seed=checkpoint.seed, run=known)
    click.echo(f"{shown(config.name)} after {checkpoint.step:,} steps: {shown(str(folder))}")
