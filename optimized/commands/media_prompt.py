"""Options of ``arb generate`` for media before a prompt, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

    from arbitor.optimized.training.media import Features
    from arbitor.reference.config import ArbConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])

_MEDIA = {
    "image": "Picture that stands before the prompt",
    "audio": "Sound that stands before the prompt",
    "video": "Video that stands before the prompt, some frames of it",
}

_SIDECARS = ("vision", "audio")
"""Sidecars that read media before a prompt."""

_ALL_SIDECARS = (*_SIDECARS, "video")
"""Those, and the autoencoder that decodes what the video head draws."""


def media_options(command: _Command) -> _Command:
    """Give a command the options of media before its prompt: parameters `image`, `audio`, `video` and `sidecar`."""
    command = click.option(
        "--sidecar",
        multiple=True,
        metavar="KIND=SOURCE",
        help="Sidecar in place of the run's own: vision=..., audio=..., video=... [of the run].",
    )(command)
    for name, text in reversed(_MEDIA.items()):
        command = click.option(
            f"--{name}", type=click.Path(path_type=Path), metavar="FILE", help=f"{text} [none]."
        )(command)
    return command


def media_of_files(
    run: Mapping[str, Any],
    config: ArbConfig,
    device: str | torch.device,
    *,
    image: Path | None,
    audio: Path | None,
    video: Path | None,
    sidecar: Mapping[str, str],
    warn: Callable[[str], None],
) -> Features | None:
    """Return the features of the media that were given, or None without media.

    Args:
        run: settings of the run, which name its sidecars.
        config: of the model.
        device: where the sidecars run.
        image, audio, video: files, or None. Of a video some frames are read as pictures.
        sidecar: sources of sidecars by kind, in place of the run's own.
        warn: is told a sentence where a sidecar is not the one that the run was trained with.

    Raises:
        click.UsageError: a sidecar without its medium.
        SidecarError: a file cannot be decoded, or a sidecar is not named or cannot be loaded.
        ValueError: media that the model was not built for.
    """
    from arbitor.optimized.training.media import encoders_of, media_features
    from arbitor.optimized.training.media_reader import MAX_CLIP_SECONDS
    from arbitor.sidecars import read_audio, read_frames, read_image
    from arbitor.sidecars.encoders import FRAMES_READ

    asked = {kind: source for kind, source in sidecar.items() if kind in _SIDECARS}
    needed = {kind for kind, files in (("vision", (image, video)), ("audio", (audio,))) if any(files)}
    for kind in asked.keys() - needed:
        media = "--image or --video" if kind == "vision" else "--audio"
        raise click.UsageError(f"--sidecar {kind}={asked[kind]} was given, but does nothing without {media}")
    if not needed:
        return None
    encoders = encoders_of({kind: asked.get(kind) or run.get(kind) for kind in _SIDECARS}, device=device)
    made = media_features(
        encoders,
        config,
        images=None if image is None else [read_image(image)],
        sounds=None if audio is None else [read_audio(audio, max_seconds=MAX_CLIP_SECONDS)],
        clips=None if video is None else [read_frames(video, FRAMES_READ)],
    )
    trained = run.get("sidecars")
    for kind in sorted(needed):
        before = trained.get(kind) if isinstance(trained, dict) else None
        if before is not None and encoders.sidecar(kind).identity != before:
            warn(
                f"the {kind} sidecar is not the one that the run was trained with, so its features may differ"
            )
    return made


def asked_sidecars(sidecar: Sequence[str]) -> dict[str, str]:
    """Return the sources of sidecars by kind.

    Raises:
        click.UsageError: a text is no KIND=SOURCE, or names a kind twice.
    """
    found: dict[str, str] = {}
    for text in sidecar:
        kind, _, source = text.partition("=")
        if kind not in _ALL_SIDECARS or not source or kind in found:
            raise click.UsageError(
                f"--sidecar is {text!r}, but must be KIND=SOURCE with {' or '.join(_ALL_SIDECARS)} as its kind, once each"
            )
        found[kind] = source
    return found
