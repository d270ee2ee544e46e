"""Configurations with a name: `tiny`, `small`, and models of the size and structure that the seeds report.

The seeds do not give all widths of r9, r11, r12 and r14. `python -m arbitor.reference.seeds.search` finds the others, and
docs/spec/presets.md says why they are as they are.
"""

from __future__ import annotations

from difflib import get_close_matches

from arbitor.reference import checks
from arbitor.reference.config import ArbConfig

PRESETS = {
    config.name: config
    for config in (
        ArbConfig(
            name="tiny",
            embed_dim=48,
            width=144,
            num_layers=2,
            num_heads=4,
            head_dim=36,
            rotary_dim=12,
            query_latent=72,
            kv_latent=48,
            shared_inner=192,
            num_experts=4,
            top_k=2,
            expert_rank=12,
            head_inner=192,
            num_codes=256,
            code_dim=36,
            num_hops=2,
            hop_rank=12,
            num_neighbours=4,
            max_moe_iters=2,
            memory_rows=1024,
            memory_dim=24,
            composite_codes=128,
            composite_inner=36,
            image_features=48,
            image_codes=64,
            audio_features=52,
            audio_codes=64,
            router_inner=36,
            video_latent=256,
            talker_tokens=289,
        ),
        ArbConfig(
            name="small",
            embed_dim=192,
            width=512,
            num_layers=6,
            num_heads=8,
            head_dim=64,
            rotary_dim=32,
            query_latent=256,
            kv_latent=128,
            shared_inner=1024,
            num_experts=32,
            top_k=2,
            expert_rank=24,
            head_inner=1024,
        ),
        ArbConfig(
            name="r9",
            embed_dim=512,
            width=512,
            num_layers=1,
            num_heads=8,
            head_dim=64,
            rotary_dim=32,
            query_latent=448,
            kv_latent=128,
            shared_inner=2048,
            num_experts=32,
            top_k=2,
            expert_rank=128,
            head_inner=3840,
            num_codes=8192,
            num_hops=2,
            hop_rank=32,
            max_moe_iters=4,
            memory_rows=8280,
            router_inner=128,
            video_latent=16_384,
            talker_tokens=289,
        ),
        ArbConfig(
            name="r11",
            embed_dim=384,
            width=3072,
            num_layers=1,
            num_heads=8,
            head_dim=128,
            rotary_dim=64,
            query_latent=256,
            kv_latent=64,
            shared_inner=21_216,
            num_experts=32,
            top_k=4,
            expert_rank=1192,
            head_inner=336,
            num_codes=34_108,
            num_hops=2,
            hop_rank=24,
            max_moe_iters=4,
            memory_rows=216_185,
            memory_dim=512,
            image_features=384,
            image_codes=8192,
            audio_features=416,
            audio_codes=16_384,
            router_inner=256,
            video_latent=16_384,
            talker_tokens=289,
        ),
        ArbConfig(
            name="r12",
            embed_dim=384,
            width=3072,
            num_layers=1,
            num_heads=8,
            head_dim=128,
            rotary_dim=64,
            query_latent=256,
            kv_latent=64,
            shared_inner=21_216,
            num_experts=32,
            top_k=2,
            expert_rank=1192,
            head_inner=336,
            num_codes=34_108,
            num_hops=2,
            hop_rank=24,
            max_moe_iters=4,
            router_inner=256,
            video_latent=16_384,
            talker_tokens=289,
        ),
        ArbConfig(
            name="r14",
            embed_dim=1536,
            width=7168,
            num_layers=4,
            num_heads=128,
            head_dim=128,
            rotary_dim=64,
            query_latent=3080,
            kv_latent=512,
            shared_inner=2688,
            num_experts=32,
            top_k=2,
            expert_rank=72,
            head_inner=29_052,
            num_codes=10_000_000,
            num_hops=2,
            hop_rank=128,
            max_moe_iters=4,
            memory_rows=506,
            composite_codes=5_000_000,
            router_inner=1792,
            video_latent=4096,
            talker_tokens=289,
        ),
    )
}
"""Configurations by name. `tiny` is for tests and the demo, and trains in minutes on a CPU. `small` is the learning benchmark. `r9`
to `r14` are the models of REFACTOR9, 11, 12 and 14."""


def preset(name: str) -> ArbConfig:
    """Return the preset of that name; raise ValueError if there is none."""
    if isinstance(name, str) and name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset is {name!r}, but must be one of {', '.join(map(repr, PRESETS))}{meant}")
    checks.one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]
