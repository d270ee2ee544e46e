"""Tests of the float twins: each computes what our model computes, with equally many weights, and its step trains them."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import ArbModel, GraphContext
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.stateful import Stateful
from arbitor.reference.presets import preset
from arbitor.reference.types import TernaryWeight
from bench import cases, train_step
from bench.learning.transformer import ByteTransformer
from bench.peers import peers_of, twin
from bench.runner import TRAIN_FAMILY

MODELS = (
    (train_step.TRUNK, "tiny"),
    (train_step.TRUNK, "small"),
    (train_step.TRANSFORMER, "tiny"),
    (train_step.TRANSFORMER, "28.9M"),
)
UNUSED = ("image_sequencer", "audio_sequencer", "router", "video_head", "talker_head")
"""Modules of a preset that no byte's loss uses, beside the norms, whose weights are ones."""


def choosing_as_floats_do() -> ModuleType:
    """Return the reference with experts chosen by the float logits. Its own rule looks at activations in sixteenths."""

    def choose_experts(x: Tensor, weight: TernaryWeight, *, top_k: int, handicap_E: Tensor) -> Tensor:
        assert not handicap_E.any(), "the twin has no handicaps"
        return reference_ops.linear(x, weight).topk(top_k, dim=-1).indices.sort(dim=-1).values

    ops = ModuleType("choosing_as_floats_do")
    ops.__dict__.update({op: getattr(reference_ops, op) for op in reference_ops.__all__})
    ops.choose_experts = choose_experts
    return ops


def ours_of(name: str, shape: str, dtype: torch.dtype, device: str = "cpu") -> Stateful:
    parts = {"ops": choosing_as_floats_do(), "device": device, "dtype": dtype, "seed": 0}
    if name == train_step.TRUNK:
        return ArbModel(train_step.config_of(name, shape), **parts)
    sizes = train_step.TRANSFORMER_SHAPES[shape]
    context = GraphContext(config=preset("tiny"), **parts)
    return ByteTransformer(context, width=sizes["D"], num_layers=sizes["layers"], length=sizes["T"])


def twin_of(name: str, shape: str, dtype: torch.dtype) -> nn.Module:
    make = twin.trunk_twin if name == train_step.TRUNK else twin.transformer_twin
    return make(shape, train_step.SHAPES[name][shape], dtype)


def trained_of(model: Stateful) -> dict[str, TernaryModule]:
    """Return the modules whose weights the loss of bytes trains, by name."""
    modules = model.ternary_modules().items()
    return {name: each for name, each in modules if not each.frozen and name.split(".")[0] not in UNUSED}


def floats_of(model: Stateful) -> dict[str, Tensor]:
    """Return the weights of one of our models as floats, by their name in its twin."""
    found = {}
    for name, module in trained_of(model).items():
        value = reference_ops.dequantize(module.weight, dtype=torch.float64)
        if name.endswith("expert_up"):
            # Ours stacks the experts' rows, the twin their columns.
            value = value.unflatten(0, (module.num_groups, -1)).transpose(0, 1).flatten(1)
        for ours, twins in (
            ("embedding.table", "embedding"),
            ("sequencer.project", "project"),
            ("moe_graph.moe", "moe"),
            ("byte_head", "head"),
        ):
            name = name.replace(ours, twins)
        found[f"{name}.weight"] = value
    return found


def windows(name: str, shape: str, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, train_step.SHAPES[name][shape]["T"]), generator=generator)


@pytest.mark.parametrize(("name", "shape"), MODELS)
def test_a_twin_computes_what_our_model_does(name: str, shape: str) -> None:
    """In float64, so that rounding hides no difference. Every weight of the twin is one of ours, and every one of ours is there.

    The transformer of ours makes its logits float32, whatever it computes in.
    """
    ours, other = ours_of(name, shape, torch.float64), twin_of(name, shape, torch.float64).double()
    other.load_state_dict(floats_of(ours), strict=True)
    ids_BT = windows(name, shape, 1)
    with torch.no_grad():
        want, got = ours.loss(ids_BT), other(ids_BT)
        rounding = 1e-12 if want.dtype == torch.float64 else 1e-6
        assert got.item() == pytest.approx(want.item(), rel=rounding)
        for parameter in other.parameters():
            parameter.mul_(1.01)
        assert other(ids_BT).item() != pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("train_step", "tiny"), ("train_step_transformer", "tiny")])
