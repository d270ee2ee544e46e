"""Adapters: what they add, what they leave alone, and what is left of them in a merge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from arbitor import nn as arbitor_nn
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.adapters import (
    Adapter,
    FloatGroupedLinear,
    Merge,
    adapters_of,
    attach,
    attach_tensors,
    detach,
    linears_of,
    merge_ternary,
    merged,
    merged_floats,
    starting_rows,
    use_float_linears,
)
from arbitor.reference.graph.layers import TernaryLinear
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.graph.models import WHOLE, drawn_by_the_reference, nano, random_ids
from conformance.subject import Subject

_built: list[ArbModel] = []


def whole() -> ArbModel:
    """Return a model of every module; it is built once."""
    if not _built:
        _built.append(models.whole())
    return copy.deepcopy(_built[0])


def moved(model: nn.Module, *, by: float = 0.05, seed: int = 0) -> nn.Module:
    """Return the model with adapters whose B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters_of(model).values():
        with torch.no_grad():
            adapter.b_NR.copy_(by * torch.randn(adapter.b_NR.shape, generator=generator))
    return model


def media(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "image_BNF": torch.randn(batch, 4, WHOLE.image_features, generator=generator),
        "audio_BNF": torch.randn(batch, 5, WHOLE.audio_features, generator=generator),
    }


def test_a_model_with_new_adapters_computes_what_its_base_does() -> None:
    model, ids_BT = whole(), random_ids(2, 20)
    before = model.losses(ids_BT, **media(2))
    attach(model, rank=3)
    after = model.losses(ids_BT, **media(2))
    assert {name: loss.item() for name, loss in after.items()} == {
        name: loss.item() for name, loss in before.items()
    }


def test_adapters_add_the_product_of_their_matrices() -> None:
    model = nano()
    attach(model, rank=2, alpha=6, targets="value_up")
    linear = model.layers[0].attention.value_up
    moved(model)
    x = torch.randn(3, linear.weight.shape[1])
    w_NK, adapter = reference_ops.dequantize(linear.weight), linear.adapter
    wanted = x @ w_NK.T + 3.0 * (x @ adapter.a_RK.T) @ adapter.b_NR.T
    alike(linear(x), wanted)
    alike(merged(linear), w_NK + 3.0 * adapter.b_NR @ adapter.a_RK)
    # The sum is rounded once: the parts of it are no bfloat16.
    y = torch.full((1, linear.weight.shape[0]), 256.0, dtype=torch.bfloat16)
    with torch.no_grad():
        adapter.a_RK.fill_(1.0)
        adapter.b_NR.fill_(1.1 / 6)
    ones = torch.ones(1, linear.weight.shape[1], dtype=torch.bfloat16)
    change = 1.1 / 6 * 2 * 3 * linear.weight.shape[1]
    assert adapter(ones, y)[0, 0].item() == torch.tensor(256.0 + change).to(torch.bfloat16).item()


