"""Whole models on the op set under test compute no worse, and one vote and step leaves the same bits.

The structures are those of the presets, at widths that a test can afford: every layer, hop, turn, head and table that a preset has.
In float32 two op sets choose the same codes and experts. In bfloat16, in which models train on a GPU, the models choose none.
Legend: B batch, T bytes, N patches or frames, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training.runtime import deterministic
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import SWITCHES, ArbConfig, with_modules
from arbitor.reference.graph import ArbModel, Targets, video
from arbitor.reference.graph.moe import SharedProjectionMoE
from arbitor.reference.graph.router import MODALITIES
from arbitor.reference.graph.ternary_graph import TernaryGraph
from arbitor.reference.presets import PRESETS
from conformance.compare import exact, model_no_worse
from conformance.families import MUTANTS
from conformance.graph import models
from conformance.graph.replay import (
    Calls,
    Own,
    all_alike,
    kind_of,
    orthogonalize_of,
    recording,
    replaying,
)
from conformance.mutant import build as build_mutant
from conformance.subject import Subject, needs_cuda

STRUCTURE = ("num_hops", "max_moe_iters", "video_steps", "top_k")
"""Numbers that a reduced model shares with its preset. It has all others of the nano model, or 0 as its preset."""

MOST_LAYERS, EXPERTS = 2, 6

LOW_THRESHOLDS: dict[str, Any] = {"theta": 5, "theta_e": 1}
"""So that a step or two move trits and exponents."""


WIDE = replace(models.WHOLE, width=36)
"""The nano model of every module, with matrices wide enough to be made orthogonal."""


def reduced(config: ArbConfig) -> ArbConfig:
    """Return the structure of a configuration at the widths of the nano model."""
    unread = {name for switch in SWITCHES if not switch.is_on(config) for name in switch.fields}
    kept = {*STRUCTURE, *LOW_THRESHOLDS, *unread}
    sizes: dict[str, Any] = {
        field.name: getattr(WIDE, field.name) if getattr(config, field.name) else 0
        for field in fields(ArbConfig)
        if type(getattr(config, field.name)) is int and field.name not in kept
    }
    sizes |= {"num_layers": min(config.num_layers, MOST_LAYERS), "num_experts": EXPERTS}
    return replace(config, **sizes, **LOW_THRESHOLDS)


OTHER_PATHS = replace(
    models.NANO,
    name="other_paths",
    width=36,
    num_layers=1,
    shared_inner=36,
    num_experts=3,
    expert_rank=32,
    num_codes=20,
    code_dim=18,
    code_search="candidates",
    sign_bits=2,
    num_probes=2,
    num_hops=2,
    hop_rank=6,
    num_neighbours=3,
    **LOW_THRESHOLDS,
)
"""What no other model here does: so few codes that the nodes of all are computed, searched for in buckets, and experts wide enough
to be made orthogonal."""

CONFIGS = {
    "every module, one layer": replace(WIDE, num_layers=1, **LOW_THRESHOLDS),
    "the other paths": OTHER_PATHS,
    **{f"{name}, reduced": reduced(config) for name, config in PRESETS.items()},
    "tiny": replace(PRESETS["tiny"], **LOW_THRESHOLDS),
}
"""Models by what they show. The interpreter has time for the first alone, and for a step of the second."""

BFLOAT16_CONFIGS = {
    "one layer": replace(
        reduced(PRESETS["small"]), num_layers=1, num_experts=2, top_k=2, dense_dispatch_max_tokens=16
    ),
    "tiny without codes": replace(
        with_modules(PRESETS["tiny"], vq=False),
        image_features=0,
        audio_features=0,
        video_latent=0,
        top_k=PRESETS["tiny"].num_experts,
        **LOW_THRESHOLDS,
    ),
}
"""Models that choose nothing: no codes, every expert, no video that halts. Bfloat16 would choose others than float64, and nothing
that comes after could be compared. The interpreter has time for the first alone, which takes products of all experts."""


def the_config(subject: Subject, configs: dict[str, ArbConfig], name: str, *, first: int = 1) -> ArbConfig:
    """Return a configuration. Skip the test where it would take minutes: all but the first ones need CUDA."""
    if name not in list(configs)[:first]:
        needs_cuda(subject, f"the whole model {name}")
    return configs[name]


def media(config: ArbConfig, device: torch.device) -> dict[str, Tensor]:
    """Return features of an image and of audio where a model takes them, float32 [B, N, F]."""
    rng = torch.Generator().manual_seed(5)
    made = {}
    for kind, count in (("image", 4), ("audio", 5)):
        if width := getattr(config, f"{kind}_features"):
            made[f"{kind}_BNF"] = torch.randn(2, count, width, generator=rng).to(device)
    return made


def answers(config: ArbConfig, device: torch.device) -> Targets | None:
    """Return targets of every head: one sequence is answered by a latent, the other by tokens. None where there is no router."""
    if not config.router_inner:
        return None
    rng = torch.Generator().manual_seed(6)
    heads = {"video": bool(config.video_latent), "audio": bool(config.talker_tokens)}
    answering = [MODALITIES.index(name if heads[name] else "text") for name in heads]
    latent = tokens = None
    if config.video_latent:
        latent = torch.randn(2, config.video_latent, generator=rng).to(device)
    if config.talker_tokens:
        tokens = torch.randint(config.talker_tokens, (2, 5), generator=rng).to(device)
    return Targets(torch.tensor(answering, device=device), latent=latent, tokens_BN=tokens)


def build(config: ArbConfig, ops: Any, device: torch.device | str, **options: Any) -> ArbModel:
    return ArbModel(config, ops=ops, device=device, seed=3, **options)


def losses_of(model: ArbModel, ids_BT: Tensor) -> dict[str, Tensor]:
    """Return the losses of bytes with the media and the targets of the model's configuration."""
    device = model.voting.faults.device
    # What heads add up is further off in bfloat16 than any yardstick of the step.
    taught = model.config not in BFLOAT16_CONFIGS.values()
    targets = answers(model.config, device) if taught else None
    return model.losses(ids_BT.to(device), targets=targets, **media(model.config, device))


