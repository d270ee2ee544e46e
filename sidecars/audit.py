"""The audit of sidecars: int8 modules, weights, and bytes, as they are stored and as the seed documents counted them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from arbitor.sidecars.libraries import library
from arbitor.sidecars.precision import frozen, quantized_modules, stored_tensors


@dataclass(frozen=True)
class SidecarAudit:
    """The audit of one sidecar.

    Fields:
        name:          name of the sidecar.
        modules:       number of modules with int8 weights, by class.
        weights:       weights of the network, quantised or not.
        trainable:     parameters that require a gradient; 0.
        stored_bytes:  bytes that parameters and buffers take: int8 values, float scales, and weights that stay float.
        by_dtype:      stored bytes by dtype.
        counted_bytes: weights times the bytes of the dtype that a quantised weight reports, which is float32. REFACTOR11 counted
                       its 318.80 MiB for images and sound in this way.
        bfloat16:      whether the network is kept in bfloat16 because int8 could not be had.
    """

    name: str
    modules: Mapping[str, int]
    weights: int
    trainable: int
    stored_bytes: int
    by_dtype: Mapping[str, int]
    counted_bytes: int
    bfloat16: bool


def audit_of(name: str, network: nn.Module) -> SidecarAudit:
    """Return the audit of a frozen network, which may be on the meta device."""
    by_dtype: dict[str, int] = {}
    weights = counted = trainable = 0
    for parameter in network.parameters():
        weights += parameter.numel()
        counted += parameter.numel() * parameter.element_size()
        trainable += int(parameter.requires_grad)
        for tensor in stored_tensors(parameter):
            _add(by_dtype, tensor)
    for buffer in network.buffers():
        _add(by_dtype, buffer)
    modules = quantized_modules(network)
    return SidecarAudit(
        name=name,
        modules=modules,
        weights=weights,
        trainable=trainable,
        stored_bytes=sum(by_dtype.values()),
        by_dtype=by_dtype,
        counted_bytes=counted,
        bfloat16=not modules,
    )


def _add(by_dtype: dict[str, int], tensor: torch.Tensor) -> None:
    name = str(tensor.dtype).removeprefix("torch.")
    by_dtype[name] = by_dtype.get(name, 0) + tensor.numel() * tensor.element_size()


def _dinov2_small() -> Any:
    transformers = library("transformers")
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def _moonshine_base() -> Any:
    transformers = library("transformers")
    layers = {f"{part}_num_hidden_layers": 8 for part in ("encoder", "decoder")}
    sizes = {"hidden_size": 416, "intermediate_size": 1664, "partial_rotary_factor": 0.62}
    return transformers.MoonshineModel(transformers.MoonshineConfig(**sizes, **layers))


def _wan_vae() -> Any:
    return library("diffusers").AutoencoderKLWan()


STANDARD: Mapping[str, Callable[[], Any]] = {
    "DINOv2-small": _dinov2_small,
    "Moonshine-base": _moonshine_base,
    "Wan 2.1 VAE (pig-vae)": _wan_vae,
}
"""The sidecars of the seed documents, without weights, by name."""

COUNTED_BY_THE_SEEDS = ("DINOv2-small", "Moonshine-base")
"""The sidecars in REFACTOR11's sum."""

SEED_MIB = 318.80
"""REFACTOR11's `frozen sidecar params`, in MiB."""


def counted_mib(audits: Sequence[SidecarAudit]) -> float:
    """Return the MiB of those sidecars that REFACTOR11 sums up, counted as it counts them."""
    return sum(audit.counted_bytes for audit in audits if audit.name in COUNTED_BY_THE_SEEDS) / 2**20


def standard_audit(*, precision: str = "int8") -> tuple[SidecarAudit, ...]:
    """Return the audits of the sidecars of the seed documents, counted on the meta device.

    Raises SidecarError where a library is missing.
    """
    found = []
    for name, build in STANDARD.items():
        with torch.device("meta"):
            network, _ = frozen(build(), precision)
        found.append(audit_of(name, network))
    return tuple(found)