def test_the_base_keeps_every_byte_and_only_adapters_learn() -> None:
    """A backward pass with votes asked for, and steps of both kinds: tables and weights stay, and the loss falls."""
    model, ids_BT = whole(), random_ids(3, 24)
    before = state_sha256(model.state())
    adapters = attach(model, rank=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.adapter.{part}" for name in adapters for part in ("a_RK", "b_NR")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        components = model.losses(ids_BT, **media(3))
        losses.append(components["bytes"].item())
        assert model.backward(components, rate=6.0, step=step)
        optimizer.step()
        model.step()
    assert losses[-1] < losses[0] - 0.3
    assert state_sha256(model.state()) == before
    assert not model.voting.notes


def test_a_gradient_is_that_of_the_float_model() -> None:
    """Of each adapter that bytes reach: B's gradient is (alpha / R) G A^T, with G that of the merged float weight."""
    model, ids_BT = nano(), random_ids(2, 16)
    attach(model, rank=2, alpha=5)
    moved(model)
    twin = copy.deepcopy(model)
    names = use_float_linears(twin)
    for name in names:
        twin.get_submodule(name).requires_grad_(True)
    model.losses(ids_BT)["bytes"].backward()
    twin.losses(ids_BT)["bytes"].backward()
    reached = 0
    for name, adapter in adapters_of(model).items():
        grad_NK = twin.get_submodule(name).weight.grad
        if adapter.b_NR.grad is None:
            assert grad_NK is None or not grad_NK.any()
            continue
        reached += 1
        wanted = 2.5 * grad_NK @ adapter.a_RK.T
        alike(adapter.b_NR.grad, wanted, name)
        wanted = 2.5 * adapter.b_NR.T @ grad_NK
        alike(adapter.a_RK.grad, wanted, name)
    assert reached > 15


def test_an_adapter_of_a_stack_changes_the_matrix_of_each_expert() -> None:
    """A is shared, and B has rows for every expert. A slot without an expert gets zeros, whatever it holds."""
    model = nano()
    attach(model, rank=2, alpha=6, targets="expert_down")
    moved(model)
    stack = model.layers[0].moe_graph.moe.expert_down
    w_ENK = merged(stack).to(torch.float32).unflatten(0, (stack.num_groups, -1))
    x_MK, experts_M = torch.randn(6, w_ENK.shape[2]), torch.tensor([3, 0, -1, 1, 3, 2])
    x_MK[2] = torch.nan
    y_MN = stack(x_MK, experts_M)
    for slot, expert in enumerate(experts_M.tolist()):
        wanted = torch.zeros(w_ENK.shape[1]) if expert < 0 else x_MK[slot] @ w_ENK[expert].T
        alike(y_MN[slot], wanted, f"slot {slot}")
    twin = FloatGroupedLinear(merged(stack).to(torch.float32), stack.num_groups)
    alike(twin(x_MK, experts_M), y_MN)
    several = twin(x_MK[[0, 1, 3, 4]].view(2, 2, -1), experts_M[[0, 1, 3, 4]].view(2, 2))
    alike(several.flatten(0, 1), y_MN[[0, 1, 3, 4]])


def test_a_slot_without_an_expert_teaches_no_adapter() -> None:
    """Gradients are those of the other slots, bit for bit, whatever the slot holds."""
    model = nano()
    attach(model, rank=2, alpha=6, targets="expert_down")
    moved(model)
    stack = model.layers[0].moe_graph.moe.expert_down
    experts_M = torch.tensor([3, 0, -1, 1])
    grads = []
    for unused in (0.0, torch.nan, torch.inf):
        x_MK = torch.arange(4.0 * stack.weight.shape[1]).reshape(4, -1) / 64
        x_MK[2] = unused
        stack.adapter.zero_grad()
        stack(x_MK, experts_M).square().sum().backward()
        grads.append((stack.adapter.a_RK.grad, stack.adapter.b_NR.grad))
    assert all(grad.any() for grad in grads[0])
    exact(grads[1], grads[0])
    exact(grads[2], grads[0])


@pytest.mark.parametrize("name", ["key_up", "value_up"])
def test_a_ledger_reads_with_adapters(name: str) -> None:
    """Byte by byte, where the base absorbs keys and values, the logits are those of one pass."""
    model, ids_BT = whole(), random_ids(1, 12)
    attach(model, rank=2, targets=f"attention.{name}")
    moved(model, by=0.5)
    with torch.no_grad():
        at_once = model(ids_BT)
        ledger = model.new_ledger()
        first = model(ids_BT[:, :5], ledger=ledger)
        pieces = [first]
        for place in range(5, 12):
            ledger.retract()
            pieces.append(model(ids_BT[:, place : place + 1], ledger=ledger))
    alike(torch.cat(pieces, dim=1), at_once)


def test_the_video_head_draws_with_adapters() -> None:
    """Without gradients too, where the base runs its loop in one op."""
    model = whole()
    attach(model, rank=2, targets="video_head.query,video_head.latent_in,video_head.latent_out")
    tokens = torch.randn(2, 3, WHOLE.width)
    with torch.no_grad():
        base = model.video_head(tokens)
        moved(model, by=0.5)
        found = model.video_head(tokens)
    assert torch.equal(found, model.video_head(tokens).detach())
    assert (found - base).norm() > base.norm() / 64


def test_the_first_matrix_is_drawn_by_the_dither() -> None:
    model = nano(seed=7)
    linear = model.layers[0].attention.query_up
    a_RK = starting_rows(linear, 3)
    num_inputs = linear.weight.shape[1]
    groups = torch.tensor([2 * num_inputs + 4])
    drawn = reference_ops.dither_bytes(
        groups, group_size=6, seed=7, step=2**32 - 1, tensor_id=2**31 + linear.tensor_id
    )[0].tolist()
    u = drawn[0] + 256 * drawn[1]
    assert a_RK[2, 4].item() == pytest.approx((2 * u - 65535) / 65536 / num_inputs**0.5, rel=1e-6)
    assert a_RK.abs().max() <= num_inputs**-0.5
    assert not torch.equal(a_RK, starting_rows(linear, 3, seed=8))
    assert torch.equal(a_RK[:2], starting_rows(linear, 2))
    others = [starting_rows(other, 3)[0, :4].tolist() for other in linears_of(model).values()]
    assert len({tuple(row) for row in others}) == len(others)
    # Uniform: of mean 0 and variance 1 / (3 K).
    wide = starting_rows(model.byte_head.down, 200)
    assert wide.mean().abs() < 0.01
    assert wide.var().item() * 3 * model.byte_head.down.weight.shape[1] == pytest.approx(1, abs=0.05)


def test_an_op_set_draws_the_same_matrix(subject: Subject) -> None:
    ours = nano(ops=drawn_by_the_reference(subject.ops), device=subject.device)
    theirs = nano()
    for name in ("layers.0.attention.query_up", "layers.1.moe_graph.moe.up"):
        ours_RK = starting_rows(linears_of(ours)[name], 2)
        assert torch.equal(ours_RK.cpu(), starting_rows(linears_of(theirs)[name], 2))


def test_floats_around_ternary_layers_learn_again() -> None:
    """All that learned before the adapters came, and nothing else; also in a copy that has them."""
    parts = nn.Sequential(arbitor_nn.Linear(12, 12, bias=True), nn.LayerNorm(12))
    module: Any = arbitor_nn.Ternary(parts)
    module.module[1].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    attach(module, rank=2)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == [
        "module.0.adapter.a_RK",
        "module.0.adapter.b_NR",
    ]
    for each in (copy.deepcopy(module), module):
        merge_ternary(each)
        assert [parameter.requires_grad for parameter in each.parameters()] == before == [True, False, True]


def test_a_ledger_from_before_an_adapter_is_refused() -> None:
    """Its rows are those of another function."""
    model = nano()
    for change in (attach, detach, attach, use_float_linears):
        ledger = model.new_ledger(2)
        with torch.no_grad():
            model(random_ids(2, 6), ledger=ledger)
            change(model)
            with pytest.raises(RuntimeError, match="after a step, a load or other adapters"):
                model(None, ledger=ledger)


@pytest.mark.parametrize("targets", [None, 5, {"down"}])
def test_targets_of_another_type_are_named(targets: Any) -> None:
    with pytest.raises(
        TypeError, match=f"targets is a {type(targets).__name__}, but must be a string or a list"
    ):
        attach(nano(), targets=targets)


def test_targets_are_suffixes_of_names() -> None:
    model = whole()
    named = attach(model, targets="attention.query_up, halt")
    assert list(named) == [
        "layers.0.attention.query_up",
        "layers.1.attention.query_up",
        "layers.1.moe_graph.halt",
    ]
    detach(model)
    every = attach(model)
    assert "layers.0.moe_graph.moe.router" not in every and "router.inner" in every and len(every) > 30
    detach(model)
    # `up` ends no name of its own in `key_up`.
    assert not any(name.endswith("key_up") for name in attach(model, targets=["up"]))


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("nothing", "targets has 'nothing', but must end the name of a linear, such as"),
        ("moe.router", "chooses experts by exact integers"),
        ("codebook", "is a TernaryVQCodebook, and adapters are for linears"),
        ("query_up,", "must name at least one linear"),
        ([], "must name at least one linear"),
        ("all-linear,query_up", "targets has 'all-linear'"),
    ],
)
def test_targets_that_name_nothing_are_refused(targets: Any, sentence: str) -> None:
    model = whole()
    with pytest.raises(ValueError, match=sentence):
        attach(model, targets=targets)
    assert not adapters_of(model) and not model.byte_head.down.frozen


