"""The audit: its figures are those of a real model counted element by element, and it needs no memory."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from arbitor.reference.audit import AREA_OF, area_of, audit, count_floats
from arbitor.reference.config import ArbConfig, preset
from arbitor.reference.graph import ArbModel
from conformance.graph.models import NANO


@pytest.mark.parametrize(
    "config", [NANO, replace(NANO, group_size=6, expert_rank=7), preset("tiny")], ids=lambda c: c.name
)
def test_figures_are_those_of_a_real_model(config: ArbConfig) -> None:
    report, model = audit(config), ArbModel(config)
    counted = dict.fromkeys(AREA_OF.values(), (0, 0))
    for name, module in model.ternary_modules().items():
        tensors = [buffer for _, buffer in module.named_buffers()]
        num_bytes = sum(len(tensor.numpy().tobytes()) for tensor in tensors)
        weights, total = counted[area_of(name)]
        counted[area_of(name)] = (weights + math.prod(module.weight.trits().shape), total + num_bytes)
    assert {area.name: (area.weights, area.canonical_bytes) for area in report.areas} == counted
    assert report.canonical_bytes == report.resident_bytes == sum(b.nbytes for b in model.buffers())
    assert (report.trainable_float_params, report.float_buffers) == (0, 0)


def test_bytes_follow_the_formula() -> None:
    """1/5 + 1 + 2/12 bytes a weight where every K is a multiple of 12 and every N * K of 5; here worked out by hand."""
    report = audit(replace(NANO, embed_dim=12))
    table = 297 * 12
    project, norm = 24 * 36, 24
    expected = sum(
        math.ceil(n * k / 5) + n * k + 2 * n * (k // 12) for n, k in ((297, 12), (24, 36), (1, 24))
    )
    area = report.areas[0]
    assert (area.name, area.weights, area.canonical_bytes) == (
        "embedding and sequencer",
        table + project + norm,
        expected,
    )


def test_resident_bytes_are_those_of_a_layout() -> None:
    report = audit(NANO, resident_bytes=lambda weight: 4 * weight.shape[0])
    rows = sum(weight.shape[0] for weight in ArbModel(NANO, device="meta").weights().values())
    assert report.resident_bytes == 4 * rows
    assert report.canonical_bytes == audit(NANO).canonical_bytes


def test_billions_of_weights_take_seconds() -> None:
    began = time.perf_counter()
    report = audit(replace(preset("small"), width=7168, num_layers=8, shared_inner=21504, head_inner=21504))
    assert report.weights > 4_000_000_000
    assert report.canonical_bytes / report.weights == pytest.approx(1 / 5 + 1 + 2 / 12, rel=1e-3)
    assert time.perf_counter() - began < 10


def test_json_holds_the_totals() -> None:
    report = audit(NANO)
    values = json.loads(report.to_json())
    assert values["weights"] == sum(area["weights"] for area in values["areas"]) == report.weights
    assert values["canonical_bytes"] == report.canonical_bytes


def test_floats_would_be_counted() -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("scale", torch.ones(5))
    module.register_buffer("steps", torch.ones(7, dtype=torch.int64))
    assert count_floats(module) == (8, 5)


def test_a_module_without_an_area_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_name is 'sidecar.table'"):
        area_of("sidecar.table")
