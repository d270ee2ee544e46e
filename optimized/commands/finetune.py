"""``arb finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import FilePath, setting
from arbitor.optimized.commands.train import check_run, run_options, train_and_print
from arbitor.optimized.training.options import FINETUNE_DEFAULTS, settings_of


def _settings(command: Any) -> Any:
    for name in reversed(settings_of("finetune")):
        default_help = str(FINETUNE_DEFAULTS[name]) if name in FINETUNE_DEFAULTS else None
        command = setting(name, default_help=default_help)(command)
    return command


@click.command(cls=Command)
@click.option(
    "--base",
    "init_from",
    type=FilePath(path_type=Path),
    help="A run, a folder of arb export, or a checkpoint, whose weights stay as they are [none: needed without --resume].",
)
@_settings
@run_options
def finetune(init_from: Path | None, **options: Any) -> None:
    """Train float adapters (LoRA) by AdamW over the frozen weights of a model. Its ternary weights keep every byte.

    The run folder has an adapter folder in peft's format, of the best model. arb export --merge puts the adapters into the weights.
    """
    check_run(options)
    if not options["resume"] and init_from is None:
        raise click.UsageError("--base is needed, the model whose weights stay as they are")
    train_and_print(finetune=True, init_from=None if init_from is None else str(init_from), **options)
