"""torch's scaled_dot_product_attention: on the latents, with the heads as queries of one head, and on a cache of heads.

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
    )
}
"""Peers by op."""
