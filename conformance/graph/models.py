"""Small models and watched op sets for the tests of the graph.

Legend: B batch, T bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.types import TernaryWeight
from conformance.subject import MAKERS, Subject

NANO = ArbConfig(
    name="nano",
    embed_dim=10,
    width=24,
    num_layers=2,
    num_heads=2,
    head_dim=12,
    rotary_dim=4,
    query_latent=14,
    kv_latent=12,
    shared_inner=20,
    num_experts=4,
    top_k=2,
    expert_rank=5,
    head_inner=36,
)
"""Every module, with widths that leave ragged groups, in under 20,000 weights."""

WHOLE = replace(
    NANO,
    name="whole",
    num_codes=40,
    code_dim=18,
    num_hops=2,
    hop_rank=6,
    num_neighbours=3,
    max_moe_iters=2,
    window=8,
    block=4,
    num_summaries=2,
    memory_rows=50,
    memory_dim=14,
    composite_codes=30,
    composite_inner=16,
    image_features=10,
    image_codes=20,
    audio_features=7,
    audio_codes=10,
    router_inner=8,
    video_latent=32,
    talker_tokens=9,
)
"""Every module of the graph."""

RATE = 1.25
"""Rate of the votes in these tests."""


def nano(
    *,
    ops: ModuleType = reference_ops,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    **fields: Any,
) -> ArbModel:
    """Return a nano model, with some fields of its config exchanged."""
    return ArbModel(replace(NANO, **fields), ops=ops, device=device, dtype=dtype, seed=seed)


def whole(config: ArbConfig = WHOLE, **options: Any) -> ArbModel:
    """Return a model of every module after two steps, when codes have neighbours and composites."""
    model = ArbModel(config, seed=3, **options)
    device = model.voting.faults.device
    for step in range(2):
        model.backward(model.losses(random_ids(3, 24, seed=step).to(device)), rate=RATE, step=step)
        model.step()
    return model


def random_ids(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Return bytes as ids, int64 [B, T]."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def state_of(model: ArbModel) -> dict[str, TernaryWeight]:
    """Return a copy of all weights."""
    return {name: weight.clone() for name, weight in model.weights().items()}


def changed_tensors(before: dict[str, TernaryWeight], model: ArbModel) -> set[tuple[str, str]]:
    """Return (weight, tensor) of all state that is not as it was."""
    return {
        (name, field)
        for name, weight in model.weights().items()
        for field, tensor in weight.tensors().items()
        if not torch.equal(tensor, before[name].tensors()[field])
    }


def with_ops(ops: Any, exchanged: Mapping[str, Any]) -> ModuleType:
    """Return an op set with some of its ops exchanged."""
    made = ModuleType("exchanged_ops")
    made.__dict__.update({**ops.__dict__, **exchanged, "__name__": made.__name__})
    return made


def ops_with(**overrides: Any) -> ModuleType:
    """Return the reference ops with some of them exchanged."""
    return with_ops(reference_ops, overrides)


def drawn_by_the_reference(ops: Any) -> ModuleType:
    """Return an op set whose weights start as the reference draws them.

    Triton's interpreter takes 0.25 s to draw a weight, which is longer than most tests of the graph. The initial weights
    of an op set are compared with those of the reference elsewhere (test_comparison.py), and `test_outputs_are_no_worse` builds
    a whole model from them.
    """
    return with_ops(ops, {name: getattr(reference_ops, name) for name in MAKERS})


def ops_noting_rates() -> tuple[ModuleType, dict[int, list[float]]]:
    """Return the reference ops, and a mapping that fills with the rates at which each weight votes, by its tensor id."""
    rates: dict[int, list[float]] = {}

    def note(weight: Any, grad: Tensor, rate: float, **kwargs: Any) -> Any:
        rates.setdefault(kwargs["tensor_id"], []).append(rate)
        return reference_ops.accumulate_gradient(weight, grad, rate, **kwargs)

    return ops_with(accumulate_gradient=note), rates


def quick_context(
    *,
    dtype: torch.dtype = torch.float32,
    ops: Any = reference_ops,
    device: torch.device | str = "cpu",
    **fields: Any,
) -> GraphContext:
    """Return a context for parts of a small model, whose weights move after few votes."""
    config = nano(theta=2, theta_e=3, **fields).config
    return GraphContext(ops, config, device=device, dtype=dtype, seed=11)


def integers(*shape: int, seed: int = 0, high: int = 8) -> Tensor:
    """Return floats whose products and sums are exact: whole numbers from -high to high."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).to(torch.float32)


def on(subject: Subject) -> tuple[Any, torch.device]:
    """Return the ops of a subject, with weights that the reference draws, and where they run."""
    return drawn_by_the_reference(subject.ops), subject.device
