"""The audit of a model: its weights, bytes and floats, by area. The model is built on the meta device, so it needs no memory.

A weight of N rows and K columns has a canonical state of ceil(N K / 5) + N K + 2 N ceil(K / G) bytes. These are the packed trits,
an accumulator for each trit, and an exponent with its accumulator for each group of G. At G = 12 they are 1/5 + 1 + 1/6 bytes a
weight if K is a multiple of 12.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph.audio import AudioVQEncoder
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.model import ArbModel
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.tables import TableModule
from arbitor.reference.seeds import inventory as areas
from arbitor.reference.seeds.figures import (
    AUDIO_ENCODER,
    GRAPH_VOCABULARY,
    MIB,
    SIDECARS,
    TOTAL,
    TOTAL_MIB,
    VIDEO_HEAD,
    SeedFigure,
    seed_figures,
)
from arbitor.reference.types import TernaryWeight

EDGE_SIGNS = "edge signs"
"""Area of the signs of edges."""

AREA_OF = {
    "embedding": areas.EMBEDDING,
    "sequencer": areas.EMBEDDING,
    "shared_vq": areas.SHARED_VQ,
    "edges": EDGE_SIGNS,
    "graph": areas.MOE_GRAPH,
    "moe_graph": areas.MOE_GRAPH,
    "composite": areas.COMPOSITE,
    "router": areas.ROUTER,
    "byte_head": areas.BYTE_HEAD,
    "video_head": areas.MEDIA_HEADS,
    "talker_head": areas.MEDIA_HEADS,
    "attention_norm": areas.ATTENTION,
    "attention": areas.ATTENTION,
    "image_sequencer": areas.MEDIA,
    "audio_sequencer": areas.MEDIA,
    "memory": areas.MEMORY,
    AUDIO_ENCODER: AUDIO_ENCODER,
}
"""Area of a module by its name in the model: REFACTOR14's areas in its order, then those that its table does not have."""

APART = (EDGE_SIGNS, AUDIO_ENCODER)
"""Areas that no total holds. To the seeds the sign of an edge is an attribute of the edge, not a weight. The audio encoder makes
targets for the talker head, and no forward pass of the model goes through it."""


