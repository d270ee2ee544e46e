"""Media before a text: features by the names of the model's arguments, and the marks that lead a text after them.

Legend: B samples of a batch, T ids, N vectors, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arbitor.reference.config import SPECIAL_IDS, ArbConfig
from arbitor.sidecars import Encoders

if TYPE_CHECKING:
    from arbitor.optimized.training.options import Settings

KINDS = ("text", "code", "image", "audio", "video", "speech")
"""Kinds of data that a run may mix. A micro-batch is of one kind."""

SIDECAR_OF = {"image": "vision", "audio": "audio", "video": "video"}
"""Setting that names the sidecar of a kind of media."""

FOLDERS = (*SIDECAR_OF, "speech")
"""Kinds of data that are folders of files with texts. Speech needs no sidecar."""

CAPTION_END = b"\n"
"""What ends a text after a picture or a sound, so that whoever generates knows its end."""

MOST_DIGITS = 9
"""Digits of a weight of a mix, at most."""

Features = Mapping[str, Tensor]
"""Features float [B, N, F] by their names in `ArbModel.trunk`: `image_BNF`, `audio_BNF`."""

_LEADS = {
    ("image_BNF",): ("BOS", "IMAGE_START", "IMAGE_END"),
    ("audio_BNF",): ("BOS", "AUDIO_START", "AUDIO_END"),
    ("audio_BNF", "image_BNF"): ("BOS", "IMAGE_END", "AUDIO_END"),
}
"""Marks before a text, by the media before it. They are three, so that the first position of the text predicts its first byte."""


def lead_of(media: Features) -> list[int]:
    """Return the ids that lead a text after some media: three marks that say what stands there."""
    return [SPECIAL_IDS[name] for name in _LEADS[tuple(sorted(media))]]


def media_features(
    encoders: Encoders | None,
    config: ArbConfig,
    *,
    images: Sequence[Tensor] | None = None,
    sounds: Sequence[Tensor] | None = None,
    clips: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the features of raw media as a model reads them, by their names in `ArbModel.trunk`.

    Args:
        encoders: of the model.
        config: of the model.
        images: a picture a sample, uint8 [3, H, W] of any size; None: none.
        sounds: a sound a sample, float32 [T] at 16 kHz in [-1, 1]; None: none.
        clips: frames a sample, uint8 [T, 3, H, W]; some of them are read as pictures, in place of `images`; None: none.

    Returns:
        float32 [B, N, F] for each medium that is given.

    Raises:
        SidecarError: no sidecar was named for a medium, or it cannot be loaded.
        TypeError, ValueError: a medium that does not fit, that the model was not built for, or whose sidecar has another number of
            features than the model reads.
    """
    if images is not None and clips is not None:
        raise ValueError("images and clips are given, but only one of them may be: both are read as pictures")
    found: dict[str, Tensor] = {}
    for name, given, field in (
        ("images", images, "image_features"),
        ("clips", clips, "image_features"),
        ("sounds", sounds, "audio_features"),
    ):
        if given is None:
            continue
        if encoders is None:
            raise ValueError(
                f"{name} is given, but must be None: the model has no encoders (see ArbModel.use_encoders)"
            )
        width = getattr(config, field)
        if not width:
            raise ValueError(f"{name} is given, but must be None: {field} of the model is 0")
        kind = "audio" if name == "sounds" else "vision"
        check_width(kind, encoders.sidecar(kind).num_features, config)
        make = {"images": encoders.pictures, "clips": encoders.clips, "sounds": encoders.sounds}[name]
        found["audio_BNF" if name == "sounds" else "image_BNF"] = make(given)
    return found


def encoders_of(sources: Mapping[str, str | None], *, device: torch.device | str) -> Encoders:
    """Return the encoders of a run, none of them loaded yet.

    Args:
        sources: the settings `vision`, `audio` and `video`. Where a config.json stands beside the file of the autoencoder, it says
            the shape; otherwise the shape is that of Wan 2.1.
        device: where they run.
    """
    video = sources.get("video")
    folder = None if video is None else Path(video).parent
    config = folder if folder is not None and (folder / "config.json").is_file() else None
    return Encoders(**{**sources}, video_config=config, device=device)  # type: ignore[arg-type]


