"""The train steps that are timed: of which model, how one is taken, and which ops it uses.

Legend: B windows, T bytes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import NUM_BYTES, ArbConfig, with_modules
from arbitor.reference.graph import ArbModel
from arbitor.reference.op_table import Shape
from arbitor.reference.presets import preset
from bench.ablation import full
from bench.inputs import RATE
from bench.learning.learner import EAGER_STEPS, Architecture, Learner
from bench.learning.rules import RULES

TRUNK, EVERY_MODULE, TRANSFORMER = "train_step", "train_step_every_module", "train_step_transformer"
"""Names of the train steps: of the trunk, which a model of float weights can match; of every module; of a plain transformer."""

PRESET_SHAPES: Mapping[str, Shape] = {"tiny": {"B": 16, "T": 128}, "small": {"B": 64, "T": 256}}
"""Windows B of T bytes in a train step, by preset: what `arb train` uses."""

TRANSFORMER_SHAPES: Mapping[str, Shape] = {
    "tiny": {"B": 8, "T": 64, "D": 64, "layers": 1},
    "28.9M": {"B": 64, "T": 256, "D": 768, "layers": 4},
    "303.6M": {"B": 64, "T": 256, "D": 2048, "layers": 6},
}
"""Windows, width and layers of the transformer that `bench.learning` compares rules on, by its number of weights."""

SHAPES: Mapping[str, Mapping[str, Shape]] = {
    TRUNK: PRESET_SHAPES,
    EVERY_MODULE: PRESET_SHAPES,
    TRANSFORMER: TRANSFORMER_SHAPES,
}
"""Shapes of the train steps by name."""


def config_of(name: str, preset_name: str) -> ArbConfig:
    """Return the configuration of a train step: of a preset with every module, or without codes and loop."""
    config = preset(preset_name)
    return full(config) if name == EVERY_MODULE else with_modules(config, vq=False, max_moe_iters=1)


def step_of(name: str, shape: str, ops: ModuleType, ids_BT: Tensor, *, record: bool) -> Callable[[], bool]:
    """Return what takes one step of a train step at one of its shapes; the call says whether the loss was finite.

    Args:
        ops, ids_BT, record: as for `graph_step`.
    """
    if name == TRANSFORMER:
        return transformer_step(TRANSFORMER_SHAPES[shape], ops, ids_BT, record=record)
    return graph_step(config_of(name, shape), ops, ids_BT, record=record)


class _LearnerOn(Learner):
    """A learner of the integer rule on an op set that is given."""

    def __init__(self, ops: ModuleType, architecture: Architecture, *, device: str, record: bool) -> None:
        self.given = ops
        # As the fastest float twin is.
        super().__init__(
            architecture, RULES["integer"], seed=0, device=device, capture=record, compiled=record
        )

    def _op_set(self) -> Any:
        return self.given


def transformer_step(sizes: Shape, ops: ModuleType, ids_BT: Tensor, *, record: bool) -> Callable[[], bool]:
    """Return what takes one step of the byte transformer as `bench.learning` does; arguments as for `graph_step`."""
    learner = _LearnerOn(ops, architecture_of(sizes), device=ids_BT.device.type, record=record)

    @values_vouched_for()
    def step() -> bool:
        # A rate of 1 is the rule's own.
        return math.isfinite(learner.step(ids_BT, 1.0).item())

    if record:
        # The step that is recorded is none of those that are timed.
        for _ in range(EAGER_STEPS + 1):
            step()
    return step


def weights_of(sizes: Shape) -> int:
    """Return the number of weights of the byte transformer of some sizes: of its layers, both tables and the head."""
    width = sizes["D"]
    return 12 * sizes["layers"] * width**2 + (2 * NUM_BYTES + sizes["T"]) * width


def architecture_of(sizes: Shape) -> Architecture:
    """Return the byte transformer of some sizes."""
    return Architecture(
        "transformer", width=sizes["D"], num_layers=sizes["layers"], context=sizes["T"], batch=sizes["B"]
    )


def graph_step(config: ArbConfig, ops: ModuleType, ids_BT: Tensor, *, record: bool) -> Callable[[], bool]:
    """Return what takes one step of training as the trainer does; the call says whether the loss was finite.

    Args:
        config: the model, in bfloat16 on a GPU and in float32 on a CPU.
        ops:    the op set.
        ids_BT: int64 [B, T], on the device of the model.
        record: whether passes are recorded in CUDA graphs and replayed.
    """
    dtype = torch.bfloat16 if ids_BT.device.type == "cuda" else torch.float32
    model = ArbModel(config, ops=ops, device=ids_BT.device, dtype=dtype, seed=0)
    passes = RecordedPasses(model) if record else Passes(model)
    taken = count()

    @values_vouched_for()
    def step() -> bool:
        if passes.take(ids_BT, rate=RATE, step=next(taken)) is None:
            return False
        passes.step()
        return True

    return step


@cache
def ops_of(name: str) -> tuple[str, ...]:
    """Return the ops that a train step uses, in the order of their names: those seen in one small step of the reference."""
    sizes = (8, 64) if name == TRANSFORMER else (1, 8)
    ids_BT = torch.randint(0, NUM_BYTES, sizes, generator=torch.Generator().manual_seed(0))
    return tuple(sorted(ops_seen(name, ids_BT, steps=1)))


def ops_seen(name: str, ids_BT: Tensor, *, steps: int) -> set[str]:
    """Return the ops that some train steps of the tiny shape call. Making the model is no part of them."""
    seen: set[str] = set()

    def watched(op: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add(op)
            return getattr(reference_ops, op)(*args, **kwargs)

        return call

    ops = ModuleType("watched_ops")
    ops.__dict__.update({op: watched(op) for op in reference_ops.__all__})
    step = step_of(name, "tiny", ops, ids_BT, record=False)
    seen.clear()
    for _ in range(steps):
        if not step():
            raise RuntimeError(
                "the loss of a small train step is not finite, so the ops that it uses are not known"
            )
    return seen
