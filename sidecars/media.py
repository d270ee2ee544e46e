"""Files of pictures, sound and video, decoded to tensors by Pillow and PyAV, and written from tensors.

Legend: H and W sides of a picture, T samples or frames.
"""

from __future__ import annotations

import errno
import io
import itertools
import warnings
import wave
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.sidecars.audio import SAMPLE_RATE
from arbitor.sidecars.libraries import library
from arbitor.sidecars.sidecar import MachineError, SidecarError

MAX_PIXELS = 2**27
"""Most pixels of a picture, or of a frame of a video: 16384 x 8192. A small file may claim more than a memory holds."""

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats of pictures that are read. For others Pillow may start a program, such as Ghostscript for PostScript."""

MAX_SECONDS = 3600
"""Longest sound that is read, in seconds: 230 MB."""

RATES = range(1_000, 1_000_001)
"""Samples a second that a sound may have. What resamples another rate may need more memory than there is."""

MAX_FRAMES = 4096
"""Most frames of a video that are read unless said otherwise."""

MAX_FRAME_BYTES = 2**32
"""Most bytes of all frames that are read of a video."""

CONTAINERS = (
    "aac", "aiff", "amr", "asf", "au", "avi", "caf", "flac", "flv", "gif", "matroska", "mjpeg", "mov", "mp3", "mpeg", "mpegts",
    "mpegvideo", "ogg", "w64", "wav",
)  # fmt: skip
"""Formats of sound and video that are read, as FFmpeg calls them. Others, such as playlists, name further files."""

MAX_CHANNELS = 8
"""Most channels of a sound. FFmpeg knows no places of the loudspeakers of more."""

SHORTAGES = frozenset(
    {
        errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC, errno.ESTALE,
        errno.ETIMEDOUT,
    }
)  # fmt: skip
"""Errors of a system that is short of open files, threads, memory or disk, or that lost its connection to a disk."""

FRAMES_PER_SECOND = 10
"""Frames a second of videos that are written unless said otherwise."""


class Blob(NamedTuple):
    """A file that lies within another one, such as the member of an archive.

    Fields:
        name: what messages call it.
        data: its bytes.
    """

    name: str
    data: bytes

    def __str__(self) -> str:
        """Return the name."""
        return self.name


MediaFile = str | Path | Blob
"""What is decoded: a path, or the bytes of a file."""


def _opened(path: MediaFile) -> Any:
    """Return what a library opens."""
    return io.BytesIO(path.data) if isinstance(path, Blob) else str(path)


def _container(path: MediaFile) -> Any:
    """Return the tracks of a file of sound or video."""
    av = library("av")
    # A name such as http:a.wav would be an address otherwise.
    source = _opened(path) if isinstance(path, Blob) else f"file:{path}"
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        return av.open(source, options=options)
    except av.error.ArgumentError as error:
        raise SidecarError(
            f"{str(path)!r} is no sound or video of a format that is read, {', '.join(CONTAINERS)}"
        ) from error


def read_image(path: MediaFile) -> Tensor:
    """Return a picture of any format, size and mode as uint8 [3, H, W], upright.

    Greyscale is repeated in all channels, and greyscale of 16 bits is divided by 256. Transparency shows white. Only the first
    frame of an animation is read.

    Raises SidecarError where the file cannot be decoded, is of none of FORMATS, is larger than MAX_PIXELS, or holds floats of no
    stated range.
    """
    image_module, ops = library("PIL.Image"), library("PIL.ImageOps")
    with _decoding(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
        image_module.init()
        try:
            # An older Pillow lacks some.
            formats = [name for name in FORMATS if name in image_module.OPEN]
            opened = image_module.open(_opened(path), formats=formats)
        except image_module.DecompressionBombError as error:
            # Pillow has a bound of its own, which is higher.
            raise _too_large(path) from error
        with opened:
            _check_pixels(path, opened)
            picture = _rgb(ops.exif_transpose(opened), path)
        return torch.from_numpy(np.array(picture)).movedim(2, 0).contiguous()


def _check_pixels(path: MediaFile, sized: Any) -> None:
    """Refuse what has more than MAX_PIXELS."""
    if sized.width * sized.height > MAX_PIXELS:
        raise _too_large(path)


def _too_large(path: MediaFile) -> SidecarError:
    return SidecarError(
        f"{str(path)!r} is larger than the {MAX_PIXELS:,} pixels that a picture or a frame may have"
    )


def _rgb(picture: Any, path: MediaFile) -> Any:
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


def read_audio(path: MediaFile, *, max_seconds: float = MAX_SECONDS) -> Tensor:
    """Return the first sound track of a file as float32 [T], mono at 16 kHz, in [-1, 1].

    Channels are averaged, and FFmpeg resamples other rates.

    Raises SidecarError where the file cannot be decoded, has no sound, or lasts longer than `max_seconds`.
    """
    av = library("av")
    parts, count = [], 0
    with _decoding(path), _container(path) as container:
        if not container.streams.audio:
            raise SidecarError(f"{str(path)!r} has no sound")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        # None flushes the samples that the resampler still holds.
        for frame in itertools.chain(_frames(container, container.streams.audio[0]), (None,)):
            # A frame of some bytes may last for days.
            if frame is not None:
                if frame.sample_rate not in RATES:
                    raise SidecarError(
                        f"{str(path)!r} has {frame.sample_rate:,} samples a second, but must have {RATES[0]:,} to {RATES[-1]:,}"
                    )
                if frame.layout.nb_channels > MAX_CHANNELS:
                    raise SidecarError(
                        f"{str(path)!r} has {frame.layout.nb_channels} channels, but may have at most {MAX_CHANNELS}"
                    )
                _check_length(path, count + frame.samples * SAMPLE_RATE // frame.sample_rate, max_seconds)
            for piece in resampler.resample(frame):
                parts.append(torch.from_numpy(piece.to_ndarray()[0].copy()))
                count += len(parts[-1])
            _check_length(path, count, max_seconds)
    # A resampled peak may lie a little beyond the samples around it.
    return torch.cat(parts).clamp(-1, 1) if parts else torch.zeros(0)


def _check_length(path: MediaFile, samples: int, max_seconds: float) -> None:
    """Refuse more samples at SAMPLE_RATE than so many seconds have."""
    if samples > max_seconds * SAMPLE_RATE:
        raise SidecarError(f"{str(path)!r} lasts longer than {max_seconds:g} s, the most that is read")


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


def read_video(path: MediaFile, *, max_frames: int = MAX_FRAMES, every: int = 1) -> Video:
    """Return the frames of the first video track of a file: from the first frame on, one of each `every` frames.

    Raises SidecarError where the file cannot be decoded or has no pictures, ValueError for counts below 1.
    """
    for name, value in (("max_frames", max_frames), ("every", every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    kept: list[Tensor] = []
    with _decoding(path), _container(path) as container:
        stream, more = _pictures(path, container), False
        for number, frame in enumerate(_frames(container, stream)):
            if number % every:
                continue
            if len(kept) == max_frames:
                more = True
                break
            kept.append(_pixels(path, frame))
            _check_bytes(path, kept)
        rate = float(stream.average_rate or 0) / every
        return Video(_stacked(path, kept), rate, more)


def read_frames(path: MediaFile, count: int) -> Tensor:
    """Return some frames of the first video track of a file, evenly spaced from its first to its last, uint8 [count, 3, H, W].

    They are the frames that `spread_frames` takes of all frames, but no others are kept in memory. The file is decoded twice, since
    only its end says how many frames it has. Of more than MAX_FRAMES the first so many count.

    Raises SidecarError as `read_video`.
    """
    with _decoding(path), _container(path) as container:
        stream = _pictures(path, container)
        total = sum(1 for _ in zip(_frames(container, stream), range(MAX_FRAMES), strict=False))
    wanted = [number * max(total - 1, 0) // max(count - 1, 1) for number in range(count)]
    found: dict[int, Tensor] = {}
    with _decoding(path), _container(path) as container:
        for number, frame in enumerate(_frames(container, _pictures(path, container))):
            if number in wanted:
                found[number] = _pixels(path, frame)
            if number == wanted[-1]:
                break
        return _stacked(path, [found[number] for number in wanted if number in found])


def _pictures(path: MediaFile, container: Any) -> Any:
    """Return the first video track."""
    if not container.streams.video:
        raise SidecarError(f"{str(path)!r} has no pictures")
    stream = container.streams.video[0]
    _check_pixels(path, stream)
    return stream


def _pixels(path: MediaFile, frame: Any) -> Tensor:
    """Return a frame as uint8 [3, H, W]."""
    _check_pixels(path, frame)
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(2, 0)


def _check_bytes(path: MediaFile, frames: list[Tensor]) -> None:
    """Refuse more than MAX_FRAME_BYTES of frames."""
    if len(frames) * frames[-1].numel() > MAX_FRAME_BYTES:
        raise SidecarError(
            f"{str(path)!r} has more than {MAX_FRAME_BYTES:,} bytes of pixels in the frames that were asked for: ask for fewer "
            "(max_frames, every)"
        )


def _stacked(path: MediaFile, frames: list[Tensor]) -> Tensor:
    """Return frames as uint8 [T, 3, H, W]."""
    if not frames:
        raise SidecarError(f"{str(path)!r} has no frame that can be decoded")
    sizes = sorted({f"{frame.shape[2]} x {frame.shape[1]}" for frame in frames})
    if len(sizes) > 1:
        raise SidecarError(f"{str(path)!r} has frames of {' and '.join(sizes[:2])}, but must have one size")
    return torch.stack(frames)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the decoded frames of a track."""
    yield from container.decode(stream)


