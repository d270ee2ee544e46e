"""Attention over a cache: torch's scaled_dot_product_attention, on latents and on heads, and the layer of the library transformers.

Legend: B sequences, H heads, S slots, L latent and R rotary columns, C columns of a head's value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from bench.inputs import Arguments, Sizes
from bench.peers import Peer

HEAD = 128
"""Columns of a head's value, and of its key without the rotary part, where heads have keys of their own."""


def _latents(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (q, keys, bias), at = arguments
    mask = bias.to(q.dtype)[:, None, None].expand(-1, 1, q.shape[1], -1)
    keys_B1SK, values_B1SL = keys[:, None], keys[:, None, :, : at["value_width"]]
    return lambda: F.scaled_dot_product_attention(
        q[:, None], keys_B1SK, values_B1SL, attn_mask=mask, scale=at["scale"]
    )[:, 0]


def _heads(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (q, _, bias), at = arguments
    generator = torch.Generator(device=q.device).manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=q.device, dtype=q.dtype)  # noqa: E731
    lead = (sizes["B"], sizes["H"])
    q_BH1C = draw(*lead, 1, HEAD + sizes["R"])
    keys, values = draw(*lead, sizes["S"], HEAD + sizes["R"]), draw(*lead, sizes["S"], HEAD)
    mask = bias.to(q.dtype)[:, None, None].expand(-1, sizes["H"], 1, -1)
    return lambda: F.scaled_dot_product_attention(q_BH1C, keys, values, attn_mask=mask, scale=at["scale"])


def _deepseek(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    """Return a step of one byte a sequence: its latent joins those before it, and keys and values of all are made from these."""
    from transformers import DeepseekV3Config
    from transformers.cache_utils import DynamicCache
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    q, keys, _ = arguments[0]
    config = DeepseekV3Config(
        hidden_size=sizes["H"] * HEAD,
        num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["H"],
        q_lora_rank=None,
        kv_lora_rank=sizes["L"],
        qk_rope_head_dim=sizes["R"],
        qk_nope_head_dim=HEAD,
        v_head_dim=HEAD,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    with torch.device(q.device):
        layer = DeepseekV3Attention(config, layer_idx=0).to(q.dtype).eval().requires_grad_(False)
        x_B1D = torch.randn(sizes["B"], 1, config.hidden_size, dtype=q.dtype)
        turns = torch.ones(1, 1, sizes["R"], dtype=q.dtype), torch.zeros(1, 1, sizes["R"], dtype=q.dtype)
    cache, before = DynamicCache(config=config), sizes["S"] - 1
    latents, rotary = keys[:, None, :before].split([sizes["L"], sizes["R"]], dim=-1)
    cache.update(latents, rotary, 0)

    def step() -> torch.Tensor:
        output = layer(x_B1D, position_embeddings=turns, attention_mask=None, past_key_values=cache)[0]
        cache.crop(-1)
        return output

    return step


def _deepseek_bytes(s: Sizes) -> int:
    """Return the latents read, and the keys and values that are made of them written and read."""
    return s["B"] * s["float_bytes"] * s["S"] * (s["L"] + s["R"] + 2 * s["H"] * (2 * HEAD + s["R"]))


def _latent_bytes(s: Sizes) -> int:
    rows = s["H"] * (2 * s["L"] + s["R"]) + s["S"] * (s["L"] + s["R"]) + s["S"]
    return s["B"] * s["float_bytes"] * rows


def _head_bytes(s: Sizes) -> int:
    rows = s["H"] * (s["S"] + 1) * (2 * HEAD + s["R"]) + s["S"]
    return s["B"] * s["float_bytes"] * rows


PEERS = {
    "decode_attention": (
        Peer("SDPA on latents", _latents, _latent_bytes, note="biases in bfloat16"),
        Peer(
            "SDPA, cache of heads",
            _heads,
            _head_bytes,
            lambda s: 2 * s["B"] * s["H"] * s["S"] * (2 * HEAD + s["R"]),
            note=f"keys and values of every head, {HEAD} columns wide, made before: another computation, not compared",
            checked=False,
        ),
        Peer(
            "DeepseekV3 of transformers",
            _deepseek,
            _deepseek_bytes,
            lambda s: 2 * s["B"] * s["H"] * s["S"] * (2 * HEAD * (s["L"] + 1) + s["R"]),
            note=f"the layer with its projections of one byte a sequence, heads of {HEAD} columns, random weights: not compared",
            checked=False,
            # A graph would hold a second set of keys and values.
            capturable=False,
            needs="transformers",
        ),
    )
}
"""Peers by op."""
