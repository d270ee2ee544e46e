"""The encoders of a model: the sidecars that it owns, each loaded when it is first needed, and what they make of raw media.

Legend: B samples of a batch, H and W sides of a picture, T samples or frames, N vectors, F features, s side of a latent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.sidecars.audio import SAMPLE_RATE, AudioSidecar, refuse_clip
from arbitor.sidecars.features import FeatureCache
from arbitor.sidecars.sidecar import Sidecar, SidecarError
from arbitor.sidecars.video import SIDE_MULTIPLE, VideoSidecar, whole_clip
from arbitor.sidecars.vision import VisionSidecar, refuse_thin

SIDECARS: Mapping[str, type[Any]] = {"vision": VisionSidecar, "audio": AudioSidecar, "video": VideoSidecar}
"""The kinds of sidecars that a model may own."""

FRAMES_READ = 4
"""Frames of a clip that are read as pictures, evenly spaced from its first to its last."""

Source = str | Path | Sidecar
"""A sidecar, or what its `load` takes."""


class Encoders:
    """The sidecars of a model. Raw pictures, sounds and clips go in, and features or latents come out.

    A sidecar is loaded when it is first needed, so that a medium that nobody uses costs nothing. Without a cache a batch of
    pictures is read in one pass. With a cache each medium is read by itself, so that what is kept never depends on its neighbours
    in a batch, and the same content gives the same bits in every order.

    Args:
        vision:       DINOv2: a sidecar, a folder, or OWNER/NAME.
        audio:        Moonshine, likewise.
        video:        the Wan autoencoder: a sidecar, a file, or OWNER/NAME/FILE.
        video_config: folder of the autoencoder's config.json; None stands for Wan 2.1.
        precision:    `int8` or `bfloat16`, of sidecars that are loaded here.
        device:       device of sidecars that are loaded here.
        cache:        cache of features, or None.

    Raises:
        TypeError: a sidecar of another kind.
        ValueError: `video_config` without the name of a file to load.
    """

    def __init__(
        self,
        *,
        vision: Source | None = None,
        audio: Source | None = None,
        video: Source | None = None,
        video_config: str | Path | None = None,
        precision: str = "int8",
        device: torch.device | str = "cpu",
        cache: FeatureCache | None = None,
    ) -> None:
        self._sources: dict[str, Source] = {}
        for kind, source in (("vision", vision), ("audio", audio), ("video", video)):
            if isinstance(source, Sidecar) and not isinstance(source, SIDECARS[kind]):
                raise TypeError(
                    f"{kind} is a {type(source).__name__}, but must be a {SIDECARS[kind].__name__} or its source"
                )
            if source is not None:
                self._sources[kind] = source
        if video_config is not None and not isinstance(video, str | Path):
            raise ValueError(
                f"video_config is {str(video_config)!r}, but must be None without a file of the autoencoder to load"
            )
        self._video_config, self._precision = video_config, precision
        self._device = torch.device(device)
        self.cache = cache

    def sidecar(self, kind: str) -> Any:
        """Return the sidecar of a kind, `vision`, `audio` or `video`, loaded.

        Raises SidecarError where none was named, or it cannot be loaded.
        """
        if kind not in self._sources:
            raise SidecarError(f"the model has no {kind} sidecar, but one must be named: {kind}=...")
        source = self._sources[kind]
        if not isinstance(source, Sidecar):
            options: dict[str, Any] = {"config": self._video_config} if kind == "video" else {}
            source = SIDECARS[kind].load(source, precision=self._precision, **options)
            source.to(self._device)
            self._sources[kind] = source
        return source

    def to(self, device: torch.device | str) -> Encoders:
        """Return these encoders, on a device from now on."""
        device = torch.device(device)
        if device != self._device:
            self._device = device
            for source in self._sources.values():
                if isinstance(source, Sidecar):
                    source.to(device)
        return self

    def features(self, kind: str, content: bytes, read: Callable[[], Tensor], *, side: int = 0) -> Tensor:
        """Return what a sidecar makes of one medium, float32 on the CPU: from the cache, or made now.

        The cached result is of this content, sidecar, kind of device and number of threads, since another device or number of
        threads may add up in another order.

        Args:
            kind:    `vision` and `audio` give features [N, F]; `video` gives the latent [16, 1, s, s] of a first frame.
            content: bytes that decide the medium, such as a digest of its file.
            read:    decodes the medium: uint8 [3, H, W] of `vision`, float32 [T] of `audio`, uint8 [T, 3, H, W] of `video`.
            side:    s, for `video`.
        """
        sidecar = self.sidecar(kind)

        def make() -> Tensor:
            medium = read()
            if kind == "vision":
                made: Tensor = sidecar([medium])[0]
            elif kind == "audio":
                refuse_clip("a sound", medium)
                [made] = sidecar([whole_seconds(medium)])
            else:
                made = sidecar.encode(first_frame(medium, SIDE_MULTIPLE * side)[None])[0]
            return made.cpu()

        if self.cache is None:
            return make()
        place = "cuda" if sidecar.device.type == "cuda" else f"cpu-{torch.get_num_threads()}"
        return self.cache.get(f"{kind}:{side}:{place}:".encode() + content, sidecar, make)

    def pictures(self, images: Sequence[Tensor]) -> Tensor:
        """Return the features of pictures, float32 [B, N, F].

        Raises TypeError or ValueError for no picture, or one that is not uint8 [3, H, W]; SidecarError as `sidecar`.
        """
        vision: VisionSidecar = self.sidecar("vision")
        if self.cache is None or not len(images):
            return vision(images)
        return torch.stack(
            [
                self.features("vision", content_of(image), lambda image=image: image)  # type: ignore[misc]
                for image in images
            ]
        )

    def sounds(self, clips: Sequence[Tensor]) -> Tensor:
        """Return the features of sounds, float32 [B, N, F]. All are filled up with silence to the whole seconds of the longest.

        Raises TypeError or ValueError for no sound, or one that is not float32 [T] at 16 kHz; SidecarError as `sidecar`.
        """
        if not len(clips):
            raise ValueError("clips is empty, but must hold at least one sound")
        for place, clip in enumerate(clips):
            refuse_clip(f"clip {place}", clip)
        longest = max(len(clip) for clip in clips)
        equal = [whole_seconds(clip, longest) for clip in clips]
        if self.cache is None:
            audio: AudioSidecar = self.sidecar("audio")
            return torch.stack(audio(equal))
        return torch.stack(
            [
                self.features("audio", content_of(clip), lambda clip=clip: clip)  # type: ignore[misc]
                for clip in equal
            ]
        )

    def clips(self, clips: Sequence[Tensor]) -> Tensor:
        """Return the features of clips, float32 [B, k N, F]: of FRAMES_READ frames as pictures, in their order.

        Raises TypeError or ValueError for no clip, or one that is not uint8 [T, 3, H, W]; SidecarError as `sidecar`.
        """
        frames = [frame for clip in clips for frame in spread_frames(clip)]
        return self.pictures(frames).unflatten(0, (len(clips), FRAMES_READ)).flatten(1, 2)

    def latents(self, clips: Sequence[Tensor], *, side: int) -> Tensor:
        """Return the normed latents of the first frames of clips, float32 [B, 16, 1, s, s].

        Raises TypeError or ValueError for no clip, or one that is not uint8 [T, 3, H, W]; SidecarError as `sidecar`.
        """
        if not len(clips):
            raise ValueError("clips is empty, but must hold at least one clip")
        if self.cache is None:
            video: VideoSidecar = self.sidecar("video")
            return video.encode(torch.stack([first_frame(clip, SIDE_MULTIPLE * side) for clip in clips]))
        return torch.stack(
            [
                self.features("video", content_of(clip[:1]), lambda clip=clip: clip, side=side)  # type: ignore[misc]
                for clip in clips
            ]
        )

    def decoded(self, latents: Tensor) -> Tensor:
        """Return the frames of normed latents, uint8 [B, T, 3, H, W]; see `VideoSidecar.decode`."""
        video: VideoSidecar = self.sidecar("video")
        return video.decode(latents)


def content_of(medium: Tensor) -> bytes:
    """Return bytes that decide a medium: a digest of its dtype, shape and numbers."""
    head = f"{medium.dtype}:{tuple(medium.shape)}:".encode()
    return hashlib.sha256(head + medium.cpu().contiguous().numpy().tobytes()).digest()


def whole_seconds(clip: Tensor, samples: int | None = None) -> Tensor:
    """Return a sound float32 [T], filled up with silence to whole seconds.

    The encoder norms a clip as a whole, so that filling changes features a little. A sound is filled in the same way in training
    and afterwards, and sounds of a batch must have one length.

    Args:
        clip:    the sound.
        samples: least number of samples that comes out, before it is rounded up; None stands for T.
    """
    count = max(len(clip), samples or 0)
    seconds = max(1, math.ceil(count / SAMPLE_RATE))
    return F.pad(clip, (0, seconds * SAMPLE_RATE - len(clip)))


def spread_frames(clip: Tensor) -> Tensor:
    """Return FRAMES_READ frames of a clip uint8 [T, 3, H, W], evenly spaced; a short clip repeats frames.

    Raises TypeError or ValueError for another dtype or shape, or no frame.
    """
    whole_clip(clip)
    last = clip.shape[0] - 1
    return clip[[number * last // (FRAMES_READ - 1) for number in range(FRAMES_READ)]]


def first_frame(clip: Tensor, side: int) -> Tensor:
    """Return the first frame of a clip uint8 [T, 3, H, W] as uint8 [1, 3, side, side].

    Its shorter edge is resized to `side` (bilinear, antialiased), and the centre is cut out.
    Raises TypeError or ValueError for another dtype or shape, no frame, or one much longer than wide (`refuse_thin`).
    """
    whole_clip(clip)
    frame = clip[:1].cpu().float()
    height, width = frame.shape[2:]
    refuse_thin("a frame", height, width)
    scale = side / min(height, width)
    size = [max(side, round(height * scale)), max(side, round(width * scale))]
    frame = F.interpolate(frame, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return frame[:, :, top : top + side, left : left + side].round().clamp(0, 255).to(torch.uint8)
