"""``arb generate``."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from arbitor.optimized.commands.command import Command, of_run
from arbitor.optimized.commands.media_prompt import asked_sidecars, media_of_files, media_options
from arbitor.optimized.commands.parameters import (
    FilePath,
    Number,
    WholeNumber,
    refuse_given,
    setting,
    settings,
    warn,
)
from arbitor.optimized.training.options import MOST_BYTES
from arbitor.optimized.training.shown import shown

STDIN = "-"
"""How standard input is called where a file is expected."""

SUFFIXES = {"video": (".png", ".mp4"), "audio": (".wav",)}
"""How a file may end that an answer is written to, the usual end first. A .png has the first frame."""

MOST_SECONDS = 60
"""Longest sound that is said, in seconds."""

MOST_PROMPT_BYTES = 2**28
"""Bytes of a prompt at most: standard input may never end."""


@click.command(cls=Command)
@of_run
@click.option("--prompt", help="Text to continue [none].")
@click.option(
    "--prompt-file",
    type=FilePath(allow_dash=True),
    help="A file with the bytes to continue; -: standard input [none].",
)
@click.option(
    "--bytes", "num_bytes", type=WholeNumber(0, MOST_BYTES), default=256, help="Bytes to add [256]."
)
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.8,
    help="Of the draws; 0: the likeliest byte [0.8].",
)
@click.option("--top-k", type=WholeNumber(1), help="Draw from so many of the likeliest bytes [all].")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    help="Draw from the likeliest bytes of this probability [all].",
)
@setting(
    "context", help="Bytes at the end of the prompt that are read, at most", default_help="as trained", low=3
)
@setting("seed", help="Of the draws", default=0)
@settings("device", "backend", "dtype")
@setting("cuda_graph", help="Record a step once, then replay it: the same bytes, sooner")
@media_options
@click.option(
    "--as",
    "answer",
    type=click.Choice(["text", "video", "audio"]),
    help="What answers [what the router says].",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File of a picture (.png), video (.mp4) or sound (.wav) [answer.png or answer.wav].",
)
@click.option(
    "--seconds",
    type=Number(0, MOST_SECONDS, min_open=True),
    default=1.0,
    help="Length of a sound [1].",
)
@click.pass_context
def generate(
    command: click.Context,
    /,
    run: Path,
    prompt: str | None,
    prompt_file: str | None,
    num_bytes: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    context: int | None,
    seed: int,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    cuda_graph: bool | None,
    answer: str | None,
    to: Path | None,
    seconds: float,
    sidecar: tuple[str, ...],
    **media: Any,
) -> None:
    """Continue a prompt with the best model of RUN. Bytes come as they are drawn.

    A pipe gets them as they are, a terminal without control characters. Standard error says how fast it was. Media stand before the
    prompt. The text after them ends at the first line end.

    Where the run learned from videos or speech, the router decides whether a text, a picture or a sound answers a prompt without
    media. --as decides in its place. A picture or a sound is written to a file, whose name is printed.
    """
    sources = asked_sidecars(sidecar)
    if answer in ("text", "audio") and "video" in sources:
        raise click.UsageError("--sidecar video=... was given, but does nothing with --as " + answer)
    if answer == "text":
        refuse_given(command, "to", "seconds", where="with --as text")
    if answer in ("video", "audio"):
        of_text = ("num_bytes", "temperature", "top_k", "top_p", "seed", "cuda_graph")
        refuse_given(command, *of_text, where=f"with --as {answer}")
    if answer == "video":
        refuse_given(command, "seconds", where="with --as video")
    if prompt is not None and prompt_file is not None:
        raise click.UsageError(f"--prompt-file {prompt_file!r} was given with --prompt, but only one may be")
    if num_bytes == 0:
        unread = (
            "temperature",
            "top_k",
            "top_p",
            "context",
            "seed",
            "cuda_graph",
            "image",
            "audio",
            "video",
            "sidecar",
        )
        refuse_given(command, *unread, where="with --bytes 0")
    if temperature == 0:
        refuse_given(
            command, "seed", "top_k", "top_p", where="with --temperature 0, which takes the likeliest byte"
        )
    if not prompt and prompt_file is None:
        refuse_given(command, "context", where="without --prompt or --prompt-file")
    from arbitor.optimized.training.generate import stream_batch
    from arbitor.optimized.training.media import CAPTION_END
    from arbitor.optimized.training.media_answer import (
        chosen,
        prompt_ids,
        refuse_untaught,
        write_audio_answer,
        write_video_answer,
    )
    from arbitor.optimized.training.model_folder import open_model, trained_context
    from arbitor.optimized.training.recording import records
    from arbitor.optimized.training.runtime import choose_runtime

    runtime = choose_runtime(device or "auto", backend, dtype)
    given = os.fsencode(prompt or "") if prompt_file is None else _prompt_of(prompt_file)
    # What cannot be recorded on this device is refused before the model is read.
    records(cuda_graph, runtime)
    with open_model(run, runtime, warn) as (model, checkpoint):
        record = records(cuda_graph, runtime, adapted=checkpoint.adapter is not None)
        before = media_of_files(
            checkpoint.run, model.config, runtime.device, sidecar=sources, warn=warn, **media
        )
        read = context or trained_context(checkpoint)
        ids_1T = prompt_ids(given[-read:] if read else given, before, runtime.device)
        answers = answer or chosen(model, checkpoint.run, ids_1T, before)
        refuse_untaught(model, checkpoint.run, answers)
        if answers != "text":
            path = _file_of(answers, to)
            if answers == "video":
                source = sources.get("video") or checkpoint.run.get("video")
                write_video_answer(model, ids_1T, before, path, source=source, device=runtime.device)
            else:
                folder = run if run.is_dir() else run.parent
                write_audio_answer(
                    model, ids_1T, before, path, folder=folder, seconds=seconds, runtime=runtime
                )
            click.echo(str(path))
            return
        if to is not None:
            warn(f"the router answers with a text, so {str(to)!r} is not written")
        began = time.monotonic()
        pieces = stream_batch(
            model,
            [given],
            num_bytes,
            temperature=temperature,
            seeds=[seed],
            top_k=top_k,
            top_p=top_p,
            stop=[CAPTION_END] if before else (),
            context=read,
            media=[before] if before else None,
            cuda_graph=record,
        )
        write = _writer()
        write(given, False)
        count, first = 0, began
        for [piece] in pieces:
            write(piece, False)
            first = first if count else time.monotonic()
            count += len(piece)
        write(b"", True)
        ended = time.monotonic()
    # The first byte comes with the reading of the prompt.
    spent, steps = ended - first, count - 1
    if steps > 0 and spent > 0:
        _end_line()
        warn(
            f"{count:,} bytes in {ended - began:.2f} s: the first after {first - began:.2f} s, then {steps / spent:,.1f} a second"
        )


def _file_of(answers: str, to: Path | None) -> Path:
    """Return the file that an answer is written to. One that nobody named must not exist.

    Raises:
        TrainingError: the file ends in another way than the answer, or exists although nobody named it.
    """
    from arbitor.optimized.training.errors import TrainingError

    path = to or Path("answer" + SUFFIXES[answers][0])
    if path.suffix.lower() not in SUFFIXES[answers]:
        raise TrainingError(
            f"the answer is of {answers}, but --to is {str(path)!r}: it must end in {' or '.join(SUFFIXES[answers])}"
        )
    if to is None and path.exists():
        raise TrainingError(f"{str(path)!r} exists, and would be overwritten: name a file with --to")
    return path


def _end_line() -> None:
    """End the line of the text where a sentence on standard error would stand in it, as with ``2>&1``."""
    with contextlib.suppress(OSError, ValueError):
        if not sys.stdout.isatty() and os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno()):
            click.echo(err=True)


def _writer() -> Callable[[bytes, bool], None]:
    """Return what writes bytes, at once: as they are to a pipe, as text without control characters to a terminal.

    Its second argument says that no more come, as the bytes of a letter may be torn.
    """
    if not sys.stdout.isatty():

        def raw(piece: bytes, is_last: bool) -> None:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()

        return raw
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(piece: bytes, is_last: bool) -> None:
        click.echo(shown(decoder.decode(piece, is_last), allowed="\n\t"), nl=is_last)

    return text


def _prompt_of(path: str) -> bytes:
    """Return the bytes of a prompt file, which may be a pipe, or of standard input."""
    from arbitor.optimized.training.errors import TrainingError

    name = "standard input" if path == STDIN else repr(path)
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb") as file:
            content = file.read(MOST_PROMPT_BYTES + 1)
    except OSError as error:
        raise TrainingError(f"cannot read the prompt {name}: {error.strerror or error}") from error
    if len(content) > MOST_PROMPT_BYTES:
        raise TrainingError(f"the prompt {name} has more than the {MOST_PROMPT_BYTES:,} bytes allowed")
    return content