def trained_once(model: ArbModel, ids_BT: Tensor, *, step: int) -> None:
    """Run one training step."""
    assert model.backward(losses_of(model, ids_BT), rate=models.RATE, step=step)
    model.step()


def trained_in_two(model: ArbModel, ids_BT: Tensor, *, step: int) -> None:
    """Run one training step of two micro-batches, of which the second one is text alone."""
    more_BT = models.random_ids(2, 9, seed=step).to(model.voting.faults.device)
    assert model.backward(losses_of(model, ids_BT), rate=models.RATE, step=step, accum=2)
    assert model.backward(model.losses(more_BT), rate=models.RATE, step=step + 1, accum=2)
    model.step()


def test_models_take_both_ways_to_their_experts() -> None:
    """In passes of 2 sequences of 8 bytes, as are compared: the chosen experts alone in float32, products of all in bfloat16."""
    for configs, takes_all in ((CONFIGS, False), (BFLOAT16_CONFIGS, True)):
        model = build(next(iter(configs.values())), reference_ops, "cpu")
        ways = {moe.takes_all(16) for moe in model.modules() if isinstance(moe, SharedProjectionMoE)}
        assert ways == {takes_all}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_no_worse(subject: Subject, name: str) -> None:
    """The stream, the losses of the codebooks, and what every head makes of it. Proposals are compared in test_composite.py."""
    config = the_config(subject, CONFIGS, name)
    wide = outputs_of(config, reference_ops, torch.device("cpu"), torch.float64)
    twin = outputs_of(config, reference_ops, subject.device, torch.float32)
    got = outputs_of(config, subject.ops, subject.device, torch.float32)
    model_no_worse(got, twin=twin, wide=wide)


@pytest.mark.parametrize("name", BFLOAT16_CONFIGS)
def test_bfloat16_outputs_are_no_worse(subject: Subject, name: str) -> None:
    """The stream and what every head makes of it, in the dtype of training on a GPU."""
    config = the_config(subject, BFLOAT16_CONFIGS, name)
    wide = outputs_of(config, reference_ops, torch.device("cpu"), torch.float64)
    twin = outputs_of(config, reference_ops, subject.device, torch.bfloat16)
    got = outputs_of(config, models.drawn_by_the_reference(subject.ops), subject.device, torch.bfloat16)
    model_no_worse(got, twin=twin, wide=wide, dtype=torch.bfloat16)


