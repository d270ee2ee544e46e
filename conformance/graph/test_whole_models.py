"""Whole models on the op set under test: what they compute is no worse, and one vote and step leaves the same bits.

The structures are those of the presets, at widths that a test can afford: every layer, hop, turn, head and table that a preset has.
Legend: B batch, T bytes, N patches or frames, F features.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training.runtime import deterministic
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from conformance.compare import exact, model_no_worse
from conformance.graph import models
from conformance.graph.replay import recording, replaying
from conformance.report import needs_cuda
from conformance.subject import Subject

STRUCTURE = ("use_moe", "motif_residual", "code_search", "num_hops", "max_moe_iters", "video_steps", "top_k")
"""Fields that a reduced model shares with its preset; of the others it has the nano model's, or 0 as its preset."""

MOST_LAYERS, EXPERTS = 2, 6

LOW_THRESHOLDS = {"theta": 5, "theta_e": 1}
"""So that a step or two move trits and exponents."""


WIDE = replace(models.WHOLE, width=36)
"""The nano model of every module, with matrices wide enough to be made orthogonal."""


def reduced(config: ArbConfig) -> ArbConfig:
    """Return the structure of a configuration at the widths of the nano model."""
    sizes = {
        field.name: getattr(WIDE, field.name) if getattr(config, field.name) else 0
        for field in fields(ArbConfig)
        if isinstance(getattr(config, field.name), int) and field.name not in (*STRUCTURE, *LOW_THRESHOLDS)
    }
    sizes |= {"num_layers": min(config.num_layers, MOST_LAYERS), "num_experts": EXPERTS}
    return replace(config, **sizes, **LOW_THRESHOLDS)


CONFIGS = {
    "every module, one layer": replace(WIDE, num_layers=1, **LOW_THRESHOLDS),
    **{f"{name}, reduced": reduced(config) for name, config in PRESETS.items()},
    "tiny": replace(PRESETS["tiny"], **LOW_THRESHOLDS),
}
"""Models by what they show. The interpreter has time for the first alone."""


def the_config(subject: Subject, name: str) -> ArbConfig:
    """Return a configuration, or leave the test out where it would take minutes."""
    if name != next(iter(CONFIGS)):
        needs_cuda(subject, f"the whole model {name}")
    return CONFIGS[name]


def media(config: ArbConfig, device: torch.device) -> dict[str, Tensor]:
    """Return features of an image and of audio where a model takes them, float32 [B, N, F]."""
    rng = torch.Generator().manual_seed(5)
    made = {}
    for kind, count in (("image", 4), ("audio", 5)):
        if width := getattr(config, f"{kind}_features"):
            made[f"{kind}_BNF"] = torch.randn(2, count, width, generator=rng).to(device)
    return made


def build(config: ArbConfig, ops: Any, device: torch.device | str, **options: Any) -> ArbModel:
    return ArbModel(config, ops=ops, device=device, seed=3, **options)


def trained_once(model: ArbModel, *, step: int, length: int = 8) -> None:
    """Run one training step."""
    device = model.voting.faults.device
    ids_BT = models.random_ids(2, length, seed=step).to(device)
    losses = model.losses(ids_BT, **media(model.config, device))
    assert model.backward(losses, rate=models.RATE, step=step)
    model.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_no_worse(subject: Subject, name: str) -> None:
    """The stream, the losses of the codebooks, and what every head makes of it. Proposals are compared in test_composite.py."""
    config = the_config(subject, name)
    wide = outputs_of(config, reference_ops, torch.device("cpu"), torch.float64)
    twin = outputs_of(config, reference_ops, subject.device, torch.float32)
    got = outputs_of(config, subject.ops, subject.device, torch.float32)
    model_no_worse(got, twin=twin, wide=wide)


def outputs_of(config: ArbConfig, ops: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a fresh model computes, by name, on the CPU."""
    model = build(config, ops, device, dtype=dtype)
    features = {kind: value.to(dtype) for kind, value in media(config, device).items()}
    with torch.no_grad():
        trunk = model.trunk(models.random_ids(2, 8).to(device), **features)
        h_BPD = trunk.h_BPD
        outputs = {"stream": h_BPD, **trunk.losses, "bytes": model.byte_head(h_BPD)}
        if model.router is not None:
            outputs["router"] = model.router(h_BPD)
        if model.video_head is not None:
            outputs["video"] = model.video_head(h_BPD)
        if model.talker_head is not None:
            outputs["talker"] = model.talker_head.token_logits(h_BPD)
    return {name: value.cpu() for name, value in outputs.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_leaves_the_same_bits(subject: Subject, name: str) -> None:
    """Weights, accumulators and integer tables, after one step that starts with neighbours and composites in place."""
    config = the_config(subject, name)
    before = build(config, reference_ops, "cpu")
    for step in range(3):
        trained_once(before, step=step, length=120)
    start = {key: value.clone() for key, value in before.state().items()}
    calls: list[Any] = []
    after = []
    for ops, device in (
        (recording(reference_ops, calls), torch.device("cpu")),
        (replaying(subject.ops, calls), subject.device),
    ):
        model = build(config, ops, device)
        model.load_state(start)
        trained_once(model, step=3)
        after.append({key: value.to("cpu") for key, value in model.state().items()})
    assert any(name == "orthogonalize" for name, _ in calls), "no gradient was made orthogonal"
    assert list(after[0]) == list(after[1])
    for key, want in after[0].items():
        exact(after[1][key], want, key)
    moved = [key for key in before.weights() if (after[0][key].exponents != start[key].exponents).any()]
    assert len(moved) > 2, f"scales moved in {moved} alone"
    unmoved = [key for key, value in after[0].items() if same(value, start[key])]
    frozen = {key for key, module in before.ternary_modules().items() if module.frozen}
    assert set(unmoved) <= frozen | set(still(before)), f"nothing moved in {unmoved}"


def same(value: Any, other: Any) -> bool:
    """Return whether two pieces of state are equal."""
    try:
        exact(value, other)
    except AssertionError:
        return False
    return True


def still(model: ArbModel) -> list[str]:
    """Return the state that a step on bytes has no reason to change: heads without a loss, and tables that are constant."""
    heads = ("router.", "video_head.", "talker_head.")
    return [key for key in model.state() if key.startswith(heads) or key.endswith("leak_shifts")]


def test_two_runs_leave_the_same_bits(subject: Subject) -> None:
    """Every module trains under torch's deterministic algorithms, to the same state each time."""
    needs_cuda(subject, "two runs of a whole model")
    states = []
    with deterministic():
        for _ in range(2):
            model = build(reduced(PRESETS["tiny"]), subject.ops, subject.device, dtype=torch.bfloat16)
            for step in range(3):
                trained_once(model, step=step)
            states.append(model.state())
    for key, want in states[0].items():
        exact(states[1][key], want, key)
