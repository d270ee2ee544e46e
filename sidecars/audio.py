"""Sound: Moonshine, frozen. Samples become a sequence of frames.

Legend: T samples at 16 kHz, N frames, F features of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.sidecars.sidecar import Sidecar
from arbitor.sidecars.source import load_frozen

SAMPLE_RATE = 16_000
"""Samples a second that the network was trained with."""

KERNELS, STRIDES = (127, 7, 3), (64, 3, 2)
"""The three convolutions in front. A frame is 384 samples, and the first frame needs 895."""

MIN_SAMPLES = 895
"""Fewest samples that give a frame, 56 ms."""


def audio_frames(samples: int) -> int:
    """Return the number of frames that so many samples give; 0 below MIN_SAMPLES."""
    length = samples
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        if length < kernel:
            return 0
        length = (length - kernel) // stride + 1
    return length


class AudioSidecar(Sidecar):
    """Moonshine's encoder over sound.

    Math:    the encoder's last hidden states of raw samples, which are not normalised
    Shapes:  a list of float [T], 16 kHz mono in [-1, 1] -> a list of float32 [N, F], N = audio_frames(T)
    Batches: clips of equal length are read together, other clips one by one. The first norm looks at a whole clip, so padding
             would change the features of every frame
    Source:  REFACTOR9, REFACTOR11; Jeffries et al. 2024; docs/spec/sidecars.md
    """

    def __init__(self, network: Any, *, identity: str, precision: str) -> None:
        super().__init__(network, identity=identity, precision=precision)
        self.num_features = int(network.config.hidden_size)

    @classmethod
    def load(cls, source: str | Path, *, precision: str = "int8", encoder_only: bool = False) -> Self:
        """Return the sidecar of a folder, or of a repository OWNER/NAME such as UsefulSensors/moonshine-base.

        Args:
            source:       a folder with config.json and safetensors, or the repository.
            precision:    `int8` or `bfloat16`.
            encoder_only: drop the decoder, which features do not need. The seed documents count it, so it is kept by default.

        Raises:
            SidecarError: a library is missing, or the weights are not just those of a Moonshine.
            ValueError: another precision.
        """
        loaded = load_frozen(
            "audio",
            source,
            class_name="MoonshineModel",
            model_type="moonshine",
            precision=precision,
            part="encoder" if encoder_only else None,
            # The checkpoint of speech recognition has a matrix of words behind the decoder.
            may_be_left=("proj_out",),
        )
        return cls(loaded.network, identity=loaded.identity, precision=loaded.precision)

    @property
    def encoder(self) -> Any:
        """The part that makes features."""
        return getattr(self.network, "encoder", self.network)

    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of each clip, float32 [N, F] on the device of the network.

        Raises TypeError or ValueError for a clip that is no float32 [T] with at least MIN_SAMPLES finite samples in [-1, 1].
        """
        for place, clip in enumerate(clips):
            refuse_clip(f"clip {place}", clip)
        found: dict[int, Tensor] = {}
        for length in sorted({len(clip) for clip in clips}):
            places = [place for place, clip in enumerate(clips) if len(clip) == length]
            batch = torch.stack([clips[place].to(self.device) for place in places])
            if self.precision == "bfloat16":
                batch = batch.to(torch.bfloat16)
            hidden: Tensor = self.run(self.encoder, batch).last_hidden_state.float()
            found |= dict(zip(places, hidden.unbind(), strict=True))
        return [found[place] for place in range(len(clips))]


def refuse_clip(name: str, clip: Tensor) -> None:
    """Refuse a clip that is no mono sound of 16 kHz with at least one frame.

    Raises TypeError or ValueError in a sentence that names the clip.
    """
    checks.dtype_in(name, clip, (torch.float32,))
    if clip.ndim != 1 or len(clip) < MIN_SAMPLES:
        raise ValueError(
            f"{name} has shape {tuple(clip.shape)}, but must be mono at {SAMPLE_RATE} Hz: [samples], at least {MIN_SAMPLES} of them"
        )
    # A NaN fails the comparison too.
    if not bool(clip.abs().max() <= 1):
        raise ValueError(
            f"{name} has a sample of magnitude {float(clip.abs().max()):g}, but all must lie in [-1, 1]"
        )
