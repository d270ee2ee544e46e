"""A model holds integers only, by stable names. They are loaded and compared as a whole."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.reference.constants import MANTISSA_BITS
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.presets import PRESETS, preset
from arbitor.reference.types import TernaryWeight
from conformance.compare import exact
from conformance.graph import models
from conformance.subject import Subject


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_holds_no_parameter_and_no_float(name: str) -> None:
    model = ArbModel(preset(name), device="meta")
    assert not list(model.parameters())
    tables = {id(table) for table in model.tables().values()}
    assert {buffer.dtype for buffer in model.buffers() if id(buffer) not in tables} == {
        torch.uint8,
        torch.int8,
    }
    assert not any(table.is_floating_point() for table in model.tables().values())


@pytest.mark.parametrize("bits", MANTISSA_BITS)
def test_scales_have_the_mantissa_of_the_configuration(bits: int) -> None:
    """Mantissa bits change how weights move, and not where they start. Codebooks have none, as their search depends on that."""
    plain, model = (ArbModel(replace(models.WHOLE, mantissa_bits=each)) for each in (0, bits))
    books = {name for name, m in plain.ternary_modules().items() if isinstance(m, TernaryVQCodebook)}
    assert books
    for name, weight in model.weights().items():
        assert weight.mantissa_bits == (0 if name in books else bits), name
        exact(dequantize(weight), dequantize(plain.weights()[name]), name)


def test_a_mantissa_is_given_once() -> None:
    weight = next(iter(models.nano(mantissa_bits=0).weights().values()))
    with pytest.raises(ValueError, match="mantissa_bits is 3"):
        weight.with_mantissa(3)
    with pytest.raises(ValueError, match="weight has mantissa_bits 2, but must have 0"):
        weight.with_mantissa(2).with_mantissa(1)


def test_no_float_stays_after_training() -> None:
    model = models.nano()
    model.backward(model.loss(models.random_ids(2, 8)), rate=models.RATE, step=0)
    model.step()
    assert not list(model.parameters())
    assert not any(tensor.is_floating_point() for tensor in model.state_dict().values())
    held = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
    ]
    assert not any(tensor.is_floating_point() for tensor in held)


def test_tensor_ids_follow_the_definition_order() -> None:
    model = models.nano()
    modules = list(model.ternary_modules().values())
    assert [module.tensor_id for module in modules] == list(range(len(modules)))
    assert list(model.weights()) == list(model.ternary_modules())


def test_the_names_of_the_weights() -> None:
    """Checkpoints depend on these names, so a change here is a change of format."""
    names = list(models.nano(num_layers=1).weights())
    assert names == [
        "embedding.table",
        "sequencer.project",
        "sequencer.norm",
        "layers.0.attention_norm",
        "layers.0.attention.query_down",
        "layers.0.attention.query_norm",
        "layers.0.attention.query_up",
        "layers.0.attention.latent_down",
        "layers.0.attention.latent_norm",
        "layers.0.attention.key_up",
        "layers.0.attention.value_up",
        "layers.0.attention.output",
        "layers.0.moe_graph.moe_norm",
        "layers.0.moe_graph.moe.router",
        "layers.0.moe_graph.moe.gate",
        "layers.0.moe_graph.moe.up",
        "layers.0.moe_graph.moe.expert_down",
        "layers.0.moe_graph.moe.expert_up",
        "layers.0.moe_graph.moe.down",
        "byte_head.norm",
        "byte_head.gate",
        "byte_head.up",
        "byte_head.down",
        "byte_head.vocabulary_norm",
        "byte_head.vocabulary",
    ]


def test_the_seed_decides_the_start() -> None:
    one, same, other = (tuple(models.nano(seed=seed).weights().values()) for seed in (1, 1, 2))
    exact(one, same)
    assert not torch.equal(one[0].packed, other[0].packed)


def test_buffers_are_the_weight() -> None:
    """What torch sees of a module is what the ops compute on, also after a move."""
    model = models.nano()
    for model_now in (model, model.to("cpu"), model.to(torch.bfloat16)):
        for module in model_now.ternary_modules().values():
            for name, tensor in module.weight.tensors().items():
                assert module.get_buffer(name) is tensor


def test_weights_round_trip() -> None:
    trained, other = models.nano(theta=2, theta_e=1), models.nano(theta=2, theta_e=1, seed=9)
    for step in range(2):
        trained.backward(trained.loss(models.random_ids(2, 8)), rate=models.RATE, step=step)
        trained.step()
    addresses = [tensor.data_ptr() for tensor in other.buffers()]
    pairs = zip(other.weights().values(), trained.weights().values(), strict=True)
    assert any((one.exponents != two.exponents).any() for one, two in pairs), "no exponent has moved"
    other.load_weights(models.state_of(trained))
    exact(tuple(other.weights().values()), tuple(trained.weights().values()))
    assert [tensor.data_ptr() for tensor in other.buffers()] == addresses
    # Experts are chosen by handicaps too, which are no weights.
    for name, table in other.tables().items():
        table.copy_(trained.tables()[name])
    with torch.no_grad():
        assert torch.equal(other(models.random_ids(1, 9)), trained(models.random_ids(1, 9)))


def test_loading_shares_no_memory() -> None:
    model, weights = models.nano(), models.state_of(models.nano(seed=9))
    model.load_weights(weights)
    model.backward(model.loss(models.random_ids(2, 8)), rate=models.RATE, step=0)
    assert not weights["byte_head.vocabulary"].trit_accum.any()


def spoiled(weights: dict[str, TernaryWeight], how: str) -> dict[str, TernaryWeight]:
    """Return weights with one thing wrong."""
    name = "byte_head.gate"
    weight = weights[name]
    if how == "missing":
        return {key: value for key, value in weights.items() if key != name}
    if how == "unknown":
        return {**weights, "byte_head.grate": weight}
    if how == "not a weight":
        changed: Any = weight.packed
    elif how == "shape":
        changed = weights["byte_head.vocabulary"]
    elif how == "group_size":
        changed = weight_of_trits(
            trits_of(weight), weight.exponents[:, :1], 24, mantissa_bits=weight.mantissa_bits
        )
    elif how == "mantissa_bits":
        changed = replace(weight, mantissa_bits=1)
    else:
        field, value = how.split("=")
        tensor = weight.tensors()[field].clone()
        tensor.view(-1)[-1] = int(value)
        changed = weight.with_tensors(**{field: tensor})
    return {**weights, name: changed}


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing", ValueError, "weights has no 'byte_head.gate'"),
        ("unknown", ValueError, "weights has 'byte_head.grate'"),
        ("not a weight", TypeError, "byte_head.gate is a Tensor"),
        ("shape", ValueError, r"byte_head.gate has shape \(297, 24\)"),
        ("group_size", ValueError, "byte_head.gate has group_size 24"),
        ("mantissa_bits", ValueError, "byte_head.gate has mantissa_bits 1"),
        ("packed=243", ValueError, "byte_head.gate.packed holds 243"),
        ("exponents=64", ValueError, "byte_head.gate.exponents holds 64"),
        ("trit_accum=-128", ValueError, "byte_head.gate.trit_accum holds -128"),
        ("exponent_accum=-128", ValueError, "byte_head.gate.exponent_accum holds -128"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(
    how: str, error: type[Exception], message: str
) -> None:
    model = models.nano()
    before = models.state_of(model)
    with pytest.raises(error, match=message):
        model.load_weights(spoiled(models.state_of(models.nano(seed=9)), how))
    assert not models.changed_tensors(before, model)


def test_nothing_is_copied_only_to_be_looked_at() -> None:
    """Neither a comparison of layouts nor the flip rate makes a weight's canonical form. A snapshot is of trits alone."""

    def refuse(weight: TernaryWeight) -> TernaryWeight:
        raise AssertionError("a weight was brought to its canonical form")

    model = models.nano(ops=models.ops_with(to_spec=refuse))
    snapshot = model.snapshot_trits()
    model.load_weights(models.state_of(models.nano(seed=9)))
    assert model.flip_rate(snapshot) > 0
    held = {name: module.weight for name, module in model.ternary_modules().items() if not module.frozen}
    assert {name: list(parts) for name, parts in snapshot.items()} == {name: ["packed"] for name in held}
    assert all(snapshot[name]["packed"].data_ptr() != held[name].packed.data_ptr() for name in held)


