"""Media before a text: features by the names of the model's arguments, and the marks that lead a text after them.

Legend: B samples of a batch, T ids, N vectors, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from arbitor.reference.config import SPECIAL_IDS, ArbConfig

if TYPE_CHECKING:
    from arbitor.sidecars import Encoders

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


def check_width(kind: str, num_features: int, config: ArbConfig) -> None:
    """Refuse a sidecar, `vision` or `audio`, that gives another number of features than a model reads."""
    field = "audio_features" if kind == "audio" else "image_features"
    width = getattr(config, field)
    if num_features != width:
        raise ValueError(
            f"the {kind} sidecar gives {num_features} features, but must give {width}, the {field} of the model {config.name!r}"
        )
