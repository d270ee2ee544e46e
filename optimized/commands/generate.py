"""``arb generate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from arbitor.optimized.commands.parameters import FilePath, refuse_given, setting, settings
from arbitor.optimized.training.options import MOST_BYTES
from arbitor.optimized.training.shown import printable


@click.command()
@click.option("--run", type=FilePath(path_type=Path), required=True, help="Folder of a run.")
@click.option("--prompt", help="Text to continue [none].")
@click.option(
    "--prompt-file", type=FilePath(path_type=Path), help="A file with the bytes to continue [none]."
)
@click.option(
    "--bytes", "num_bytes", type=click.IntRange(0, MOST_BYTES), default=256, help="Bytes to add [256]."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    help="Of the draws; 0: the likeliest byte [0.8].",
)
@setting(
    "context", help="Bytes at the end of the prompt that are read, at most", default_help="as trained", low=3
)
@setting("seed", help="Of the draws", default=0)
@settings("device", "backend", "dtype")
@setting("cuda_graph", help="Record a step once, then replay it: the same bytes, sooner")
@click.pass_context
def generate(
    command: click.Context,
    run: Path,
    prompt: str | None,
    prompt_file: Path | None,
    num_bytes: int,
    temperature: float,
    context: int | None,
    seed: int,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    cuda_graph: bool | None,
) -> None:
    """Continue a prompt with the best model of a run. A pipe gets the bytes as they are."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError(
            f"--prompt-file {str(prompt_file)!r} was given with --prompt, but only one may be"
        )
    if num_bytes == 0:
        refuse_given(command, "temperature", "context", "seed", "cuda_graph", where="with --bytes 0")
    if temperature == 0:
        refuse_given(command, "seed", where="with --temperature 0, which takes the likeliest byte")
    if not prompt and prompt_file is None:
        refuse_given(command, "context", where="without --prompt or --prompt-file")
    import json

    from arbitor.optimized.training.checkpoint import check_fits
    from arbitor.optimized.training.generate import generate as continue_prompt
    from arbitor.optimized.training.recording import records
    from arbitor.optimized.training.run_folder import RunFolder
    from arbitor.optimized.training.runtime import choose_runtime, deterministic
    from arbitor.optimized.training.sizes import check_memory
    from arbitor.reference.config import ArbConfig
    from arbitor.reference.graph import ArbModel

    runtime = choose_runtime(device or "auto", backend, dtype)
    record = records(cuda_graph, runtime)
    given = os.fsencode(prompt or "") if prompt_file is None else _prompt_of(prompt_file)
    checkpoint = RunFolder(run).load_best(
        lambda refusal: click.echo(f"arb: {refusal}; trying another one", err=True)
    )
    config = ArbConfig.from_json(json.dumps(checkpoint.config))
    check_memory(config, runtime.device)
    with deterministic(checkpoint.run.get("threads")):
        model = ArbModel(config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=0)
        check_fits(checkpoint, checkpoint.config, model)
        model.load_state(checkpoint.state)
        added = continue_prompt(
            model,
            given,
            num_bytes,
            temperature=temperature,
            seed=seed,
            context=context or checkpoint.run["context"],
            cuda_graph=record,
        )
    if sys.stdout.isatty():
        click.echo(printable(given + added))
    else:
        sys.stdout.buffer.write(given + added)
        sys.stdout.buffer.flush()


def _prompt_of(path: Path) -> bytes:
    """The bytes of a prompt file."""
    from arbitor.optimized.training.errors import TrainingError

    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read the prompt {str(path)!r}: {error.strerror or error}") from error
