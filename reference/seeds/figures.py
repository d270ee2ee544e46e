"""The figures that the seeds report of the models that the presets r9, r11, r12 and r14 rebuild. The MB of the seeds are MiB."""

from __future__ import annotations

from dataclasses import dataclass

from arbitor.reference.config import ArbConfig, with_modules
from arbitor.reference.presets import PRESETS
from arbitor.reference.seeds import inventory as areas

MIB = 2**20
"""Bytes of a mebibyte, the seeds' unit of state."""

TOTAL = "total"
"""Weights of all areas."""

TOTAL_MIB = "total MiB"
"""Canonical training state of all areas, in MiB."""

AUDIO_ENCODER = "AudioVQEncoder"
"""Weights of the encoder of raw audio, which is no part of the model and is counted apart."""

VIDEO_HEAD = "VideoHead"
"""Weights of the video head alone, which shares an area with the talker head."""


GRAPH_VOCABULARY = "codes of all modalities"
"""Ids of the graph's codes: text, images and audio."""

SIDECARS = "sidecars MiB"
"""MiB of the frozen encoders of other projects, which are no part of a model."""


@dataclass(frozen=True)
class SeedFigure:
    """One figure of a seed.

    Fields:
        what:   TOTAL, TOTAL_MIB, AUDIO_ENCODER, VIDEO_HEAD, GRAPH_VOCABULARY, SIDECARS or the name of an area.
        value:  weights, MiB, or ids.
        step:   unit of the last digit that the seed gives.
        source: which seed.
    """

    what: str
    value: float
    step: float
    source: str


def _exact(what: str, weights: int, source: str) -> SeedFigure:
    return SeedFigure(what, weights, 1, source)


def _mib(value: float, source: str) -> SeedFigure:
    return SeedFigure(TOTAL_MIB, value, 0.01, source)


_R14_MILLIONS = {
    areas.EMBEDDING: 33.5,
    areas.SHARED_VQ: 640.9,
    areas.MOE_GRAPH: 429.0,
    areas.COMPOSITE: 329.3,
    areas.ROUTER: 12.9,
    areas.BYTE_HEAD: 626.9,
    areas.MEDIA_HEADS: 112.2,
    areas.ATTENTION: 826.8,
}
"""REFACTOR14's table, in millions of weights."""

_FIGURES: tuple[tuple[str, dict[str, bool], tuple[SeedFigure, ...]], ...] = (
    (
        "r9",
        {},
        (
            _exact(TOTAL, 41_087_552, "REFACTOR9"),
            _mib(53.65, "REFACTOR9"),
            _exact(VIDEO_HEAD, 17_040_896, "REFACTOR9"),
            _exact(AUDIO_ENCODER, 404_864, "REFACTOR9"),
        ),
    ),
    (
        "r11",
        {},
        (
            _exact(TOTAL, 1_500_000_000, "REFACTOR11"),
            _mib(1956.05, "REFACTOR11"),
            _exact(GRAPH_VOCABULARY, 58_684, "REFACTOR11"),
            SeedFigure(SIDECARS, 318.80, 0.01, "REFACTOR11"),
        ),
    ),
    ("r12", {}, (_exact(TOTAL, 1_268_095_232, "REFACTOR12"), _mib(1653.68, "REFACTOR12"))),
    (
        "r12",
        {"vq": False, "graph": False},
        (_exact(TOTAL, 1_246_223_808, "REFACTOR12"), _mib(1625.12, "REFACTOR12")),
    ),
    (
        "r12",
        {"vq": False, "graph": False, "moe": False},
        (_exact(TOTAL, 123_996_160, "REFACTOR12"), _mib(161.61, "REFACTOR12")),
    ),
    (
        "r14",
        {},
        (
            *(
                SeedFigure(area, round(value * 1e6), 100_000, "REFACTOR14")
                for area, value in _R14_MILLIONS.items()
            ),
            _exact(TOTAL, 3_011_944_672, "REFACTOR15"),
        ),
    ),
)


def seed_figures(config: ArbConfig) -> tuple[SeedFigure, ...]:
    """Return the figures that a seed reports of exactly this configuration; none for a configuration of our own."""
    for name, modules, figures in _FIGURES:
        if name in PRESETS and with_modules(PRESETS[name], **modules) == config:
            return figures
    return ()
