"""Files of pictures, sound and video, decoded to tensors by Pillow and PyAV.

Legend: H and W sides of a picture, T samples or frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arbitor.sidecars.audio import SAMPLE_RATE
from arbitor.sidecars.libraries import library
from arbitor.sidecars.sidecar import SidecarError

MAX_PIXELS = 2**28
"""Most pixels of a picture: 16384 x 16384. A small file may claim more than a memory holds."""

MAX_SECONDS = 3600
"""Longest sound that is read, in seconds: 230 MB."""

MAX_FRAMES = 4096
"""Most frames of a video that are read unless said otherwise."""


def read_image(path: str | Path) -> Tensor:
    """Return a picture of any format, size and mode as uint8 [3, H, W], upright.

    Greyscale is repeated in all channels, and greyscale of 16 bits is divided by 256. Transparency shows white. Only the first
    frame of an animation is read.

    Raises SidecarError where the file cannot be decoded, is larger than MAX_PIXELS, or holds floats of no stated range.
    """
    image_module, ops = library("PIL.Image"), library("PIL.ImageOps")
    with _decoding(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
        with image_module.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise SidecarError(
                    f"{str(path)!r} is a picture of {opened.width} x {opened.height}, but may have at most {MAX_PIXELS} pixels"
                )
            picture = _rgb(ops.exif_transpose(opened), path)
        return torch.from_numpy(np.array(picture)).movedim(2, 0).contiguous()


def _rgb(picture: Any, path: str | Path) -> Any:
    """Return a picture of Pillow in RGB."""
    image_module = library("PIL.Image")
    if picture.mode == "F":
        raise SidecarError(
            f"{str(path)!r} is a picture of floats, whose range is unknown, but must have integers: save it with 8 or 16 bits"
        )
    if picture.mode.startswith("I"):
        # Pillow would clip 16 bits to 8. A picture of 32 bits is one of 16 bits that Pillow widened.
        grey_HW = np.asarray(picture.convert("I")).clip(0, 65535) >> 8
        return image_module.fromarray(grey_HW.astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layers = picture.convert("RGBA")
        white = image_module.new("RGBA", layers.size, (255, 255, 255, 255))
        return image_module.alpha_composite(white, layers).convert("RGB")
    return picture.convert("RGB")


def read_audio(path: str | Path, *, max_seconds: float = MAX_SECONDS) -> Tensor:
    """Return the first sound track of a file as float32 [T], mono at 16 kHz, in [-1, 1].

    Channels are averaged, and FFmpeg resamples other rates.

    Raises SidecarError where the file cannot be decoded, has no sound, or lasts longer than `max_seconds`.
    """
    av = library("av")
    limit, parts, count = int(max_seconds * SAMPLE_RATE), [], 0
    with _decoding(path), av.open(str(path)) as container:
        if not container.streams.audio:
            raise SidecarError(f"{str(path)!r} has no sound")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        # None flushes the samples that the resampler still holds.
        for frame in (*_frames(container, container.streams.audio[0]), None):
            for piece in resampler.resample(frame):
                parts.append(torch.from_numpy(piece.to_ndarray()[0].copy()))
                count += len(parts[-1])
            if count > limit:
                raise SidecarError(
                    f"{str(path)!r} lasts longer than {max_seconds:g} s, the most that is read"
                )
    # A resampled peak may lie a little beyond the samples around it.
    return torch.cat(parts).clamp(-1, 1) if parts else torch.zeros(0)


class Video(NamedTuple):
    """The frames of a video file.

    Fields:
        frames:            uint8 [T, 3, H, W].
        frames_per_second: rate of the file, or 0 if the file does not say.
        more:              whether the file has more frames than were asked for.
    """

    frames: Tensor
    frames_per_second: float
    more: bool


def read_video(path: str | Path, *, max_frames: int = MAX_FRAMES, every: int = 1) -> Video:
    """Return the frames of the first video track of a file: from the first frame on, one of each `every` frames.

    Raises SidecarError where the file cannot be decoded or has no pictures, ValueError for counts below 1.
    """
    for name, value in (("max_frames", max_frames), ("every", every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    av = library("av")
    kept: list[Tensor] = []
    with _decoding(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise SidecarError(f"{str(path)!r} has no pictures")
        stream, more = container.streams.video[0], False
        for number, frame in enumerate(_frames(container, stream)):
            if number % every:
                continue
            if len(kept) == max_frames:
                more = True
                break
            kept.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(2, 0))
        rate = float(stream.average_rate or 0) / every
    if not kept:
        raise SidecarError(f"{str(path)!r} has no frame that can be decoded")
    return Video(torch.stack(kept), rate, more)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the decoded frames of a track."""
    yield from container.decode(stream)


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Turn an error of a decoder into a SidecarError that names the file."""
    file = Path(path)
    if not file.is_file():
        raise SidecarError(f"{str(path)!r} is no file that exists")
    try:
        yield
    except (SidecarError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SidecarError(f"{str(path)!r} cannot be decoded ({type(error).__name__}: {reason})") from error
