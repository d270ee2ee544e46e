"""Small random checkpoints of the sidecars, saved by the real libraries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def original_key(name: str) -> str:
    """Return the name that the checkpoint of Wan 2.1 gives to a tensor of `AutoencoderKLWan`."""
    name = re.sub(r"^quant_conv\.", "conv1.", name)
    name = re.sub(r"^post_quant_conv\.", "conv2.", name)
    for ours, theirs in (
        ("coder.conv_in.", "coder.conv1."),
        ("coder.norm_out.", "coder.head.0."),
        ("coder.conv_out.", "coder.head.2."),
        ("coder.mid_block.resnets.0.", "coder.middle.0."),
        ("coder.mid_block.attentions.0.", "coder.middle.1."),
        ("coder.mid_block.resnets.1.", "coder.middle.2."),
        ("encoder.down_blocks.", "encoder.downsamples."),
    ):
        name = name.replace(ours, theirs)
    block = r"^decoder\.up_blocks\.(\d)\."
    name = re.sub(
        block + r"resnets\.(\d)\.", lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}.", name
    )
    name = re.sub(block + r"upsamplers\.0\.", lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}.", name)
    in_block = re.fullmatch(
        r"(.*\.(?:middle\.[02]|downsamples\.\d+|upsamples\.\d+)\.)(\w+)\.(gamma|weight|bias)", name
    )
    if in_block and in_block[2] in _RESIDUAL:
        return f"{in_block[1]}{_RESIDUAL[in_block[2]]}.{in_block[3]}"
    return name


def vision_network(features: int) -> Any:
    """Return a DINOv2 of two layers with random weights."""
    import transformers

    sizes = {"hidden_size": features, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 518}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def sound_network(features: int, *, speaks: bool = False) -> Any:
    """Return a Moonshine of two layers with random weights; one that `speaks` has the matrix of words behind its decoder."""
    import transformers

    counts = {
        f"{part}_num_{name}": 2
        for part in ("encoder", "decoder")
        for name in ("hidden_layers", "attention_heads")
    }
    sizes = {
        "hidden_size": features,
        "intermediate_size": 96,
        "vocab_size": 64,
        "partial_rotary_factor": 0.62,
    }
    config = transformers.MoonshineConfig(**sizes, **counts)
    return (transformers.MoonshineForConditionalGeneration if speaks else transformers.MoonshineModel)(config)


def write_checkpoints(folder: Path) -> None:
    """Write `dinov2/`, `moonshine/`, `vae/config.json` and `vae/pig_vae.safetensors` into a folder."""
    from diffusers import AutoencoderKLWan
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vision_network(48).save_pretrained(folder / "dinov2")
    sound_network(48, speaks=True).save_pretrained(folder / "moonshine")
    vae = AutoencoderKLWan(base_dim=4)
    vae.save_config(folder / "vae")
    tensors = {original_key(name): tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "vae" / "pig_vae.safetensors")