@dataclass(frozen=True)
class AuditArea:
    """One part of a model.

    Fields:
        name:            one of the values of AREA_OF.
        weights:         ternary weights, frozen ones included.
        canonical_bytes: training state as a checkpoint holds it.
        resident_bytes:  training state as the op set holds it in memory.
    """

    name: str
    weights: int
    canonical_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class AuditTable:
    """An integer table beside the weights: counters of use, neighbours, scores, strengths, loads.

    Fields:
        name:  place of the table in the model.
        dtype: `int8`, `int16`, ...
        shape: sizes of the table.
        bytes: bytes of the table, in a checkpoint and in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class ComparedFigure:
    """A figure of a seed beside ours.

    Fields:
        what:       `what` of the SeedFigure.
        seed:       the figure as the seed gives it.
        ours:       weights, MiB, or ids.
        difference: ours less the seed's, in the same unit.
        agrees:     whether ours, rounded as the seed rounds, is the seed's.
        source:     which seed.
    """

    what: str
    seed: float
    ours: float
    difference: float
    agrees: bool
    source: str


@dataclass(frozen=True)
class AuditReport:
    """The audit of one model.

    Fields:
        config_name:            name of the configuration.
        areas:                  parts of the model, in the order of AREA_OF.
        apart:                  ternary state that the totals leave out, see APART.
        tables:                 integer tables, in the order of the graph; the totals leave them out too.
        trainable_float_params: elements of floating-point parameters: 0.
        float_buffers:          elements of floating-point buffers: 0.
        figures:                what a seed reports of this configuration, beside ours; empty if no seed does.
    """

    config_name: str
    areas: tuple[AuditArea, ...]
    apart: tuple[AuditArea, ...]
    tables: tuple[AuditTable, ...]
    trainable_float_params: int
    float_buffers: int
    figures: tuple[ComparedFigure, ...] = ()

    @property
    def weights(self) -> int:
        """Ternary weights of all areas."""
        return sum(area.weights for area in self.areas)

    @property
    def canonical_bytes(self) -> int:
        """Canonical training state of all areas, in bytes."""
        return sum(area.canonical_bytes for area in self.areas)

    @property
    def resident_bytes(self) -> int:
        """Training state of all areas in memory, in bytes."""
        return sum(area.resident_bytes for area in self.areas)

    @property
    def table_bytes(self) -> int:
        """Integer tables, in bytes."""
        return sum(table.bytes for table in self.tables)

    def to_json(self) -> str:
        """Return the report with its totals as a JSON object."""
        names = ("weights", "canonical_bytes", "resident_bytes", "table_bytes")
        return json.dumps({**asdict(self), **{name: getattr(self, name) for name in names}}, indent=2) + "\n"


def audit(
    config: ArbConfig,
    *,
    resident_bytes: Callable[[TernaryWeight], int] | None = None,
    sidecar_mib: float = 0.0,
) -> AuditReport:
    """Return the audit of a model of this configuration.

    Args:
        config: the configuration.
        resident_bytes: function from a weight in canonical form on the meta device to the bytes that an op set's layout takes
            for it. None counts canonical bytes, which the reference holds.
        sidecar_mib: MiB of the frozen encoders beside the model, as REFACTOR11 counts them.
    """
    modules: dict[str, nn.Module] = {"": ArbModel(config, device="meta")}
    if config.talker_tokens:
        context = GraphContext(reference_ops, config, device="meta", dtype=torch.float32, seed=0)
        modules[AUDIO_ENCODER] = AudioVQEncoder(context)
    names = tuple(dict.fromkeys(AREA_OF.values()))
    weights, canonical, resident = ({name: 0 for name in names} for _ in range(3))
    video_weights = 0
    tables: list[AuditTable] = []
    for name, module in named_modules(modules):
        if isinstance(module, TernaryModule):
            weight, area = module.ops.to_spec(module.weight), area_of(name)
            weights[area] += weight.shape[0] * weight.shape[1]
            video_weights += weight.shape[0] * weight.shape[1] if name.startswith("video_head.") else 0
            canonical[area] += weight.state_bytes
            resident[area] += resident_bytes(weight) if resident_bytes else weight.state_bytes
        if isinstance(module, TableModule):
            tables += [audited(f"{name}.{table}", tensor) for table, tensor in module.tables().items()]
    parts = tuple(
        AuditArea(name, weights[name], canonical[name], resident[name]) for name in names if weights[name]
    )
    floats = [count_floats(module) for module in modules.values()]
    return AuditReport(
        config_name=config.name,
        areas=tuple(area for area in parts if area.name not in APART),
        apart=tuple(area for area in parts if area.name in APART),
        tables=tuple(tables),
        trainable_float_params=sum(params for params, _ in floats),
        float_buffers=sum(buffers for _, buffers in floats),
        figures=tuple(
            compared(figure, config, parts, video_weights, sidecar_mib) for figure in seed_figures(config)
        ),
    )


def named_modules(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module inside the given modules. Its name is that of the given module, then its own name in there."""
    for outer, module in modules.items():
        for name, inner in module.named_modules():
            yield f"{outer}.{name}".strip("."), inner


def audited(name: str, table: Tensor) -> AuditTable:
    """Return the audit of an integer table."""
    return AuditTable(name, str(table.dtype).removeprefix("torch."), tuple(table.shape), table.nbytes)


def compared(
    figure: SeedFigure,
    config: ArbConfig,
    parts: tuple[AuditArea, ...],
    video_weights: int,
    sidecar_mib: float,
) -> ComparedFigure:
    """Return a seed's figure beside ours. Only the figure of the video head is of less than an area."""
    ours: float
    inside = [area for area in parts if area.name not in APART]
    if figure.what == TOTAL:
        ours = sum(area.weights for area in inside)
    elif figure.what == TOTAL_MIB:
        ours = round(sum(area.canonical_bytes for area in inside) / MIB, 2)
    elif figure.what == VIDEO_HEAD:
        ours = video_weights
    elif figure.what == GRAPH_VOCABULARY:
        ours = config.num_codes + config.image_codes + config.audio_codes
    elif figure.what == SIDECARS:
        ours = round(sidecar_mib, 2)
    else:
        ours = sum(area.weights for area in parts if area.name == figure.what)
    difference = round(ours - figure.value, 2)
    agrees = 2 * abs(difference) <= figure.step
    return ComparedFigure(figure.what, figure.value, ours, difference, agrees, figure.source)


def area_of(weight_name: str) -> str:
    """Return the area of a weight by its name in the model; raise ValueError for a module that belongs to no area."""
    found = [AREA_OF[part] for part in weight_name.split(".") if part in AREA_OF]
    if not found:
        raise ValueError(f"weight_name is {weight_name!r}, but must name a module of {', '.join(AREA_OF)}")
    return EDGE_SIGNS if EDGE_SIGNS in found else found[0]


def count_floats(model: nn.Module) -> tuple[int, int]:
    """Return the elements of the model's trainable floating-point parameters, and of its floating-point buffers."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad and p.is_floating_point())
    return parameters, sum(b.numel() for b in model.buffers() if b.is_floating_point())
