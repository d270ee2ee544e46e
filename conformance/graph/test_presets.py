"""Presets have the weights that the seeds report and the widths that the search finds. Modules can be left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from arbitor.optimized.layouts import resident_bytes
from arbitor.reference.audit import AuditReport, audit
from arbitor.reference.config import MEMORY_ROWS, ArbConfig, with_modules
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.presets import PRESETS, preset
from arbitor.reference.seeds import search as preset_search
from arbitor.reference.seeds.figures import GRAPH_VOCABULARY, MIB, SIDECARS, TOTAL, TOTAL_MIB, seed_figures
from arbitor.reference.seeds.inventory import ATTENTION, BYTE_HEAD, MEMORY, MOE_GRAPH, inventory
from arbitor.reference.seeds.search import SEARCHES
from arbitor.reference.seeds.widths import combinations, cost_of, exactly, nearest, offers, uneven, with_rows
from conformance.graph.models import NANO

TRUNK = {"vq": False, "graph": False}
CORE = {**TRUNK, "moe": False}


def of(name: str, **modules: Any) -> AuditReport:
    return audit(with_modules(preset(name), **modules))


@pytest.mark.parametrize(
    ("name", "modules", "weights"),
    [
        ("r9", {}, 41_087_552),
        ("r11", {}, 1_500_000_000),
        ("r12", {}, 1_268_095_232),
        ("r12", TRUNK, 1_246_223_808 - 3_072),
        ("r12", CORE, 123_996_160 + 148_928),
        ("r14", {}, 3_011_944_672),
    ],
    ids=["r9", "r11", "r12", "r12 without codes", "r12 without experts too", "r14"],
)
def test_weights_are_the_seeds_or_differ_as_the_page_says(
    name: str, modules: dict[str, bool], weights: int
) -> None:
    assert of(name, **modules).weights == weights


@pytest.mark.parametrize(
    ("name", "modules", "seed", "difference"),
    [
        ("r9", {}, 53.65, 0.0),
        ("r11", {}, 1956.05, 0.22),
        ("r12", {}, 1653.68, 0.02),
        ("r12", TRUNK, 1625.12, 0.02),
        ("r12", CORE, 161.61, 0.21),
    ],
)
def test_mebibytes_are_the_seeds_or_differ_as_the_page_says(
    name: str, modules: dict[str, bool], seed: float, difference: float
) -> None:
    assert round(round(of(name, **modules).canonical_bytes / MIB, 2) - seed, 2) == difference


@pytest.mark.parametrize(
    ("area", "millions"),
    [
        ("embedding + text sequencer", 33.5),
        ("shared VQ + VQ bridge", 640.9),
        ("MoEGraph", 429.0),
        ("KG VQ + composite proposal", 329.3),
        ("router", 12.9),
        ("ByteHead", 626.9),
        ("video/talker heads", 112.2),
        ("MLA attention", 826.8),
    ],
)
def test_every_area_of_r14_rounds_to_its_table(area: str, millions: float) -> None:
    weights = {part.name: part.weights for part in of("r14").areas}
    assert round(weights[area] / 1e6, 1) == millions


def test_the_seeds_constants_are_kept() -> None:
    r11, r12, r14 = preset("r11"), preset("r12"), preset("r14")
    assert r11.num_codes + r11.image_codes + r11.audio_codes == 58_684
    for config in (r11, r12):
        assert (config.num_codes, config.shared_inner, config.num_experts) == (34_108, 21_216, 32)
        assert config.max_moe_iters == 4
    assert (r11.top_k, r12.top_k) == (4, 2)
    assert (r14.width, r14.num_codes, r14.composite_codes, r14.code_dim) == (7168, 10**7, 5 * 10**6, 64)
    assert preset("r9").width == 512 and not preset("r9").image_features and not preset("r9").audio_features


def test_tiny_has_every_module() -> None:
    model = ArbModel(preset("tiny"), device="meta")
    assert all(module is not None for module in model.children()) and None not in model._modules.values()
    assert model.config.max_moe_iters > 1 and model.config.num_layers > 1 and model.config.use_moe
    assert of("tiny").weights < 1_000_000


def test_r9_has_the_video_head_and_the_audio_encoder_of_its_seed() -> None:
    config, report = preset("r9"), of("r9")
    without = audit(replace(config, video_latent=0))
    assert report.weights - without.weights == 17_040_896
    assert {area.name: area.weights for area in report.apart}["AudioVQEncoder"] == 404_864


def test_r12_is_r11_without_images_audio_and_memory() -> None:
    off = {"image_features": 0, "image_codes": 0, "audio_features": 0, "audio_codes": 0, "memory_rows": 0}
    assert replace(preset("r11"), name="r12", top_k=2, memory_dim=64, **off) == preset("r12")


@pytest.mark.parametrize("name", SEARCHES)
def test_the_search_finds_the_preset(name: str) -> None:
    assert SEARCHES[name]() == preset(name)


def test_the_script_prints_the_same_each_time() -> None:
    command = [sys.executable, "-m", "arbitor.reference.seeds.search", "--preset", "r9"]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert first.rstrip("\n") == preset_search.described(preset("r9")).rstrip("\n")
    assert "# total: 41,087,552" in first
    shown = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert "widths that the seeds leave open" in shown


def test_the_search_takes_the_cheapest_of_exact_solutions() -> None:
    """Against a plain enumeration of a small space."""
    free = {"head_inner": range(20, 140), "query_latent": range(8, 90)}
    target = sum(inventory(replace(NANO, head_inner=128, query_latent=10)).values())
    by_area = {
        BYTE_HEAD: offers(NANO, BYTE_HEAD, {"head_inner": free["head_inner"]}),
        ATTENTION: offers(NANO, ATTENTION, {"query_latent": free["query_latent"]}),
    }
    found = exactly(NANO, target, by_area)
    solutions = [
        changes
        for changes in combinations(free)
        if sum(inventory(replace(NANO, **changes)).values()) == target
    ]
    assert len(solutions) > 1
    best = min(solutions, key=lambda changes: cost_of(NANO, changes))
    assert found == replace(NANO, **best)


def test_the_search_takes_the_nearest_where_none_is_exact() -> None:
    def count(config: ArbConfig) -> int:
        return inventory(config)[MOE_GRAPH]

    target = count(replace(NANO, expert_rank=9)) + 1
    assert nearest(NANO, count, target, {"expert_rank": range(1, 20)}).expert_rank == 9


def test_rows_are_found_by_division() -> None:
    config = replace(NANO, num_codes=8, memory_rows=37, memory_dim=12)
    target = sum(inventory(config).values())
    assert with_rows(replace(config, memory_rows=30), target, (12,)) == config
    with pytest.raises(ValueError, match="no whole number of rows"):
        with_rows(config, target + 1, (12,))
    with pytest.raises(ValueError, match="no combination of the offers"):
        exactly(config, target + 1, {MEMORY: offers(config, MEMORY, {"memory_rows": (30, 37)})})


@pytest.mark.parametrize(("value", "lacks"), [(64, 0), (192, 0), (96, 1), (80, 2), (72, 3), (65, 6), (7, 0)])
def test_round_numbers_are_multiples_of_powers_of_two(value: int, lacks: int) -> None:
    assert uneven(value) == lacks


RULE = {
    "theta": 64,
    "theta_e": 127,
    "on_flip": "reset",
    "vote_rule": "stochastic",
    "exponent_rule": "score",
    "orthogonal_steps": 3,
    "group_size": 12,
    "mantissa_bits": 2,
}
"""The rule that won (docs/learning.md), field by field."""


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_by_the_rule_that_won(name: str) -> None:
    assert {field: getattr(preset(name), field) for field in RULE} == RULE


@pytest.mark.parametrize("name", PRESETS)
def test_training_keeps_no_more_bytes_than_promised(name: str) -> None:
    """A weight takes 1.37 bytes in canonical form, integer tables apart, and 1.44 on a GPU (docs/spec/layout.md)."""
    report = audit(preset(name), resident_bytes=resident_bytes)
    assert report.canonical_bytes / report.weights < 1.375
    assert report.resident_bytes / report.weights < 1.44


def test_figures_are_shown_with_their_difference() -> None:
    figures = {figure.what: figure for figure in of("r12", **CORE).figures}
    assert (figures[TOTAL].seed, figures[TOTAL].difference, figures[TOTAL].agrees) == (
        123_996_160,
        148_928,
        False,
    )
    assert figures[TOTAL_MIB].source == "REFACTOR12"
    assert all(figure.agrees for name in ("r9", "r14") for figure in of(name).figures)
    assert json.loads(of("r12").to_json())["figures"][0]["ours"] == 1_268_095_232
    others = {figure.what: figure.difference for figure in of("r11").figures[2:]}
    assert others == {GRAPH_VOCABULARY: 0, SIDECARS: -318.80}
    beside = audit(preset("r11"), sidecar_mib=318.8041)
    assert {figure.what: figure.difference for figure in beside.figures}[SIDECARS] == 0


def test_no_figure_is_shown_for_another_configuration() -> None:
    assert not seed_figures(replace(preset("r12"), head_inner=1))
    assert not seed_figures(preset("tiny"))


@pytest.mark.parametrize("name", PRESETS)
def test_modules_can_be_left_out(name: str) -> None:
    config = preset(name)
    assert with_modules(config) == config
    no_vq = with_modules(config, vq=False)
    assert no_vq.num_codes == no_vq.num_hops == no_vq.memory_rows == no_vq.composite_codes == 0
    assert no_vq.image_codes == no_vq.audio_codes == 0
    no_graph = with_modules(config, graph=False)
    assert (no_graph.num_hops, no_graph.composite_codes, no_graph.num_codes) == (0, 0, config.num_codes)
    assert not with_modules(config, moe=False).use_moe
    assert with_modules(config, max_moe_iters=3).max_moe_iters == 3
    assert with_modules(config, memory=False).memory_rows == 0
    if config.num_codes:
        assert with_modules(config, memory=True).memory_rows == (config.memory_rows or MEMORY_ROWS)


@pytest.mark.parametrize("name", PRESETS)
def test_media_can_be_switched_on(name: str) -> None:
    """What a preset lacks is added at the widths of the seeds' sidecars, and what it has stays."""
    config = preset(name)
    whole = with_modules(config, image=True, audio=True, video=True)
    assert whole.image_features == (config.image_features or 384)
    assert whole.audio_features == (config.audio_features or 416)
    codes = (config.image_codes or 8192, config.audio_codes or 16_384) if config.num_codes else (0, 0)
    assert (whole.image_codes, whole.audio_codes) == codes
    assert whole.video_latent == (config.video_latent or 16_384)
    assert whole.router_inner == (config.router_inner or config.width // 4)
    assert with_modules(whole, image=True, audio=True, video=True) == whole
    plain = with_modules(config, vq=False, image=True)
    assert plain.image_features == whole.image_features and plain.image_codes == 0
    assert (plain.audio_features, plain.video_latent) == (config.audio_features, config.video_latent)


def test_memory_without_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_rows is 16384, but must be 0 without num_codes"):
        with_modules(preset("r12"), vq=False, memory=True)


VOTES_AS_IT_IS = {
    "tiny": "byte_head.vocabulary composite.gate graph.adapter_down graph.adapter_up layers.moe_graph.halt "
    "layers.moe_graph.moe.expert_down layers.moe_graph.moe.expert_up layers.moe_graph.moe.router memory.gate memory.output "
    "router.out talker_head.tokens",
    "small": "byte_head.vocabulary layers.moe_graph.moe.expert_down layers.moe_graph.moe.expert_up",
    "r9": "byte_head.vocabulary layers.moe_graph.halt memory.gate router.out talker_head.tokens",
    "r11": "byte_head.vocabulary graph.adapter_down graph.adapter_up layers.moe_graph.halt memory.gate router.out "
    "talker_head.tokens",
    "r12": "byte_head.vocabulary graph.adapter_down graph.adapter_up layers.moe_graph.halt router.out talker_head.tokens",
    "r14": "byte_head.vocabulary composite.gate layers.moe_graph.halt memory.gate router.out talker_head.tokens",
}
"""Linears by preset, without the numbers of layers and hops, whose gradients are not made orthogonal: their rows are classes, or
they are narrow."""


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_is_made_orthogonal(name: str) -> None:
    """Gradients of all other linears are made orthogonal. A new head whose rows are classes must be listed."""
    linears = {
        re.sub(r"\.\d+", "", path): module.orthogonal
        for path, module in ArbModel(preset(name), device="meta").ternary_modules().items()
        if isinstance(module, (TernaryLinear, TernaryGroupedLinear))
    }
    plain = {path for path, orthogonal in linears.items() if not orthogonal}
    assert plain == set(VOTES_AS_IT_IS[name].split())
    assert len(plain) < len(linears) / 2
