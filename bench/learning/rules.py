"""The rules that are compared, each as an op set that the graph runs on, and what it keeps between steps.

The integer rules are the product's own: its ops on its weights. The float rules answer the same calls with dense matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.training.schedule import GAIN
from arbitor.reference.config import SIGN_VOTES
from arbitor.reference.constants import DEFAULT_GROUP_SIZE, groups_per_row
from bench.learning.dense import DenseOps, DenseWeight

FLOAT_BYTES = 16
"""What mixed precision with AdamW keeps for a weight: bfloat16 value and gradient, float32 master and two moments."""


MUON_BYTES = 12
"""The same with Muon, which keeps one moment."""


@dataclass(frozen=True)
class Rule:
    """A way to train.

    Attributes:
        kind:   `integer`, `float` or `straight-through`.
        rate:   learning rate of AdamW and Muon, or for integers the gain of the schedule, in parts of theta.
        decay:  share of the steps, at the end, over which the rate falls to 0; None for the product's, which the length decides.
        config: fields of the model's configuration that differ from the preset's.
        muon:   whether Muon moves the matrices, with steps as large as AdamW's.
        groups: whether straight-through weights have a scale for each group of columns, as ours do, not one for a matrix.
    """

    kind: str
    rate: float
    decay: float | None = 0.4
    config: Mapping[str, Any] = field(default_factory=dict)
    muon: bool = False
    groups: bool = False


FIXED_SCALES = {"exponent_rule": "frozen", "mantissa_bits": 0}
"""Scales that stay the powers of two that they start as."""

RULES: Mapping[str, Rule] = {
    "integer": Rule("integer", GAIN, None),
    "averaged": Rule("integer", GAIN, None, {"average_gradients": True}),
    "long averaged": Rule("integer", GAIN / 4, None, {"average_gradients": True, "average_memory": 3}),
    "fixed scales": Rule("integer", GAIN, None, FIXED_SCALES),
    "rows alone": Rule("integer", 1.25 / 16, 0.4, {"theta": 16, "orthogonal_steps": 0, **FIXED_SCALES}),
    "sign": Rule("integer", 1 / 32, 0.4, SIGN_VOTES),
    "straight-through": Rule("straight-through", 2e-3),
    "straight-through Muon": Rule("straight-through", 2e-3, muon=True),
    "straight-through groups": Rule("straight-through", 2e-3, groups=True),
    "float AdamW": Rule("float", 1.5e-3),
    "float Muon": Rule("float", 2e-3, muon=True),
}
"""Rules by name: the default of every preset; the same with a running mean of gradients; the same with a mean of a longer memory at
a quarter of the rate; the default without votes on scales; stochastic votes of plain gradients with coarse counters; the seeds'
votes, whose `rate` says only that they are cast, as large as the loss of the step before says; float latent weights behind ternary
ones, and float weights, each with AdamW and with Muon; and with AdamW float latent weights behind ternary ones that have as many
scales as ours."""


class GaussianSpec:
    """A float weight in the making: what `FloatOps.initial_weight` gives to `FloatOps.from_spec`."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def with_mantissa(self, mantissa_bits: int) -> GaussianSpec:
        """Return the same: floats have a mantissa."""
        return self


class FloatOps(DenseOps):
    """Float weights that start Gaussian, with the standard deviation that the ternary ones start with."""

    def initial_weight(  # type: ignore[override]
        self, shape: tuple[int, int], *, std: float, seed: int, tensor_id: int, group_size: int, device: Any
    ) -> GaussianSpec:
        generator = torch.Generator().manual_seed((seed << 20) + tensor_id)
        return GaussianSpec((torch.randn(shape, generator=generator) * std).to(device))

    def refresh(self) -> None:
        """Make the copies that are computed with from the masters."""
        for weight in self.weights:
            weight.value.copy_(self.value_of(weight.master.detach()))

    def value_of(self, master: Tensor) -> Tensor:
        """Return what a master is computed with."""
        return master

    def floats_of(self, weight: Any) -> Tensor:
        return weight.values if isinstance(weight, GaussianSpec) else super().floats_of(weight)

    def from_spec(self, weight: Any) -> DenseWeight:
        made = super().from_spec(weight)
        made.value.copy_(self.value_of(made.master.detach()))
        return made


class StraightThroughOps(FloatOps):
    """Float latent weights, ternary in every product; gradients pass as if they were not (BitNet b1.58)."""

    def value_of(self, master: Tensor) -> Tensor:
        return _ternary(master, master.abs().mean())


class GroupedStraightThroughOps(FloatOps):
    """The same with a scale for each group of columns of a row, the mean of the sizes of its weights."""

    def value_of(self, master: Tensor) -> Tensor:
        groups = master.split(DEFAULT_GROUP_SIZE, dim=1)
        return torch.cat([_ternary(group, group.abs().mean(dim=1, keepdim=True)) for group in groups], dim=1)


def _ternary(master: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest of -scale, 0 and scale."""
    scale = scale.clamp(min=1e-8)
    return (master / scale).round().clamp(-1, 1) * scale


def integer_bytes(weights: Mapping[str, Any]) -> float:
    """Return the bytes of training state of ternary weights, in canonical form."""
    total = 0.0
    for weight in weights.values():
        rows, columns = weight.shape
        total += math.ceil(rows * columns / 5) + rows * columns
        total += 2 * rows * groups_per_row(columns, weight.group_size)
    return total
