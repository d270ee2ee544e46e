"""Small sidecars with random weights, saved by the real libraries: encoders that nobody trained, as wide as `tiny` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.config import ArbConfig
from arbitor.sidecars import VideoSidecar, read_video
from arbitor.sidecars.encoders import first_frame
from arbitor.sidecars.libraries import library
from arbitor.sidecars.vision import PREPROCESSING, PREPROCESSOR
from bench.media.render import FRAME_SIDE, SIDE
from conformance.sidecars.small_checkpoints import sound_network, vision_network

SAMPLE_VIDEOS = 64
"""Videos by which the latents of the random autoencoder are normed."""


def write_sidecars(root: Path, config: ArbConfig, videos: Path) -> dict[str, str]:
    """Write `dinov2`, `moonshine` and `vae` into a folder, and return the settings of the trainer that name them.

    Args:
        root: folder to write into.
        config: model that reads the features.
        videos: folder of videos by which latents are normed, as a configuration says it of trained weights.
    """
    torch.manual_seed(0)
    vision_network(config.image_features).save_pretrained(root / "dinov2")
    square = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (root / "dinov2" / PREPROCESSOR).write_text(json.dumps(PREPROCESSING | square))
    sound_network(config.audio_features).save_pretrained(root / "moonshine")
    return {
        "vision": str(root / "dinov2"),
        "audio": str(root / "moonshine"),
        "video": str(_write_autoencoder(root / "vae", videos)),
    }


def _write_autoencoder(folder: Path, videos: Path) -> Path:
    """Write a random autoencoder whose configuration norms the latents of some videos, and return its file."""
    save = library("safetensors.torch").save_file
    network: Any = library("diffusers").AutoencoderKLWan(base_dim=4)
    folder.mkdir(parents=True)
    file = folder / "vae.safetensors"
    save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, str(file))
    network.save_config(str(folder))
    config = folder / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}))
    z = _latents(VideoSidecar.load(file, config=folder), videos)
    mean, std = z.mean(dim=(0, 2, 3, 4)).tolist(), z.std(dim=(0, 2, 3, 4)).tolist()
    config.write_text(json.dumps(plain | {"latents_mean": mean, "latents_std": std}))
    return file


def _latents(sidecar: VideoSidecar, videos: Path) -> Tensor:
    paths = sorted(videos.glob("*.mkv"))[:SAMPLE_VIDEOS]
    frames = [first_frame(read_video(path, max_frames=1).frames, FRAME_SIDE) for path in paths]
    return sidecar.encode(torch.stack(frames))
