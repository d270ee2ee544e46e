"""The loop that denoises a latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import number
from arbitor.reference.checks.tensors import FLOAT_DTYPES, dtype_in, same_device, same_dtype


def denoise_loop(
    latent_BL: Tensor,
    tokens_BPD: Tensor,
    weights: dict[str, Any],
    alphas: Sequence[float],
    halt_threshold: float | None,
    allowed: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """Refuse latents, tokens, weights (by the names of the arguments), alphas or a threshold that do not fit each other."""
    if not isinstance(alphas, Sequence) or isinstance(alphas, str):
        raise TypeError(f"alphas is a {type(alphas).__name__}, but must be a sequence of numbers")
    if not alphas:
        raise ValueError("alphas is empty, but must have a number for each step, at least one")
    for alpha in alphas:
        number("alphas", alpha, 0.0, 1.0, open_low=True)
    if halt_threshold is not None:
        number("halt_threshold", halt_threshold, 0.0, 1.0, open_low=True)
    width, size = weights["latent_in"].shape
    shapes = {"query": (width, width), "latent_out": (size, width)}
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has shape {weights[name].shape}, but must be {shape}")
    rows, columns = weights["step_rows"].shape
    if rows < len(alphas) or columns != width:
        raise ValueError(
            f"step_rows has shape {(rows, columns)}, but must have {width} columns and a row for each of {len(alphas)} steps"
        )
    dtype_in("latent_BL", latent_BL, allowed)
    if latent_BL.ndim != 2 or latent_BL.shape[1] != size:
        raise ValueError(f"latent_BL has shape {tuple(latent_BL.shape)}, but must be [samples, {size}]")
    same_dtype("tokens_BPD", tokens_BPD, "latent_BL", latent_BL)
    fits = tokens_BPD.ndim == 3 and tokens_BPD.shape[0] == latent_BL.shape[0] and tokens_BPD.shape[2] == width
    if not fits or tokens_BPD.shape[1] == 0:
        raise ValueError(
            f"tokens_BPD has shape {tuple(tokens_BPD.shape)}, but must be [{latent_BL.shape[0]}, tokens, {width}] "
            "with at least one token"
        )
    same_device(
        latent_BL=latent_BL,
        tokens_BPD=tokens_BPD,
        **{name: weight.exponents for name, weight in weights.items()},
    )
