"""``arb smoke``."""

from __future__ import annotations

from typing import Any

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import MIB, setting, settings
from arbitor.optimized.training.options import CHANGES
from arbitor.optimized.training.shown import shown


@click.command(cls=Command)
@setting("preset", help="What to run: tiny, small, ... or FILE.json", default="tiny")
@settings(*CHANGES)
@setting("context", default=4)
@setting("batch", help="Windows", default=1)
@click.option("--backward", is_flag=True, help="Also run a backward pass and one update [off].")
@setting("seed", help="Of weights, bytes and dither", default=0)
@settings("device", "backend", "dtype")
def smoke(
    preset: str,
    context: int,
    batch: int,
    backward: bool,
    seed: int,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    **changes: Any,
) -> None:
    """Run a preset twice, and report time and memory. Warms the kernel cache for a real run."""
    from arbitor.optimized.training.plan import model_config
    from arbitor.optimized.training.runtime import choose_runtime
    from arbitor.optimized.training.smoke import smoke as run_twice

    runtime = choose_runtime(device or "auto", backend, dtype)
    config = model_config(preset, **changes)
    report = run_twice(config, runtime, context=context, batch=batch, backward=backward, seed=seed)
    click.echo(f"preset {shown(preset)}, {runtime.backend} on {runtime.device}, ctx {context}, batch {batch}")
    click.echo(f"logical ternary weights: {report.weights:,}")
    click.echo(f"training state: {report.state_bytes / MIB:.2f} MiB")
    click.echo(f"loss: {report.bpb:.3f} bits per byte")
    click.echo(f"build: {report.build_seconds:.3f} s")
    if report.compiled is not None:
        click.echo(report.compiled)
    for name, times in (("cold", report.cold), ("warm", report.warm)):
        click.echo(f"forward, {name}: {times.forward:.3f} s")
        if times.update is not None:
            click.echo(f"backward/update, {name}: {times.update:.3f} s")
    if report.peak_bytes is not None:
        click.echo(f"CUDA peak: {report.peak_bytes / MIB:.2f} MiB")