def test_flip_rate_counts_changed_trits() -> None:
    model = models.nano(theta=1)
    snapshot = model.snapshot_trits()
    assert model.flip_rate(snapshot) == 0.0
    before = models.state_of(model)
    model.backward(model.loss(models.random_ids(2, 8)), rate=models.RATE, step=0)
    assert model.flip_rate(snapshot) == 0.0
    model.step()
    changed = total = 0
    for name, module in model.ternary_modules().items():
        if not module.frozen:
            now = trits_of(model.weights()[name])
            changed += int((now != trits_of(before[name])).sum())
            total += now.numel()
    assert model.flip_rate(snapshot) == changed / total > 0


def test_a_frozen_model_flips_nothing() -> None:
    model = models.nano().requires_grad_(False)
    assert model.flip_rate(model.snapshot_trits()) == 0.0


def test_the_flip_rate_of_an_op_set_is_that_of_the_trits(subject: Subject) -> None:
    """Counted in the layout of the op set, from a snapshot of less than half of the state."""
    # The reference draws the weights, which is faster than drawing them in an interpreter.
    layout = ("from_spec", "to_spec", "count_changed_trits")
    ops = models.ops_with(**{name: getattr(subject.ops, name) for name in layout})
    model, other = models.nano(ops=ops, device=subject.device), models.nano(seed=9)
    snapshot, before = model.snapshot_trits(), models.nano().weights()
    assert model.flip_rate(snapshot) == 0.0
    model.load_weights(other.weights())
    pairs = [(trits_of(before[name]), trits_of(other.weights()[name])) for name in snapshot]
    changed = sum(int((was != now).sum()) for was, now in pairs)
    assert model.flip_rate(snapshot) == changed / sum(now.numel() for _, now in pairs) > 0
    kept = sum(tensor.nbytes for parts in snapshot.values() for tensor in parts.values())
    assert 2 * kept < sum(weight.state_bytes for weight in other.weights().values())


def test_a_state_dict_in_the_layout_of_an_op_set_is_looked_at(subject: Subject) -> None:
    """Each tensor of a weight refuses what no weight holds, whatever its layout. Device words are lanes of two bits."""
    layout = ("from_spec", "to_spec")
    ops = models.ops_with(**{name: getattr(subject.ops, name) for name in layout})
    model = models.nano(ops=ops, device=subject.device)
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(good)
    planted = {
        "packed": [243],
        "words": [2, 2 << 28, -1],
        "exponents": [64],
        "trit_accum": [-128],
        "exponent_accum": [-128],
    }
    for part in model.byte_head.gate.weight.tensors():
        name = f"byte_head.gate.{part}"
        for value in planted[part]:
            state = {**good, name: good[name].clone()}
            state[name].view(-1)[-1] = value
            with pytest.raises(ValueError, match=re.escape(name)):
                model.load_state_dict(state)
    assert all(torch.equal(tensor, good[name]) for name, tensor in model.state_dict().items())