@pytest.mark.parametrize(
    "changes", [{"rank": 0}, {"rank": 2**17}, {"alpha": 0.0}, {"alpha": float("nan")}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused(changes: Any) -> None:
    [name] = changes
    with pytest.raises(ValueError, match=f"{name} is "):
        attach(nano(), **changes)


def test_adapters_are_attached_once_and_detached() -> None:
    model = nano()
    attach(model)
    with pytest.raises(RuntimeError, match="has adapters already"):
        attach(model)
    detach(model)
    assert not adapters_of(model) and not list(model.parameters())
    assert not model.byte_head.down.frozen and model.byte_head.norm.frozen


def test_given_matrices_must_fit() -> None:
    model = nano()
    name = "layers.0.attention.query_up"
    num_outputs, num_inputs = linears_of(model)[name].weight.shape
    a_RK, b_NR = torch.ones(2, num_inputs), torch.ones(num_outputs, 2)
    for wrong, sentence in (
        ({"byte_head.nothing": (a_RK, b_NR)}, "has no linear of that name"),
        ({name: (a_RK[:, 1:], b_NR)}, "A of layers.0.attention.query_up has shape"),
        ({name: (a_RK, b_NR[:, :1])}, "B of layers.0.attention.query_up has shape"),
        ({}, "tensors has no entry"),
    ):
        with pytest.raises(ValueError, match=sentence):
            attach_tensors(model, wrong, alpha=1.0)
        assert not adapters_of(model) and not model.byte_head.down.frozen
    adapter = attach_tensors(model, {name: (a_RK, b_NR)}, alpha=1.0)[name]
    assert adapter.a_RK.data_ptr() != a_RK.data_ptr()
    exact(adapter.matrix(), torch.ones(num_outputs, num_inputs, dtype=torch.float64))


def test_adapters_move_with_their_model_and_stay_float32() -> None:
    model = nano()
    attach(model, rank=2)
    model.bfloat16()
    adapter = adapters_of(model)["byte_head.down"]
    assert adapter.a_RK.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert model(random_ids(1, 8)).isfinite().all()
    other = copy.deepcopy(model)
    moved(other)
    assert not adapter.b_NR.any()
    assert model.to("meta").byte_head.down.adapter.a_RK.is_meta


def test_a_ternary_merge_states_its_error() -> None:
    model, ids_BT = whole(), random_ids(2, 20)
    base = {name: merged(linear) for name, linear in linears_of(model).items()}
    attach(model, targets="attention.query_up,byte_head.down")
    moved(model, by=0.4)
    wanted = {name: merged(linear) for name, linear in linears_of(model).items()}
    losses = merge_ternary(model)
    assert list(losses) == ["layers.0.attention.query_up", "layers.1.attention.query_up", "byte_head.down"]
    assert not adapters_of(model) and not model.byte_head.down.frozen
    for name, linear in linears_of(model).items():
        found = merged(linear)
        if name not in losses:
            assert torch.equal(found, base[name])
            continue
        loss, missed = losses[name], (found - wanted[name]).norm().item()
        assert loss.error == pytest.approx(missed / wanted[name].norm().item())
        assert loss.kept == pytest.approx(1 - (missed / (wanted[name] - base[name]).norm().item()) ** 2)
        assert 0.02 < loss.kept < 1
    assert model.losses(ids_BT)["bytes"].isfinite()
    with pytest.raises(RuntimeError, match="has no adapters"):
        merge_ternary(model)


def test_merges_add_up() -> None:
    both = Merge(3.0, 1.0, 0.5) + Merge(4.0, 0.0, 1.2)
    assert (both.size, both.change, both.missed) == (5.0, 1.0, 1.3)
    assert Merge(0.0, 0.0, 0.0).error == 0 and Merge(1.0, 0.0, 0.0).kept == 1


def test_a_float_merge_computes_the_same() -> None:
    model, ids_BT = whole(), random_ids(2, 20)
    attach(model)
    moved(model)
    with torch.no_grad():
        wanted = model(ids_BT, **media(2))
        floats = merged_floats(model)
        names = use_float_linears(model)
        found = model(ids_BT, **media(2))
    alike(found, wanted)
    assert set(names) < set(floats)
    for name in names:
        assert torch.equal(model.get_submodule(name).weight, floats[name])
    assert not any(
        isinstance(part, TernaryLinear) for name, part in model.named_modules() if "moe.router" not in name
    )


def test_layers_of_other_models_have_adapters() -> None:
    net = nn.Sequential(
        arbitor_nn.Linear(6, 8, bias=True, seed=1), nn.ReLU(), arbitor_nn.Linear(8, 2, seed=2)
    )
    x = torch.randn(4, 6)
    before = net(x)
    attach(net, rank=2)
    assert torch.equal(net(x), before)
    assert [name for name, each in net.named_parameters() if each.requires_grad] == [
        "0.adapter.a_RK",
        "0.adapter.b_NR",
        "2.adapter.a_RK",
        "2.adapter.b_NR",
    ]
    moved(net)
    after = net(x)
    assert (after - before).norm() > before.norm() / 64
    assert use_float_linears(net) == ["0", "2"]
    alike(net(x), after)


def test_an_adapter_shows_its_sizes() -> None:
    assert "Adapter(rank=3, alpha=2.0)" in repr(Adapter(torch.ones(3, 4), torch.ones(2, 3), alpha=2.0))


def test_a_model_on_the_meta_device_has_adapters_without_memory() -> None:
    model = ArbModel(WHOLE, device="meta")
    assert all(adapter.a_RK.is_meta and adapter.b_NR.is_meta for adapter in attach(model).values())
