"""Images: DINOv2, frozen. A picture becomes a sequence of patches.

Legend: B images, H and W their sides, N = (crop / patch)^2 patches, F features of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.sidecars.libraries import library
from arbitor.sidecars.sidecar import Sidecar
from arbitor.sidecars.source import json_settings, load_frozen

PREPROCESSING = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}
"""What DINOv2 was trained with: shortest edge to 256, bicubic, the centre 224, ImageNet's mean and deviation."""

PREPROCESSOR = "preprocessor_config.json"
"""File of a checkpoint that says how its pictures are prepared. Without the file, PREPROCESSING does."""


MAX_RATIO = 64
"""How many times the shorter side of a picture the longer one may be. The shorter is resized to a fixed length, and the longer with
it, so that a thin picture of some bytes would fill a memory."""


def refuse_thin(name: str, height: int, width: int) -> None:
    """Refuse a picture that is much longer than wide. Raises ValueError in a sentence that names it."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"{name} is {width} x {height}, but its longer side may be at most {MAX_RATIO} times its shorter one"
        )


class VisionSidecar(Sidecar):
    """DINOv2 over pictures.

    Math:    the last hidden states of the patches, after the final norm, without the token of the whole picture
    Shapes:  B pictures uint8 [3, H, W] -> float32 [B, N, F]; 224 x 224 and patches of 14 give N = 256
    Source:  REFACTOR9, REFACTOR11; Oquab et al. 2023; docs/spec/sidecars.md
    """

    def __init__(self, network: Any, processor: Any, *, identity: str, precision: str) -> None:
        super().__init__(network, identity=identity, precision=precision)
        self.processor = processor
        self.num_features = int(network.config.hidden_size)

    @classmethod
    def load(cls, source: str | Path, *, precision: str = "int8") -> Self:
        """Return the sidecar of a folder, or of a repository OWNER/NAME such as facebook/dinov2-small.

        Args:
            source:    a folder with config.json and safetensors, and preprocessor_config.json if it has one; or the repository.
            precision: `int8` or `bfloat16`.

        Raises:
            SidecarError: a library is missing, or the weights are not just those of a DINOv2.
            ValueError: another precision.
        """
        loaded = load_frozen(
            "vision",
            source,
            class_name="Dinov2Model",
            model_type="dinov2",
            precision=precision,
            settings=(PREPROCESSOR,),
        )
        prepared = loaded.folder / PREPROCESSOR
        settings = json_settings(prepared) if prepared.is_file() else PREPROCESSING
        return cls(
            loaded.network, processor_of(settings), identity=loaded.identity, precision=loaded.precision
        )

    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """Return pictures as the network reads them, float32 [B, 3, crop, crop], prepared by the library's own processor.

        Raises TypeError or ValueError for a picture that is not uint8 [3, H, W], or much longer than wide (`refuse_thin`).
        """
        for place, image in enumerate(images):
            # uint8 alone: the range of a float picture is anyone's guess.
            checks.dtype_in(f"image {place}", image, (torch.uint8,))
            if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
                raise ValueError(
                    f"image {place} has shape {tuple(image.shape)}, but must be [3, height, width]"
                )
            refuse_thin(f"image {place}", *image.shape[1:])
        # The processor resizes pictures of Pillow as the authors of the checkpoint did.
        pil = library("PIL.Image")
        pictures = [pil.fromarray(image.movedim(0, 2).cpu().contiguous().numpy()) for image in images]
        found: Tensor = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return found

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Return the features of pictures of any size, float32 [B, N, F] on the device of the network.

        Raises TypeError or ValueError for no picture, or one that is not uint8 [3, H, W].
        """
        if not len(images):
            raise ValueError("images is empty, but must hold at least one picture")
        dtype = next(self.network.parameters()).dtype if self.precision == "bfloat16" else torch.float32
        pixels = self.pixels(images).to(self.device, dtype)
        hidden: Tensor = self.run(self.network, pixel_values=pixels).last_hidden_state
        return hidden[:, 1:].float()


def processor_of(settings: dict[str, Any]) -> Any:
    """Return the library's processor of Pillow's pictures, under the name that the library's release gives it."""
    transformers = library("transformers")
    library("PIL.Image")
    cls = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    known = {name: value for name, value in settings.items() if name in PREPROCESSING}
    return cls(**known)
