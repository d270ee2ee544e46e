"""Search for the widths that the seeds leave open, so that the presets named after them have the weights they report.

    python -m arbitor.reference.seeds.search              # every preset
    python -m arbitor.reference.seeds.search --preset r12

Each search starts from a wish: the widths one would choose with no figure to meet. It lists alternatives for some of the widths.
Among the combinations that meet the figure exactly, it takes the roundest and nearest to the wish (widths.py). If no combination
is exact, it takes the nearest to the figure. The output is the same each time, and reference/presets.py holds it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

from arbitor.reference.config import ArbConfig
from arbitor.reference.seeds.inventory import (
    ATTENTION,
    BYTE_HEAD,
    EMBEDDING,
    MEMORY,
    MOE_GRAPH,
    ROUTER,
    graph_weights,
    inventory,
    moe_weights,
    shared_vq_weights,
)
from arbitor.reference.seeds.widths import exactly, nearest, offers, with_rows

R12_TOTAL, R12_TRUNK, R12_CORE = 1_268_095_232, 1_246_223_808, 123_996_160
"""REFACTOR12's counts of weights: of the default core, of the core without codes and graph, and of the core without experts too."""

_R12_WISH = ArbConfig(
    name="r12",
    embed_dim=512,
    width=3072,
    num_layers=1,
    num_heads=8,
    head_dim=128,
    rotary_dim=64,
    query_latent=384,
    kv_latent=128,
    shared_inner=21_216,
    num_experts=32,
    top_k=2,
    expert_rank=1024,
    head_inner=384,
    num_codes=34_108,
    num_hops=2,
    hop_rank=32,
    max_moe_iters=4,
    router_inner=768,
    video_latent=16_384,
    talker_tokens=289,
)


def search_r9() -> ArbConfig:
    """Return the model of REFACTOR9: codes, graph, memory, experts and heads at width 512, without images and audio.

    The search does not look at the seed's MiB, and its result agrees with them.
    """
    wish = replace(
        _R12_WISH,
        name="r9",
        embed_dim=512,
        width=512,
        head_dim=64,
        rotary_dim=32,
        query_latent=256,
        shared_inner=2048,
        expert_rank=128,
        head_inner=2048,
        num_codes=8192,
        router_inner=128,
        memory_rows=8192,
    )
    experts = {
        "hop_rank": range(8, 65, 8),
        "shared_inner": (1024, 1536, 2048, 3072, 4096),
        "expert_rank": (32, 64, 96, 128, 192, 256),
    }
    by_area = {
        ATTENTION: offers(
            wish, ATTENTION, {"query_latent": range(128, 513, 64), "kv_latent": range(64, 257, 64)}
        ),
        MOE_GRAPH: offers(wish, MOE_GRAPH, experts),
        BYTE_HEAD: offers(wish, BYTE_HEAD, {"head_inner": range(512, 4097, 64)}),
        MEMORY: offers(wish, MEMORY, {"memory_rows": range(4096, 32_769, 8)}),
    }
    return exactly(wish, 41_087_552, by_area)


def search_r12() -> ArbConfig:
    """Return the model of REFACTOR12, the default core: experts first, then graph and codes, then all else around them."""
    experts = R12_TRUNK - R12_CORE
    wish = nearest(_R12_WISH, moe_weights, experts, {"expert_rank": range(1, 2049)})
    codes = R12_TOTAL - R12_TRUNK
    hops = {"num_hops": range(1, 5), "hop_rank": range(8, 65)}
    wish = nearest(wish, lambda config: shared_vq_weights(config) + graph_weights(config), codes, hops)
    by_area = {
        EMBEDDING: offers(wish, EMBEDDING, {"embed_dim": range(128, 1537, 64)}),
        ROUTER: offers(wish, ROUTER, {"router_inner": (768, 256, 384, 512, 1024)}),
        ATTENTION: offers(
            wish,
            ATTENTION,
            {
                "num_heads": (4, 6, 8, 12, 16),
                "query_latent": range(128, 1025, 64),
                "kv_latent": range(64, 513, 64),
            },
        ),
        BYTE_HEAD: offers(wish, BYTE_HEAD, {"head_inner": range(64, 2049, 8)}),
    }
    return exactly(wish, R12_TOTAL, by_area)


def search_r11() -> ArbConfig:
    """Return the model of REFACTOR11: the core of REFACTOR12 with images, audio, and memory of all the weights that are left."""
    wish = replace(
        search_r12(),
        name="r11",
        top_k=4,
        image_features=384,
        image_codes=8192,
        audio_features=416,
        audio_codes=16_384,
        memory_rows=262_144,
        memory_dim=512,
    )
    return with_rows(wish, 1_500_000_000, range(64, 1025, 64))


def search_r14() -> ArbConfig:
    """Return the model of REFACTOR14: every area to the digits of its table, and the total of the page that followed it.

    It has two hops, as in REFACTOR12. With 10 M codes the graph takes the active path, on which a position has J**hops nodes.
    """
    wish = replace(
        _R12_WISH,
        name="r14",
        embed_dim=1536,
        width=7168,
        num_layers=4,
        num_heads=128,
        query_latent=3072,
        kv_latent=512,
        shared_inner=3072,
        expert_rank=32,
        head_inner=28_672,
        num_codes=10_000_000,
        hop_rank=64,
        composite_codes=5_000_000,
        router_inner=1792,
        video_latent=4096,
        memory_rows=512,
    )
    experts = {
        "hop_rank": range(16, 129, 8),
        "shared_inner": range(1024, 4097, 64),
        "expert_rank": range(16, 129, 8),
    }
    by_area = {
        ATTENTION: offers(wish, ATTENTION, {"query_latent": range(1024, 8193, 8)}, _millions(826.8)),
        MOE_GRAPH: offers(wish, MOE_GRAPH, experts, _millions(429.0)),
        BYTE_HEAD: offers(wish, BYTE_HEAD, {"head_inner": range(28_672, 30_720, 4)}, _millions(626.9)),
        MEMORY: offers(wish, MEMORY, {"memory_dim": (64, 32, 16), "memory_rows": range(64, 16_385)}),
    }
    return exactly(wish, 3_011_944_672, by_area)


def _millions(value: float) -> tuple[float, float]:
    """Return the numbers of weights that a table in millions with one decimal gives as `value`."""
    return value * 1e6 - 5e4, value * 1e6 + 5e4


SEARCHES: Mapping[str, Callable[[], ArbConfig]] = {
    "r9": search_r9,
    "r11": search_r11,
    "r12": search_r12,
    "r14": search_r14,
}
"""The searches, by the name of the preset that they find."""


def main() -> None:
    """Print what each search finds: the configuration as the arguments of an ArbConfig, then its areas."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(SEARCHES), help="only this one [all]")
    only = parser.parse_args().preset
    for name, search in SEARCHES.items():
        if only in (None, name):
            print(described(search()))


def described(config: ArbConfig) -> str:
    """Return a configuration as text: the fields that differ from their defaults, and the weights of its areas."""
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != field.default
    }
    lines = [f"{name}={value!r}," for name, value in changed.items()]
    counts = inventory(config)
    lines += [f"# {area}: {weights:,}" for area, weights in counts.items() if weights]
    return "\n".join([*lines, f"# total: {sum(counts.values()):,}", ""])


if __name__ == "__main__":
    main()
