"""What a model is made of: weights, bytes and floats, by area. Built on the meta device, so it needs no memory.

A weight of N rows and K columns has a canonical state of ceil(N K / 5) + N K + 2 N ceil(K / G) bytes: packed trits, one
accumulator a trit, and an exponent with its accumulator a group of G. At G = 12 that is 1/5 + 1 + 1/6 bytes a weight where
K is a multiple of 12.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn

from arbitor.reference.config import ArbConfig
from arbitor.reference.graph.model import ArbModel
from arbitor.reference.types import TernaryWeight

AREA_OF = {
    "embedding": "embedding and sequencer",
    "sequencer": "embedding and sequencer",
    "attention_norm": "attention",
    "attention": "attention",
    "moe_norm": "mixture of experts",
    "moe": "mixture of experts",
    "byte_head": "byte head",
}
"""Area of a module by its name in the model, the place of a layer left out. Areas are listed in this order."""


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
class AuditReport:
    """What a model is made of.

    Fields:
        config_name:            name of the configuration.
        areas:                  parts of the model, in the order of the graph.
        trainable_float_params: elements of floating-point parameters: 0.
        float_buffers:          elements of floating-point buffers: 0.
    """

    config_name: str
    areas: tuple[AuditArea, ...]
    trainable_float_params: int
    float_buffers: int

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

    def to_json(self) -> str:
        """Return the report with its totals as a JSON object."""
        totals = {
            "weights": self.weights,
            "canonical_bytes": self.canonical_bytes,
            "resident_bytes": self.resident_bytes,
        }
        return json.dumps({**asdict(self), **totals}, indent=2) + "\n"


def audit(config: ArbConfig, *, resident_bytes: Callable[[TernaryWeight], int] | None = None) -> AuditReport:
    """Return what a model of this configuration is made of.

    Args:
        config: the configuration.
        resident_bytes: bytes that an op set's layout takes for a weight given in canonical form on the meta device; the
            canonical bytes when None, which is what the reference holds.
    """
    model = ArbModel(config, device="meta")
    weights, canonical, resident = ({area: 0 for area in AREA_OF.values()} for _ in range(3))
    for name, weight in model.weights().items():
        area = area_of(name)
        weights[area] += weight.shape[0] * weight.shape[1]
        canonical[area] += weight.state_bytes
        resident[area] += resident_bytes(weight) if resident_bytes else weight.state_bytes
    float_params, float_buffers = count_floats(model)
    return AuditReport(
        config_name=config.name,
        areas=tuple(AuditArea(area, weights[area], canonical[area], resident[area]) for area in weights),
        trainable_float_params=float_params,
        float_buffers=float_buffers,
    )


def area_of(weight_name: str) -> str:
    """Return the area of a weight by its name in the model; raises ValueError for a module that belongs to none."""
    for part in weight_name.split("."):
        if part in AREA_OF:
            return AREA_OF[part]
    raise ValueError(f"weight_name is {weight_name!r}, but must name a module of {', '.join(AREA_OF)}")


def count_floats(model: nn.Module) -> tuple[int, int]:
    """Return the elements of the model's trainable floating-point parameters, and of its floating-point buffers."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad and p.is_floating_point())
    return parameters, sum(b.numel() for b in model.buffers() if b.is_floating_point())