@contextmanager
def _decoding(path: MediaFile) -> Iterator[None]:
    """Turn an error of a decoder into a SidecarError that names the file."""
    if not isinstance(path, Blob) and not Path(path).is_file():
        raise SidecarError(f"{str(path)!r} is no file that exists")
    with _told(path, "decoded"):
        yield


def _writing(path: str | Path) -> AbstractContextManager[None]:
    """Turn an error of writing into a SidecarError that names the file."""
    return _told(path, "written")


@contextmanager
def _told(path: MediaFile, done: str) -> Iterator[None]:
    """Turn an error of a library into a SidecarError that says what cannot be done with a file.

    It is a MachineError where the machine was short of something, so that nobody takes the file for damaged.
    """
    try:
        yield
    except (SidecarError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        # Numbers of errors are those of the system, whatever library raises them.
        is_short = isinstance(error, OSError) and error.errno in SHORTAGES
        kind = MachineError if is_short else SidecarError
        raise kind(f"{str(path)!r} cannot be {done} ({type(error).__name__}: {reason})") from error


def write_image(path: str | Path, image: Tensor) -> None:
    """Write a picture uint8 [3, H, W] as PNG.

    Raises TypeError or ValueError for another picture, SidecarError where the file cannot be written.
    """
    _check_frames("image", image, 3)
    pil = library("PIL.Image")
    with _writing(path):
        pil.fromarray(image.movedim(0, 2).cpu().contiguous().numpy()).save(str(path), format="PNG")


def write_video(path: str | Path, frames: Tensor, *, frames_per_second: int = FRAMES_PER_SECOND) -> None:
    """Write frames uint8 [T, 3, H, W] with even sides as MP4.

    Raises TypeError or ValueError for other frames, SidecarError where the file cannot be written.
    """
    _check_frames("frames", frames, 4)
    if frames.shape[-1] % 2 or frames.shape[-2] % 2:
        raise ValueError(
            f"frames has shape {tuple(frames.shape)}, but must have even sides, as the colours of MP4 have half of them"
        )
    av = library("av")
    with _writing(path), av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=frames_per_second)
        stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"
        for frame in frames.movedim(1, 3).cpu().contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_audio(path: str | Path, clip: Tensor) -> None:
    """Write a sound float [T] at 16 kHz in [-1, 1] as WAV, mono, 16 bits.

    Raises TypeError or ValueError for another sound, SidecarError where the file cannot be written.
    """
    checks.dtype_in("clip", clip, (torch.float32,))
    # A NaN fails the comparison too.
    if clip.ndim != 1 or len(clip) == 0 or not bool(clip.abs().max() <= 1):
        raise ValueError(f"clip has shape {tuple(clip.shape)}, but must be [samples], all of them in [-1, 1]")
    # Readers divide by 2**15, so that a sound that was read is written as it was.
    samples = (clip.cpu() * 2**15).round().clamp(max=2**15 - 1).to(torch.int16)
    with _writing(path), Path(path).open("wb") as binary, wave.open(binary, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.numpy().astype("<i2").tobytes())


def _check_frames(name: str, pixels: Tensor, dims: int) -> None:
    """Refuse what is no uint8 [..., 3, H, W] with so many dimensions."""
    checks.dtype_in(name, pixels, (torch.uint8,))
    if pixels.ndim != dims or pixels.shape[-3] != 3 or 0 in pixels.shape:
        wanted = "[3, height, width]" if dims == 3 else "[frames, 3, height, width]"
        raise ValueError(f"{name} has shape {tuple(pixels.shape)}, but must be {wanted}")