def check_width(kind: str, num_features: int, config: ArbConfig) -> None:
    """Refuse a sidecar, `vision` or `audio`, that gives another number of features than a model reads."""
    field = "audio_features" if kind == "audio" else "image_features"
    width = getattr(config, field)
    if num_features != width:
        raise ValueError(
            f"the {kind} sidecar gives {num_features} features, but must give {width}, the {field} of the model {config.name!r}"
        )


def data_of(settings: Settings) -> dict[str, str]:
    """Return the sources of data by kind, in the order of KINDS."""
    sources = {"text": settings.data, **{kind: getattr(settings, f"data_{kind}") for kind in KINDS[1:]}}
    return {kind: source for kind, source in sources.items() if source is not None}


def weights_of(settings: Settings) -> dict[str, Fraction]:
    """Return how often a micro-batch is of each kind, for the kinds that the run has data of; their sum is above 0.

    Raises:
        ValueError: the mix is no list of KIND=NUMBER, names a kind without data or twice, leaves out a kind of data, or has nothing
            but zeros.
    """
    kinds = tuple(data_of(settings))
    if settings.mix is None:
        return dict.fromkeys(kinds, Fraction(1))
    weights: dict[str, Fraction] = {}
    for part in settings.mix.split(","):
        kind, equals, number = (text.strip() for text in part.partition("="))
        if kind not in KINDS or not equals:
            raise ValueError(
                f"mix is {settings.mix!r}, but must be a list of KIND=NUMBER such as text=4,image=1, with kinds of "
                f"{', '.join(KINDS)}"
            )
        if kind not in kinds:
            raise ValueError(f"mix has {kind}, but the run has no data of this kind: --data-{kind}")
        if kind in weights:
            raise ValueError(f"mix is {settings.mix!r}, but must have {kind} once")
        weights[kind] = _weight(number, settings.mix)
    # The text has a default, so that nobody may have asked for it.
    for kind in kinds[1:]:
        if not weights.get(kind):
            raise ValueError(
                f"mix is {settings.mix!r}, but must have a weight above 0 for {kind}, as data_{kind} is given"
            )
    weights = {kind: weights.get(kind, Fraction(0)) for kind in kinds}
    if not any(weights.values()):
        raise ValueError(f"mix is {settings.mix!r}, but must have a weight above 0")
    return weights


def _weight(number: str, mix: str) -> Fraction:
    """Return the weight that a part of a mix names; refuse what is no decimal number of at least 0."""
    digits = number.replace(".", "", 1)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= MOST_DIGITS):
        raise ValueError(
            f"mix is {mix!r}, but a weight must be a decimal number of at most {MOST_DIGITS} digits, at least 0"
        )
    return Fraction(number)


def check_kinds(settings: Settings) -> None:
    """Refuse settings of media that nothing would read, or that lack what they need.

    Raises:
        ValueError: a sidecar, cache or mix without its data; data without its sidecar; or a mix as `weights_of` refuses.
    """
    kinds = data_of(settings)
    for kind, sidecar in SIDECAR_OF.items():
        source = getattr(settings, sidecar)
        if kind in kinds and source is None:
            raise ValueError(
                f"data_{kind} is {kinds[kind]!r}, but needs {sidecar}, the frozen encoder that reads it"
            )
        if kind not in kinds and source is not None:
            raise ValueError(f"{sidecar} is {source!r}, but does nothing without data_{kind}")
    if settings.feature_cache is not None and not kinds.keys() & SIDECAR_OF.keys():
        raise ValueError(
            f"feature_cache is {settings.feature_cache!r}, but does nothing without data of media"
        )
    if settings.mix is not None and len(kinds) == 1:
        raise ValueError(f"mix is {settings.mix!r}, but does nothing with one kind of data")
    weights_of(settings)
