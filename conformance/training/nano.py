"""Presets and a text so small that a whole run takes a second, for the tests of the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training.options import PRESET_DEFAULTS
from arbitor.reference.presets import PRESETS
from conformance.graph.models import NANO as GRAPH_NANO
from conformance.graph.models import WHOLE as GRAPH_WHOLE

NANO = replace(GRAPH_NANO, width=36, num_layers=1, num_experts=2, top_k=1)
"""The nano model of the graph's tests with one layer, so that a step takes a few hundredths of a second, and as wide as its byte
head, whose gradients are then made orthogonal."""

MEANS = replace(NANO, average_gradients=True, shared_inner=36, expert_rank=36)
"""The nano model with running means of gradients, of its experts too."""

WHOLE = replace(GRAPH_WHOLE, width=36, num_layers=1)
"""A model of every module, of one layer too."""

NANO_DEFAULTS = {
    "steps": 8,
    "batch": 2,
    "context": 16,
    "eval_interval": 4,
    "save_interval": 3,
    "log_interval": 2,
    "eval_windows": 8,
    "sample_bytes": 8,
}
"""Trainer settings of the presets ``nano``, ``means`` and ``whole``."""

TEXT = b"".join(b"%d squared is %d, and its cube is %d.\n" % (i, i * i, i**3) for i in range(120))
"""About four kilobytes to learn from."""

IDS = torch.tensor([list(b"to be or not to be"), list(b"that is the questi")])
"""Two windows of 18 bytes."""


def register(patch: pytest.MonkeyPatch) -> None:
    """Make ``nano``, ``means`` and ``whole`` presets like any other."""
    for name, config in (("nano", NANO), ("means", MEANS), ("whole", WHOLE)):
        patch.setitem(PRESETS, name, config)
        patch.setitem(PRESET_DEFAULTS, name, NANO_DEFAULTS)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Write a stand-in for each picture: drawing them takes as long as the rest of a run of ``nano``."""
    from arbitor.optimized.training import run

    def stand_in(path: Path, *what: Any, **more: Any) -> None:
        path.write_bytes(b"a picture")

    patch.setattr(run, "plot_loss", stand_in)
    patch.setattr(run, "draw_page", stand_in)
