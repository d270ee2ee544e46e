"""The audit has the figures of a real model counted element by element, and needs no memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arbitor.reference.audit import AUDIO_ENCODER, EDGE_SIGNS, AuditTable, area_of, audit, count_floats
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.composite import COMPOSITES_PER_CODE
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.presets import PRESETS, preset
from arbitor.reference.seeds.inventory import inventory
from conformance.graph.models import NANO, WHOLE


@pytest.mark.parametrize(
    "config",
    [NANO, replace(NANO, group_size=6, expert_rank=7), WHOLE, preset("tiny")],
    ids=["nano", "nano in groups of 6", "whole", "tiny"],
)
def test_figures_are_those_of_a_real_model(config: ArbConfig) -> None:
    report, model = audit(config), ArbModel(config)
    counted: dict[str, tuple[int, int]] = {}
    for name, module in model.ternary_modules().items():
        state = module.weight.tensors().values()
        num_bytes = sum(len(tensor.numpy().tobytes()) for tensor in state)
        weights, total = counted.get(area_of(name), (0, 0))
        counted[area_of(name)] = (weights + math.prod(trits_of(module.weight).shape), total + num_bytes)
    parts = [area for area in (*report.areas, *report.apart) if area.name != AUDIO_ENCODER]
    assert {area.name: (area.weights, area.canonical_bytes) for area in parts} == counted
    tables = sum(table.nbytes for table in model.tables().values())
    assert sum(t.bytes for t in report.tables if not t.name.startswith(AUDIO_ENCODER)) == tables
    assert sum(area.resident_bytes for area in parts) + tables == sum(b.nbytes for b in model.buffers())
    assert (report.trainable_float_params, report.float_buffers) == (0, 0)


def test_what_the_seeds_do_not_count_is_in_no_total() -> None:
    report = audit(WHOLE)
    assert {area.name: area.weights for area in report.apart} == {
        EDGE_SIGNS: 70 * (WHOLE.num_neighbours + COMPOSITES_PER_CODE),
        AUDIO_ENCODER: 404_864,
    }
    assert report.weights == sum(area.weights for area in report.areas)
    assert not audit(NANO).apart


def test_tables_are_named_with_their_type_and_shape() -> None:
    tables = {table.name: table for table in audit(WHOLE).tables}
    assert tables["graph.edges.neighbours"] == AuditTable(
        "graph.edges.neighbours", "int32", (70, 3), 70 * 3 * 4
    )
    assert tables["shared_vq.bridge.tables.text.usage"].bytes == 40 * 2
    assert tables["AudioVQEncoder.codebook.usage"].dtype == "int16"
    assert {table.name for table in audit(NANO).tables} == {
        f"layers.{i}.moe_graph.moe.{table}" for i in range(NANO.num_layers) for table in ("load", "handicap")
    }


@pytest.mark.parametrize("config", [WHOLE, NANO, *PRESETS.values()], ids=lambda config: config.name)
def test_areas_are_those_of_the_closed_form(config: ArbConfig) -> None:
    counted = {area: weights for area, weights in inventory(config).items() if weights}
    assert {area.name: area.weights for area in audit(config).areas} == counted


def test_bytes_follow_the_formula() -> None:
    """The bytes are worked out by hand: 1/5 + 1 + 2/12 a weight where every K is a multiple of 12 and every N * K of 5."""
    report = audit(replace(NANO, embed_dim=12))
    table = 297 * 12
    project, norm = 24 * 36, 24
    expected = sum(
        math.ceil(n * k / 5) + n * k + 2 * n * (k // 12) for n, k in ((297, 12), (24, 36), (1, 24))
    )
    area = report.areas[0]
    assert (area.name, area.weights, area.canonical_bytes) == (
        "embedding + text sequencer",
        table + project + norm,
        expected,
    )


def test_resident_bytes_are_those_of_a_layout() -> None:
    report = audit(NANO, resident_bytes=lambda weight: 4 * weight.shape[0])
    rows = sum(weight.shape[0] for weight in ArbModel(NANO, device="meta").weights().values())
    assert report.resident_bytes == 4 * rows
    assert report.canonical_bytes == audit(NANO).canonical_bytes


class Made(TorchDispatchMode):
    """Counts the bytes of the tensors that ops make, but for those on the meta device, which are of no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.bytes += sum(
            each.nbytes for each in tree_leaves(result) if isinstance(each, Tensor) and not each.is_meta
        )
        return result


def test_billions_of_weights_are_never_made() -> None:
    with Made() as made:
        report = audit(preset("r14"))
    assert report.weights > 3_000_000_000
    assert report.canonical_bytes / report.weights == pytest.approx(1 / 5 + 1 + 2 / 12, rel=0.01)
    assert 0 < made.bytes < 2**20


def test_json_holds_the_totals() -> None:
    report = audit(NANO)
    values = json.loads(report.to_json())
    assert values["weights"] == sum(area["weights"] for area in values["areas"]) == report.weights
    assert values["canonical_bytes"] == report.canonical_bytes
    assert values["table_bytes"] == sum(table["bytes"] for table in values["tables"]) == report.table_bytes
    assert values["figures"] == []


def test_floats_would_be_counted() -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("scale", torch.ones(5))
    module.register_buffer("steps", torch.ones(7, dtype=torch.int64))
    assert count_floats(module) == (8, 5)


def test_a_module_without_an_area_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_name is 'sidecar.table'"):
        area_of("sidecar.table")
