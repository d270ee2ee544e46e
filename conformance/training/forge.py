"""Checkpoints as a careful forger would write them: something is changed, and every digest made to fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from arbitor.optimized.training import checkpoint as checkpoints

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
"""What changes tensors and header of a checkpoint, in place."""


def forged(path: Path, change: Change) -> Path:
    """Rewrite a checkpoint with something changed and every digest made to fit."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["arbitor"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    header["state_sha256"] = checkpoints._tensors_sha256(tensors)
    header["content_sha256"] = checkpoints._content_sha256(header)
    safetensors.torch.save_file(tensors, path, metadata={"arbitor": json.dumps(header)})
    return path


def first_element(name: str, value: int) -> Change:
    """Set the first element of a tensor."""

    def change(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        tensors[name].view(-1)[0] = value

    return change
