"""Video: the autoencoder of Wan 2.1 (pig-vae), frozen. Frames become latents, and latents become frames.

Legend: B clips, T = 4 k + 1 frames, H and W their sides, K = k + 1 frames of a latent, h = H / 8, w = W / 8, 16 channels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.sidecars.libraries import library
from arbitor.sidecars.precision import frozen
from arbitor.sidecars.sidecar import Sidecar, SidecarError
from arbitor.sidecars.source import identity_of, local_file, refuse_other_tensors

FRAMES_PER_LATENT = 4
"""Frames that a latent frame stands for, after the first one, which has a latent frame of its own."""

SIDE_MULTIPLE = 8
"""Number that divides the sides of a frame."""


class Clip(NamedTuple):
    """Frames that the autoencoder takes.

    Fields:
        frames:  uint8 [T, 3, H, W], T = 4 k + 1, sides multiples of 8.
        dropped: number of frames that were cut at the end.
        cropped: numbers of rows and columns that were cut, half of them on each side.
    """

    frames: Tensor
    dropped: int
    cropped: tuple[int, int]


def whole_clip(frames: Tensor) -> Clip:
    """Return the largest part of some frames, uint8 [T, 3, H, W], that the autoencoder takes, and how much was cut.

    Raises TypeError or ValueError for another dtype or shape, no frame, or sides below 8.
    """
    checks.dtype_in("frames", frames, (torch.uint8,))
    if (
        frames.ndim != 4
        or frames.shape[0] == 0
        or frames.shape[1] != 3
        or min(frames.shape[2:]) < SIDE_MULTIPLE
    ):
        raise ValueError(
            f"frames has shape {tuple(frames.shape)}, but must be [frames, 3, height, width] with a frame or more and sides of "
            f"{SIDE_MULTIPLE} or more"
        )
    kept = (frames.shape[0] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
    rows, columns = (side % SIDE_MULTIPLE for side in frames.shape[2:])
    height, width = frames.shape[2] - rows, frames.shape[3] - columns
    top, left = rows // 2, columns // 2
    part = frames[:kept, :, top : top + height, left : left + width]
    return Clip(part, frames.shape[0] - kept, (rows, columns))


class VideoSidecar(Sidecar):
    """The Wan autoencoder over clips.

    Math:    x = frames / 127.5 - 1; z = (mode of the encoder's distribution - mean) / std, by channel, as its config says;
             back: frames = round(127.5 (clamp(decoder(z std + mean), -1, 1) + 1))
    Shapes:  frames uint8 [B, T, 3, H, W] <-> latents float32 [B, 16, K, h, w]; one frame of 256 x 256 is [16, 1, 32, 32]
    Source:  REFACTOR9, REFACTOR11 (pig-vae); Wan team 2025; docs/spec/sidecars.md
    """

    def __init__(self, network: Any, *, identity: str, precision: str) -> None:
        super().__init__(network, identity=identity, precision=precision)
        self.num_channels = int(network.config.z_dim)

    @classmethod
    def load(cls, source: str | Path, *, config: str | Path | None = None, precision: str = "int8") -> Self:
        """Return the sidecar of a safetensors file, loaded by `AutoencoderKLWan.from_single_file` alone.

        Args:
            source:    a file, or OWNER/NAME/FILE of a repository.
            config:    a folder whose config.json describes the autoencoder; None stands for Wan 2.1. No hub is asked for it.
            precision: `int8` or `bfloat16`.

        Raises:
            SidecarError: a library is missing, or the tensors of the file are not just those of the autoencoder.
            ValueError: another precision.
        """
        diffusers = library("diffusers")
        file = local_file(source)
        loaded = _from_single_file(diffusers.AutoencoderKLWan, file, config)
        network, got = frozen(loaded, precision)
        settings = {
            key: str(value) for key, value in sorted(dict(loaded.config).items()) if not key.startswith("_")
        }
        versions = {"diffusers": diffusers.__version__, "config": str(settings)}
        identity = identity_of("video", [file], precision=got, versions=versions)
        return cls(network, identity=identity, precision=got)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the latents of clips, normed, float32 [B, 16, K, h, w] on the device of the network.

        Raises TypeError or ValueError for frames that are not uint8 [B, 4 k + 1, 3, 8 h, 8 w]. `whole_clip` cuts frames to that.
        """
        if frames.ndim != 5:
            raise ValueError(
                f"frames has shape {tuple(frames.shape)}, but must be [clips, frames, 3, height, width]"
            )
        for clip in frames:
            dropped, cropped = whole_clip(clip)[1:]
            if dropped or any(cropped):
                raise ValueError(
                    f"frames has shape {tuple(frames.shape)}, but must hold 4 k + 1 frames a clip and sides of multiples of "
                    f"{SIDE_MULTIPLE}; whole_clip cuts {dropped} frames, {cropped[0]} rows and {cropped[1]} columns"
                )
        x = frames.to(self.device).movedim(1, 2).float() / 127.5 - 1
        z: Tensor = self.run(self.network.encode, x.to(self._dtype)).latent_dist.mode().float()
        mean, std = self._statistics(z)
        return (z - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Return the frames of normed latents, uint8 [B, T, 3, H, W] on the device of the network.

        Raises TypeError or ValueError for latents that are not float [B, 16, K, h, w].
        """
        checks.dtype_in("latents", latents, checks.FLOAT_DTYPES)
        if latents.ndim != 5 or latents.shape[1] != self.num_channels or 0 in latents.shape:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}, but must be [clips, {self.num_channels}, frames, height, width]"
            )
        z = latents.to(self.device, torch.float32)
        mean, std = self._statistics(z)
        x: Tensor = self.run(self.network.decode, (z * std + mean).to(self._dtype)).sample.float()
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(2, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents by channel."""
        config: Any = self.network.config
        mean, std = (
            torch.tensor(v, device=z.device).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, std


def _from_single_file(cls: Any, file: Path, config: str | Path | None) -> Any:
    """Return the autoencoder of a file in float32; refuse a file with tensors missing or left over, which the library accepts."""
    from_file = library("safetensors.torch").load_file
    with tempfile.TemporaryDirectory() as temporary:
        if config is None:
            with torch.device("meta"):
                cls().save_config(temporary)
            config = temporary
        options = {
            "config": str(config),
            "local_files_only": True,
            "torch_dtype": torch.float32,
            "low_cpu_mem_usage": False,
        }
        try:
            stored = from_file(str(file))
            network = cls.from_single_file(str(file), **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise SidecarError(f"{str(file)!r} holds no {cls.__name__} that loads ({reason})") from error
    refuse_other_tensors(str(file), stored, network.state_dict())
    return network
