"""``arb eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from arbitor.optimized.commands.command import Command, of_run
from arbitor.optimized.commands.parameters import FilePath, setting, settings, warn
from arbitor.optimized.training.shown import shown

PAUSE = 5.0
"""Seconds between two sentences that say how far a measurement is."""


@click.command("eval", cls=Command)
@of_run
@click.option(
    "--data",
    "sources",
    type=FilePath(),
    multiple=True,
    required=True,
    help="A file, a folder or stdlib; may be given several times.",
)
@setting("context", default_help="as trained")
@setting("batch", help="Windows at a time", default=32)
@settings("device", "backend", "dtype")
@click.option("--json", "as_json", is_flag=True, help="Print JSON [off].")
def evaluate(
    run: Path,
    sources: tuple[str, ...],
    context: int | None,
    batch: int,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Measure the best model of RUN on other bytes: bits per byte, file by file and in all.

    Every byte of a file is predicted once, but for its first three. Standard error says how far it is.
    """
    from arbitor.optimized.training.errors import TrainingError
    from arbitor.optimized.training.evaluate import Measured, file_bpb
    from arbitor.optimized.training.model_folder import open_model, trained_context
    from arbitor.optimized.training.options import preset_defaults
    from arbitor.optimized.training.runtime import choose_runtime
    from arbitor.optimized.training.texts import find_texts
    from arbitor.reference.config import NGRAM

    runtime = choose_runtime(device or "auto", backend, dtype)
    found = [(source, *find_texts(source)) for source in sources]
    total, rows = Measured(), []
    with open_model(run, runtime, warn) as (model, checkpoint):
        config = model.config
        length = context or trained_context(checkpoint) or preset_defaults(config.name)["context"]
        head = {
            "model": shown(config.name),
            "steps": checkpoint.step,
            "state_sha256": checkpoint.state_sha256,
            "context": length,
            "device": runtime.device,
            "backend": runtime.backend,
        }
        adapters = "" if checkpoint.adapter is None else f", {len(checkpoint.adapter.matrices):,} adapters"
        if checkpoint.adapter is not None:
            head["adapters"] = len(checkpoint.adapter.matrices)
        if not as_json:
            click.echo(f"model: {head['model']} after {checkpoint.step:,} steps{adapters}, {shown(str(run))}")
            click.echo(f"windows: {length:,} bytes; device: {runtime.device}, {runtime.backend}")
            click.echo(_line("bits per byte", "bytes", "file"))
        progress = Progress([text.num_bytes() for _, texts, _ in found for text in texts])
        for source, texts, left_out in found:
            for reason, paths in left_out.items():
                warn(f"left out of {source!r}: {len(paths):,} {reason}")
            for text in texts:
                name = text.name if len(found) == 1 or text.name == source else f"{source}/{text.name}"
                with text.opened() as file:
                    measured = file_bpb(
                        model,
                        file,
                        batch=batch,
                        context=length,
                        device=runtime.device,
                        note=partial(progress.note, total.predicted, name),
                    )
                total += measured
                rows.append(_row(name, measured))
                if not as_json:
                    click.echo(_line(_in_words(measured), f"{measured.predicted:,}", shown(name)))
    if not total.predicted:
        named = ", ".join(repr(source) for source in sources)
        raise TrainingError(
            f"nothing was measured: no file of {named} has the {NGRAM + 1} bytes that are needed"
        )
    if as_json:
        click.echo(json.dumps({**head, "files": rows, "total": _row("total", total)}, indent=2))
    elif len(rows) > 1:
        click.echo(_line(_in_words(total), f"{total.predicted:,}", "total"))


class Progress:
    """Says on standard error what is measured, and every few seconds how far it is."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Say how much there is to measure.

        Args:
            sizes: bytes of each file.
        """
        from arbitor.reference.config import NGRAM

        counts = [size - NGRAM for size in sizes if size > NGRAM]
        self._whole = sum(counts)
        self._began = self._said = time.monotonic()
        if counts:
            files = "1 file" if len(counts) == 1 else f"{len(counts):,} files"
            warn(f"measuring {self._whole:,} bytes of {files}")

    def note(self, before: int, name: str, predicted: int) -> None:
        """Note that a batch was measured.

        Args:
            before: bytes that were predicted of files before this one.
            name: of the file.
            predicted: bytes that were predicted of it.
        """
        now, done = time.monotonic(), before + predicted
        if now - self._said < PAUSE or done >= self._whole:
            return
        self._said = now
        speed = done / (now - self._began)
        left = int((self._whole - done) / speed)
        warn(
            f"{done:,} of {self._whole:,} bytes, {speed:,.0f} a second, {left // 60}:{left % 60:02d} left, now in {name}"
        )


def _row(name: str, measured: Any) -> dict[str, Any]:
    return {"name": shown(name), "bpb": measured.bpb, "predicted_bytes": measured.predicted}


def _in_words(measured: Any) -> str:
    if not measured.predicted:
        return "too short"
    return "not finite" if measured.bpb is None else f"{measured.bpb:.4f}"


def _line(bpb: str, count: str, name: str) -> str:
    return f"{bpb:>13}  {count:>15}  {name}"
