"""Ternary weights of a model, area by area, in closed form, for the search for free widths.

The audit counts the weights of a model that was built. This module only multiplies. conformance/graph/test_presets.py compares the
two.
Legend: D width, C code width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from arbitor.reference.config import NGRAM, VOCABULARY_SIZE, ArbConfig

EMBEDDING = "embedding + text sequencer"
MEDIA = "image + audio sequencers"
SHARED_VQ = "shared VQ + VQ bridge"
MEMORY = "MemGram"
ATTENTION = "MLA attention"
MOE_GRAPH = "MoEGraph"
COMPOSITE = "KG VQ + composite proposal"
ROUTER = "router"
BYTE_HEAD = "ByteHead"
MEDIA_HEADS = "video/talker heads"


def inventory(config: ArbConfig) -> dict[str, int]:
    """Return the ternary weights of each area, 0 for one that is left out."""
    return {area: count(config) for area, count in COUNTS.items()}


def embedding_weights(config: ArbConfig) -> int:
    """Return the weights of the byte table, and of the sequencer with its norm."""
    return config.embed_dim * (VOCABULARY_SIZE + NGRAM * config.width) + config.width


def media_weights(config: ArbConfig) -> int:
    """Return the weights of each sequencer with its norm."""
    widths = (config.image_features, config.audio_features)
    return sum(config.width * (NGRAM * features + 1) for features in widths if features)


def shared_vq_weights(config: ArbConfig) -> int:
    """Return the weights of all codes, and of the projections down to a code and back up, each with its norm."""
    codes = config.num_codes + config.image_codes + config.audio_codes
    if not config.num_codes:
        return 0
    return config.code_dim * (codes + 2 * config.width + 1) + config.width


def attention_weights(config: ArbConfig) -> int:
    """Return the weights of attention in all layers, with the norm before each."""
    width, heads = config.width, config.num_heads
    inner, plain = heads * config.head_dim, heads * (config.head_dim - config.rotary_dim)
    queries = config.query_latent * (width + 1 + inner)
    latents = (config.kv_latent + config.rotary_dim) * width + config.kv_latent
    return config.num_layers * (
        queries + latents + config.kv_latent * (plain + inner) + width * inner + width
    )


def moe_weights(config: ArbConfig) -> int:
    """Return the weights of all layers' experts with the norm before each, and of the last layer's halting with its norm."""
    width, inner, experts = config.width, config.shared_inner, config.num_experts
    if not config.use_moe:
        return 0
    one = 3 * width * inner + experts * config.expert_rank * (width + inner) + experts * width + width
    return config.num_layers * one + (2 * width if config.max_moe_iters > 1 else 0)


def graph_weights(config: ArbConfig) -> int:
    """Return the weights of the projection of a code, of messages, updates, the norm between them, and the adapters.

    The signs of edges are counted apart.
    """
    width = config.width
    if not config.num_hops:
        return 0
    adapters = (1 + config.num_hops) * config.hop_rank
    return width * (config.code_dim + 2 * width + 1 + adapters)


def composite_weights(config: ArbConfig) -> int:
    """Return the weights of the norm, of the projection down to a code with its norm, of the gate, and of the codes.

    The signs of edges are counted apart.
    """
    width, inner, code = config.width, config.composite_inner, config.code_dim
    if not config.composite_codes:
        return 0
    return 2 * width + inner * (width + code) + code * (1 + config.composite_codes)


def router_weights(config: ArbConfig) -> int:
    """Return the weights of a router's two matrices: from the width to the inner width, and from there to three outputs."""
    return config.router_inner * (config.width + 3)


def byte_head_weights(config: ArbConfig) -> int:
    """Return the weights of a gated layer and of the vocabulary, with a norm before each."""
    return config.width * (3 * config.head_inner + VOCABULARY_SIZE + 2)


def media_head_weights(config: ArbConfig) -> int:
    """Return the weights of the video head and of the talker head.

    The video head has projections from the latent and to it, queries, and a vector for each step. The talker head is one matrix.
    """
    width = config.width
    video = width * (2 * config.video_latent + width + config.video_steps) if config.video_latent else 0
    return video + width * config.talker_tokens


def memory_weights(config: ArbConfig) -> int:
    """Return the weights of two tables, the norm of their rows, the output projection, and the gate with its norm."""
    if not config.memory_rows:
        return 0
    return config.memory_dim * (2 * config.memory_rows + 1 + config.width) + 2 * config.width


COUNTS: Mapping[str, Callable[[ArbConfig], int]] = {
    EMBEDDING: embedding_weights,
    SHARED_VQ: shared_vq_weights,
    MOE_GRAPH: lambda config: graph_weights(config) + moe_weights(config),
    COMPOSITE: composite_weights,
    ROUTER: router_weights,
    BYTE_HEAD: byte_head_weights,
    MEDIA_HEADS: media_head_weights,
    ATTENTION: attention_weights,
    MEDIA: media_weights,
    MEMORY: memory_weights,
}
"""How the weights of each area are counted: REFACTOR14's areas in its order, then two that its table does not have."""