def test_a_twin_in_float32_rounds_as_our_model_does(name: str, shape: str) -> None:
    ours, other = ours_of(name, shape, torch.float32), twin_of(name, shape, torch.float32)
    other.load_state_dict(floats_of(ours), strict=True)
    ids_BT = windows(name, shape, 2)
    with torch.no_grad():
        torch.testing.assert_close(other(ids_BT), ours.loss(ids_BT), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("name", "shape"), [*MODELS, (train_step.TRANSFORMER, "303.6M")])
def test_a_twin_has_equally_many_weights(name: str, shape: str) -> None:
    with torch.device("meta"):
        other = twin_of(name, shape, torch.bfloat16)
    ours = trained_of(ours_of(name, shape, torch.bfloat16, device="meta"))
    weights = sum(parameter.numel() for parameter in other.parameters())
    assert weights == sum(math.prod(module.weight.shape) for module in ours.values())
    if name == train_step.TRANSFORMER:
        assert train_step.weights_of(train_step.TRANSFORMER_SHAPES[shape]) == weights


@pytest.mark.parametrize("name", [train_step.TRUNK, train_step.TRANSFORMER])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_a_twin_trains_every_weight(name: str, compiled: bool) -> None:
    """On a CPU the compiler's front end alone: one graph, without a break. Steps of both kinds go the same way."""
    ids_BT, losses = windows(name, "tiny", 2), []
    for each in (compiled, False):
        torch.manual_seed(0)
        step = twin.TwinStep(twin_of(name, "tiny", torch.float32), ids_BT, compiled=each)
        before = {key: value.clone() for key, value in step.twin.state_dict().items()}
        losses.append([step() for _ in range(5)])
        after = step.twin.state_dict()
        assert not [key for key in before if torch.equal(before[key], after[key])]
        assert math.isfinite(losses[-1][-1]) and losses[-1][-1] < losses[-1][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_muon_moves_as_ours_makes_orthogonal() -> None:
    """The weights of the twin that Muon moves are those whose gradients our model makes orthogonal; AdamW moves all others."""
    ours = trained_of(ours_of(train_step.TRANSFORMER, "tiny", torch.float32))
    orthogonal = {f"{name}.weight" for name, module in ours.items() if getattr(module, "orthogonal", False)}
    other = twin_of(train_step.TRANSFORMER, "tiny", torch.float32)
    step = twin.TwinStep(other, windows(train_step.TRANSFORMER, "tiny", 2), compiled=False, muon=True)
    names = {parameter: name for name, parameter in other.named_parameters()}
    adamw, muon = (
        {names[each] for group in optimizer.param_groups for each in group["params"]}
        for optimizer in step.optimizers
    )
    assert muon == orthogonal and adamw == set(names.values()) - muon
    before = {key: value.clone() for key, value in other.state_dict().items()}
    assert step() > step()
    assert not [key for key, value in other.state_dict().items() if torch.equal(before[key], value)]


def test_the_peers_of_train_steps_are_twins_with_and_without_the_compiler() -> None:
    muon = {train_step.TRUNK: (), train_step.TRANSFORMER: tuple(twin.MUON_TWINS)}
    for name in (train_step.TRUNK, train_step.TRANSFORMER):
        assert [peer.name for peer in peers_of(name)] == [*twin.TWINS, *muon[name]]
        for peer in peers_of(name):
            sizes = train_step.SHAPES[name]["tiny"]
            step = peer.build((("tiny", windows(name, "tiny", 2)), {}), sizes)
            assert step() > step()
    assert "train_step-small-compiled_float_AdamW" in cases.all_cases()
    for shape in ("28.9M", "303.6M"):
        assert f"train_step_transformer-{shape}-compiled_float_AdamW" in cases.all_cases()
        assert f"train_step_transformer-{shape}-compiled_float_Muon" in cases.all_cases()
    assert cases.rows()[train_step.TRANSFORMER].family == TRAIN_FAMILY


def test_what_it_is_no_twin_of_is_refused() -> None:
    with pytest.raises(ValueError, match="must have experts, two or more a position, no codes and no loop"):
        twin.TrunkTwin(preset("tiny"), 64, torch.float32)
    config = train_step.config_of(train_step.TRUNK, "tiny")
    with pytest.raises(ValueError, match="num_bytes is 1000, but must leave at most 512 positions"):
        twin.TrunkTwin(config, 1000, torch.float32)
