"""The train steps that are timed: of which model, how one is taken, and which ops it uses.

Legend: B windows, T bytes.
"""

from __future__ import annotations

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

TRUNK, EVERY_MODULE = "train_step", "train_step_every_module"
"""Names of the train steps: of what a model of float weights can match, and of every module."""

SHAPES: Mapping[str, Shape] = {"tiny": {"B": 16, "T": 128}, "small": {"B": 64, "T": 256}}
"""Windows B of T bytes in a train step, by preset: what `arb train` uses."""


def config_of(name: str, preset_name: str) -> ArbConfig:
    """Return the configuration of a train step: of a preset with every module, or without codes and loop."""
    config = preset(preset_name)
    return full(config) if name == EVERY_MODULE else with_modules(config, vq=False, max_moe_iters=1)


def step_of(config: ArbConfig, ops: ModuleType, ids_BT: Tensor, *, record: bool) -> Callable[[], bool]:
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
        model.step()
        return True

    return step


@cache
def ops_of(name: str) -> tuple[str, ...]:
    """Return the ops that a train step uses, in the order of their names: those seen in one small step of the reference."""
    ids_BT = torch.randint(0, NUM_BYTES, (1, 8), generator=torch.Generator().manual_seed(0))
    return tuple(sorted(ops_seen(config_of(name, "tiny"), ids_BT, steps=1)))


def ops_seen(config: ArbConfig, ids_BT: Tensor, *, steps: int) -> set[str]:
    """Return the ops that some train steps of a model call. Making the model is no part of them."""
    seen: set[str] = set()

    def watched(op: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add(op)
            return getattr(reference_ops, op)(*args, **kwargs)

        return call

    ops = ModuleType("watched_ops")
    ops.__dict__.update({op: watched(op) for op in reference_ops.__all__})
    step = step_of(config, ops, ids_BT, record=False)
    seen.clear()
    for _ in range(steps):
        if not step():
            raise RuntimeError(
                "the loss of a small train step is not finite, so the ops that it uses are not known"
            )
    return seen