def outputs_of(config: ArbConfig, ops: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a fresh model computes, by name, on the CPU."""
    model = build(config, ops, device, dtype=dtype)
    features: dict[str, Any] = {kind: value.to(dtype) for kind, value in media(config, device).items()}
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


@cache
def trained(config: ArbConfig) -> ArbModel:
    """Return a reference model after three steps, with neighbours and composites in place. It must not be changed."""
    model = build(config, reference_ops, "cpu")
    for step in range(3):
        trained_once(model, models.random_ids(2, 120, seed=step), step=step)
    return model


def again(
    config: ArbConfig, ops: Any, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> ArbModel:
    """Return a new model with the state of `trained`."""
    model = build(config, ops, device, dtype=dtype)
    model.load_state(trained(config).state())
    return model


MOST_SHARE = 0.75
"""The largest share of a token, in the video head, that a step is compared with."""


@cache
def last_bytes(config: ArbConfig) -> Tensor:
    """Return the bytes of the step that is compared, int64 [2, 8]: the first ones for which no token of a latent takes nearly all.

    Where the first share of a softmax is 1 - x, the gradient of its query is a difference that float32 knows to 2**-24 / x. On a
    GPU the reference itself is off by 2**-11 of the norm then.
    """
    tops: list[float] = []
    attended = video.attended

    def watched(q_BD: Tensor, tokens_BPD: Tensor) -> Tensor:
        # The first sequence is the one that a latent answers.
        shares_P = (tokens_BPD[0] @ q_BD[0] / math.sqrt(q_BD.shape[1])).softmax(dim=0)
        tops.append(shares_P.max().item())
        return attended(q_BD, tokens_BPD)

    # Made outside of the block below, as its training takes gradients.
    model = again(config, reference_ops, "cpu")
    for seed in range(3, 200):
        ids_BT = models.random_ids(2, 8, seed=seed)
        tops.clear()
        with torch.no_grad(), mock.patch.object(video, "attended", watched):
            losses_of(model, ids_BT)
        if max(tops, default=0.0) <= MOST_SHARE:
            return ids_BT
    raise AssertionError(f"the video head of {config.name} always looks at one token")


def stepped(
    config: ArbConfig,
    ops: Any,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    take: Callable[..., None] = trained_once,
) -> dict[str, Any]:
    """Return the state, on the CPU, after one more step than `trained`."""
    model = again(config, models.drawn_by_the_reference(ops), device, dtype)
    take(model, last_bytes(config), step=3)
    return {key: value.to("cpu") for key, value in model.state().items()}


@dataclass
class Step:
    """One step on one op set: the state that it leaves, and what it made on the way (replay.py)."""

    state: dict[str, Any]
    own: Own


@cache
def recorded_step(config: ArbConfig, dtype: torch.dtype = torch.float32) -> tuple[Step, Calls]:
    """Return the step of the reference, and what its replayed ops were given. Neither may be changed."""
    calls: Calls = []
    own: Own = {}
    return Step(stepped(config, recording(reference_ops, calls, own), "cpu", dtype), own), calls


@cache
def wide_step(config: ArbConfig, dtype: torch.dtype) -> Step:
    """Return the step of the reference in float64, replayed from its step in another dtype. It must not be changed."""
    _, calls = recorded_step(config, dtype)
    return replayed_step(config, reference_ops, calls, "cpu", torch.float64)


def replayed_step(
    config: ArbConfig,
    ops: Any,
    calls: Calls,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Return the step of an op set whose replayed ops are given what was recorded."""
    own: Own = {}
    return Step(stepped(config, replaying(ops, calls, own), device, dtype), own)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_leaves_the_same_bits(subject: Subject, name: str) -> None:
    """The step leaves the same weights, accumulators and integer tables. On the way all activations and gradients are alike."""
    config = the_config(subject, CONFIGS, name, first=2)
    want, calls = recorded_step(config)
    got = replayed_step(config, subject.ops, calls, subject.device)
    all_alike(got.own, want.own)
    same_state(got.state, want.state)
    assert any(name.startswith("orthogonalize") for name, _ in calls), "no gradient was made orthogonal"
    all_moved(config, want.state, taught=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_two_micro_batches_leaves_the_same_bits(subject: Subject, name: str) -> None:
    """Their gradients are summed, and the sums made orthogonal; the rows of tables vote in each of them."""
    config = the_config(subject, CONFIGS, name)
    calls: Calls = []
    want, got = {}, {}
    state = stepped(config, recording(reference_ops, calls, want), "cpu", take=trained_in_two)
    replayed = replaying(subject.ops, calls, got)
    same_state(stepped(config, replayed, subject.device, take=trained_in_two), state)
    all_alike(got, want)
    single, _ = recorded_step(config)
    assert not all(same(value, single.state[key]) for key, value in state.items())


@pytest.mark.parametrize("name", BFLOAT16_CONFIGS)
def test_a_bfloat16_step_leaves_the_same_bits(subject: Subject, name: str) -> None:
    """The state is as in float32. On the way no activation or gradient is worse than in plain PyTorch in bfloat16.

    A twin can measure gradients here, as it cannot in float32 (see `all_alike`): their errors come from the rounding of every
    element, whatever the order of the sums. With noise of float32 on all sums, the worst of a model moved by a third at most.
    """
    config = the_config(subject, BFLOAT16_CONFIGS, name)
    recorded, calls = recorded_step(config, torch.bfloat16)
    wide = wide_step(config, torch.bfloat16)
    twin = replayed_step(config, reference_ops, calls, subject.device, torch.bfloat16)
    got = replayed_step(config, subject.ops, calls, subject.device, torch.bfloat16)
    model_no_worse(got.own, twin=twin.own, wide=wide.own, dtype=torch.bfloat16, kind_of=kind_of)
    same_state(got.state, recorded.state)
    all_moved(config, recorded.state, taught=False)


def same_state(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Fail unless all state is equal in every bit."""
    assert list(got) == list(want)
    for key, value in want.items():
        exact(got[key], value, key)


def all_moved(config: ArbConfig, after: dict[str, Any], *, taught: bool) -> None:
    """Fail unless the step changed scales, and everything that learns; if heads were not `taught`, all but router and talker."""
    before = trained(config)
    start, weights = before.state(), before.weights()
    moved = [key for key, weight in weights.items() if (after[key].exponents != weight.exponents).any()]
    assert len(moved) > 2, f"scales moved in {moved} alone"
    unmoved = [key for key, value in after.items() if same(value, start[key])]
    frozen = {key for key, module in before.ternary_modules().items() if module.frozen}
    # Where every position takes every expert, each has its share.
    even = {key for key in after if key.endswith(".handicap") and config.top_k == config.num_experts}
    constant = {key for key in after if key.endswith("leak_shifts")}
    heads = set() if taught else {key for key in after if key.startswith(("router.", "talker_head."))}
    assert set(unmoved) <= frozen | even | constant | heads, f"nothing moved in {unmoved}"


def test_the_other_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is compared computes the nodes of all codes, looks into buckets, and makes experts orthogonal one by one."""
    nodes: list[int] = []
    full_nodes = TernaryGraph.full_nodes

    def noted(graph: TernaryGraph, codes_R: Tensor) -> Tensor:
        nodes.append(codes_R.numel())
        return full_nodes(graph, codes_R)

    monkeypatch.setattr(TernaryGraph, "full_nodes", noted)
    # Training and the choice of the bytes take passes of their own, of a longer batch or without a gradient.
    last_bytes(OTHER_PATHS)
    nodes.clear()
    # Past the cache, since a test before this one may have recorded the step.
    _, calls = recorded_step.__wrapped__(OTHER_PATHS)
    names = [name for name, _ in calls]
    assert nodes == [2 * 6]
    assert {"candidate_codes", "nearest_candidates"} < set(names) and "nearest_codes" not in names
    assert names.count(orthogonalize_of(OTHER_PATHS.num_experts)) == 2, "of expert_down and expert_up"


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "linear_input_grad": lambda grad: 1.5 * grad,
    "grouped_linear_input_grad": torch.neg,
    "rms_norm_input_grad": torch.zeros_like,
    "edge_sum_input_grad": torch.zeros_like,
}
"""What an op set may do to a gradient that leaves every bit of state as it should be, since gradients are exchanged."""


def with_broken(op: str) -> Any:
    """Return the reference ops with one gradient broken."""
    right = getattr(reference_ops, op)
    return models.ops_with(**{op: lambda *args, **kwargs: BROKEN[op](right(*args, **kwargs))})


@pytest.mark.parametrize("op", BROKEN)
def test_a_broken_backward_pass_is_noticed(op: str) -> None:
    """What the pass hands to the replayed ops gives it away, and nothing else does, as its step leaves the same bits."""
    config = CONFIGS["every module, one layer"]
    want, calls = recorded_step(config)
    got = replayed_step(config, with_broken(op), calls, "cpu")
    same_state(got.state, want.state)
    with pytest.raises(AssertionError, match=": off by"):
        all_alike(got.own, want.own)


# These models have no codes, and so no edges.
@pytest.mark.parametrize("op", [op for op in BROKEN if not op.startswith("edge_sum")])
def test_a_broken_bfloat16_backward_pass_is_noticed(op: str) -> None:
    # The first model takes products of all experts, and the second those of the chosen ones, by slots.
    by_slots = op == "grouped_linear_input_grad"
    config = BFLOAT16_CONFIGS["tiny without codes" if by_slots else "one layer"]
    twin, calls = recorded_step(config, torch.bfloat16)
    wide = wide_step(config, torch.bfloat16)
    model_no_worse(twin.own, twin=twin.own, wide=wide.own, dtype=torch.bfloat16, kind_of=kind_of)
    got = replayed_step(config, with_broken(op), calls, "cpu", torch.bfloat16)
    with pytest.raises(AssertionError, match=": off by"):
        model_no_worse(got.own, twin=twin.own, wide=wide.own, dtype=torch.bfloat16, kind_of=kind_of)


@pytest.mark.parametrize("op", ("linear_input_grad", "grouped_linear_input_grad", "rms_norm_input_grad"))
def test_a_bfloat16_gradient_off_by_a_little_is_noticed(op: str) -> None:
    """A twenty-fifth is less than twice the error of `orthogonalize`, but every kind of value has a yardstick of its own."""
    config = BFLOAT16_CONFIGS["tiny without codes"]
    twin, calls = recorded_step(config, torch.bfloat16)
    wide = wide_step(config, torch.bfloat16)
    right = getattr(reference_ops, op)
    ops = models.ops_with(**{op: lambda *args, **kwargs: 1.04 * right(*args, **kwargs)})
    got = replayed_step(config, ops, calls, "cpu", torch.bfloat16)
    with pytest.raises(AssertionError, match=": off by"):
        model_no_worse(got.own, twin=twin.own, wide=wide.own, dtype=torch.bfloat16, kind_of=kind_of)


def test_sums_in_bfloat16_are_noticed() -> None:
    """The model has the width of `tiny`. At the width of the one layer above the yardstick would let such sums pass."""
    config, cpu = BFLOAT16_CONFIGS["tiny without codes"], torch.device("cpu")
    wide = outputs_of(config, reference_ops, cpu, torch.float64)
    twin = outputs_of(config, reference_ops, cpu, torch.bfloat16)
    got = outputs_of(config, build_mutant(MUTANTS["sums_in_bfloat16"]), cpu, torch.bfloat16)
    with pytest.raises(AssertionError, match=": off by"):
        model_no_worse(got, twin=twin, wide=wide, dtype=torch.bfloat16)


def same(value: Any, other: Any) -> bool:
    """Return whether two pieces of state are equal."""
    try:
        exact(value, other)
    except AssertionError:
        return False
    return True


def test_two_runs_leave_the_same_bits(subject: Subject) -> None:
    """Every module trains under torch's deterministic algorithms, to the same state each time."""
    needs_cuda(subject, "two runs of a whole model")
    states = []
    with deterministic():
        for _ in range(2):
            model = build(reduced(PRESETS["tiny"]), subject.ops, subject.device, dtype=torch.bfloat16)
            for step in range(3):
                trained_once(model, models.random_ids(2, 8, seed=step), step=step)
            states.append(model.state())
    for key, want in states[0].items():
        exact(states[1][key], want, key)
