"""Answers that are no text: which head answers a prompt, and the picture, video or sound that the head makes.

Legend: T ids of a prompt, T' samples of a sound, F frames of 10 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.generate import first_window
from arbitor.optimized.training.media import Features, encoders_of, lead_of
from arbitor.optimized.training.media_speech import load_codec
from arbitor.optimized.training.run_folder import CODEC_FILE
from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.audio import SAMPLES_PER_FRAME
from arbitor.reference.graph.router import MODALITIES
from arbitor.sidecars import write_audio, write_image, write_video
from arbitor.sidecars.audio import SAMPLE_RATE

_TAUGHT = {"video": "data_video", "audio": "data_speech"}
"""Setting of a run that says that the run taught a head."""


def prompt_ids(prompt: bytes, media: Features | None, device: str | torch.device) -> Tensor:
    """Return the ids of a prompt as a model reads them, int64 [1, T]: after marks where media stand before it."""
    ids = [*lead_of(media), *prompt] if media else first_window(prompt)
    return torch.tensor([ids], device=device)


def chosen(model: ArbModel, run: Mapping[str, Any], ids_1T: Tensor, media: Features | None) -> str:
    """Return which of MODALITIES answers a prompt.

    The router is asked where the run taught it: it learned from videos or speech, and no medium stands before the prompt. Texts
    alone follow media in `arb train`.
    """
    if model.router is None or media or not any(run.get(name) for name in _TAUGHT.values()):
        return "text"
    return MODALITIES[int(model.respond(ids_1T).modality_B)]


def refuse_untaught(model: ArbModel, run: Mapping[str, Any], answer: str) -> None:
    """Refuse an answer by a head that the model does not have, or that its run did not teach.

    Raises TrainingError in a sentence that says which data teach the head.
    """
    if answer == "text":
        return
    if answer not in model.answering or not run.get(_TAUGHT[answer]):
        option = "--" + _TAUGHT[answer].replace("_", "-")
        raise TrainingError(f"the run did not learn to answer as {answer}, which {option} teaches")


def write_video_answer(
    model: ArbModel,
    ids_1T: Tensor,
    media: Features | None,
    path: Path,
    *,
    source: str | None,
    device: str | torch.device,
) -> None:
    """Draw the latent that answers a prompt, decode it, and write its frames to a PNG or an MP4 file.

    Args:
        model: has a video head that was taught.
        ids_1T: as `prompt_ids` makes them.
        media: features before them, or None.
        path: ends in .png, for the first frame, or .mp4.
        source: of the autoencoder.
        device: where the autoencoder runs.

    Raises:
        SidecarError: the autoencoder is not named or cannot be loaded, or the file cannot be written.
    """
    latent = model.draw(ids_1T, **(media or {}))
    frames = encoders_of({"video": source}, device=device).decoded(latent)[0].cpu()
    if path.suffix.lower() == ".png":
        write_image(path, frames[0])
    else:
        write_video(path, frames)


def write_audio_answer(
    model: ArbModel,
    ids_1T: Tensor,
    media: Features | None,
    path: Path,
    *,
    folder: Path,
    seconds: float,
    runtime: Runtime,
) -> None:
    """Say the tokens that answer a prompt, and write their sound to a WAV file.

    Args:
        model: has a talker head that was taught.
        ids_1T: as `prompt_ids` makes them.
        media: features before them, or None.
        path: file to write.
        folder: of the run, which has the codec.
        seconds: length of the sound, above 0.
        runtime: where the codec runs.

    Raises:
        TrainingError: the codec is missing or refused.
        SidecarError: the file cannot be written.
    """
    codec = load_codec(folder / CODEC_FILE, runtime)
    frames = max(1, round(seconds * SAMPLE_RATE / SAMPLES_PER_FRAME))
    tokens_1F = model.say(ids_1T, frames, **(media or {}))
    write_audio(path, codec.speak(tokens_1F)[0].cpu())
