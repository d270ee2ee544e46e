"""Ternary layers in any module: they compute and learn as those of the graph do, and wrong uses are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arbitor.nn import Embedding, Linear, RMSNorm, Rules, Ternary, swap_linears
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.convert import ternarize
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike
from conformance.subject import Subject


def net(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        Linear(8, 40, bias=True, seed=seed),
        nn.ReLU(),
        Linear(40, 40, seed=seed + 1),
        nn.ReLU(),
        nn.Linear(40, 1),
    )


def problem() -> tuple[Tensor, Tensor]:
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :1] * x[:, 1:2]).tanh()


def squares(model: nn.Module) -> Tensor:
    x, y = problem()
    return (model(x) - y).square().mean()


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_a_layer_is_the_product_with_its_weight() -> None:
    layer, x = Linear(30, 7, bias=True, seed=2), torch.randn(2, 3, 30)
    nn.init.normal_(layer.bias)
    weight = dequantize(layer.ops.to_spec(layer.weight), dtype=torch.float32)
    alike(layer(x).detach(), (x @ weight.T + layer.bias).detach())
    assert repr(layer) == "Linear(30, 7, bias=True, ternary)"
    assert repr(Embedding(9, 4)) == "Embedding(9 x 4)"
    assert layer(x.to(torch.bfloat16)).dtype is torch.float32, (
        "a float32 bias makes the sum float32, as in torch"
    )


def test_defaults_are_those_of_the_configuration() -> None:
    for name in (*Rules.__dataclass_fields__, "vote_rule"):
        assert getattr(Rules(), name) == ArbConfig.__dataclass_fields__[name].default


def test_starting_weights_are_those_of_the_graph_and_of_torchs_seed() -> None:
    layer = Linear(24, 12, seed=5)
    twin = TernaryLinear(layer.context, 24, 12)
    assert twin.tensor_id == 1, "tensor ids differ, so that weights do"
    assert not torch.equal(twin.weight.packed, layer.weight.packed)
    torch.manual_seed(3)
    first, second = Linear(24, 12), Linear(24, 12)
    assert not torch.equal(first.weight.packed, second.weight.packed)
    torch.manual_seed(3)
    assert torch.equal(Linear(24, 12).weight.packed, first.weight.packed)


def test_layers_learn_beside_float_ones() -> None:
    model = Ternary(net())
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    assert {name for name, _ in model.named_parameters()} == {
        "module.0.bias",
        "module.4.weight",
        "module.4.bias",
    }
    before, trits = float(squares(model).detach()), model.snapshot_trits()
    for step in range(120):
        adam.zero_grad()
        assert model.backward(squares(model), rate=6.0 * (1 - step / 120), step=step)
        model.step()
        adam.step()
    assert float(squares(model).detach()) < before / 4
    assert all(int(count) for count in model.changed_trits(trits).values())


def test_a_loop_that_never_lets_layers_vote_is_refused() -> None:
    """As a trainer of another library would run it: the float parameters learn, and the ternary layers would not."""
    model = net()
    with pytest.raises(RuntimeError, match="belongs to no model, and so would never learn: wrap the module"):
        squares(model).backward()
    with torch.no_grad():
        squares(model)
    for layer in model:
        layer.requires_grad_(False)
    model[4].requires_grad_(True)
    squares(model).backward()
    assert model[4].weight.grad is not None
    held = Ternary(net())
    assert held.backward(squares(held), rate=1.0, step=0)


def test_only_votes_would_learn_too() -> None:
    model = Ternary(net())
    before, frozen = float(squares(model).detach()), bits(model.module[4])
    for step in range(60):
        model.backward(squares(model), rate=6.0 * (1 - step / 60), step=step)
        model.step()
    assert float(squares(model).detach()) < before / 2 and same(bits(model.module[4]), frozen)


def test_fused_kernels_of_torch_leave_ternary_layers_alone() -> None:
    """Without gradients torch hands the weights of its encoder layers to a kernel. Two of four are no tensors here."""
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1)
    assert len(swap_linears(encoder)) == 2
    x_BTK, is_padding_BT = torch.randn(2, 5, 24), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
    with_gradients = encoder(x_BTK, src_key_padding_mask=is_padding_BT)
    with torch.no_grad():
        without = encoder.eval()(x_BTK, src_key_padding_mask=is_padding_BT)
    seen_BT1 = ~is_padding_BT[..., None]
    alike(without * seen_BT1, with_gradients * seen_BT1)


def test_what_is_frozen_stays_and_the_rest_learns() -> None:
    """docs/python.md says which call freezes what."""
    model = Ternary(nn.Sequential(nn.Sequential(Linear(12, 24), nn.Linear(24, 24)), Linear(24, 3)))
    inner, outer = model.module[0], model.module[1]
    outer.requires_grad_(False)
    inner.requires_grad_(False)
    assert not inner[1].weight.requires_grad and outer.frozen and not inner[0].frozen
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.backward(model(torch.randn(8, 12)).square().mean(), rate=20.0, step=0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("module.0.0.") for name in changed)
    model.requires_grad_(False)
    assert inner[0].frozen
    model.requires_grad_(True)
    assert not outer.frozen


def test_float_layers_learn_above_frozen_ternary_ones() -> None:
    """No gradient comes to a frozen layer at the bottom, and the loss is the model's all the same."""
    model = Ternary(nn.Sequential(Linear(8, 40), nn.ReLU(), nn.Linear(40, 1)))
    model.module[0].requires_grad_(False)
    before = bits(model.module[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first = squares(model).item()
    for step in range(5):
        optimizer.zero_grad()
        assert model.backward(squares(model), rate=6.0, step=step)
        optimizer.step()
        model.step()
    assert squares(model).item() < first and same(bits(model.module[0]), before)


def test_votes_are_a_function_of_seed_and_step() -> None:
    def after(seed: int, step: int) -> dict[str, Tensor]:
        model = Ternary(net(), seed=seed)
        model.module[4].load_state_dict({"weight": torch.ones(1, 40), "bias": torch.zeros(1)})
        model.backward(squares(model), rate=6.0, step=step)
        model.step()
        return bits(model)

    assert same(after(0, 0), after(0, 0))
    assert not same(after(0, 0), after(1, 0)) and not same(after(0, 0), after(0, 1))


def test_layers_of_one_model_have_ids_of_their_own() -> None:
    model = Ternary(net())
    assert [layer.tensor_id for layer in model.ternary_modules().values()] == [0, 1]
    assert all(layer.context is model.context for layer in model.ternary_modules().values())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = Ternary(net())
    before = bits(model)
    assert not model.backward(squares(model) * float("nan"), rate=6.0, step=0)
    model.step()
    assert same(bits(model), before) and model.module[4].weight.grad is None


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (
            lambda model: model.backward(torch.ones((), requires_grad=True), rate=1.0, step=0),
            ValueError,
            "computed with",
        ),
        (lambda model: model.backward(torch.ones(()), rate=1.0, step=0), ValueError, "loss has no graph"),
        (lambda model: model.backward(model(problem()[0]), rate=1.0, step=0), ValueError, "must be a scalar"),
        (lambda model: model.backward(squares(model), rate=500.0, step=0), ValueError, "rate is 500"),
        (lambda model: (squares(model).backward(), model.step()), RuntimeError, "outside of model.backward"),
        (lambda model: Ternary(model.module), ValueError, "the layer '0' belongs to another model"),
        (lambda model: Ternary(nn.Linear(2, 2)), ValueError, "has no ternary layer"),
        (lambda model: Ternary("net"), TypeError, "module is a str"),
        (
            lambda model: Ternary(nn.Sequential(Linear(4, 4), Linear(4, 4, rules=Rules(theta=9)))),
            ValueError,
            "rules",
        ),
        (
            lambda model: Ternary(nn.Sequential(Linear(4, 4), Embedding(4, 4, dtype="bfloat16"))),
            ValueError,
            "dtype",
        ),
        (lambda model: Linear(0, 4), ValueError, "in_features is 0"),
        (lambda model: Linear(4, 2.5), TypeError, "out_features is a float"),
        (lambda model: Linear(4, 4, bias="no"), TypeError, "bias is 'no'"),
        (lambda model: Embedding(4, -1), ValueError, "embedding_dim is -1"),
        (lambda model: RMSNorm(0), ValueError, "width is 0"),
        (lambda model: Rules(theta=0), ValueError, "theta is 0"),
        (lambda model: Rules(group_size=7), ValueError, "group_size is 7"),
        (lambda model: Linear.from_float(nn.Conv1d(2, 2, 1)), TypeError, "linear is a Conv1d"),
        (lambda model: swap_linears(None), TypeError, "module is a NoneType"),
        (lambda model: swap_linears(nn.Sequential(nn.Linear(2, 2)), "0"), TypeError, "select is a str"),
        (lambda model: Linear(4, 4, rules={"theta": 9}), TypeError, "rules is a dict, but must be Rules"),
        (lambda model: Linear.from_float(nn.Linear(2, 2), rules=9), TypeError, "rules is a int, but must be"),
        (lambda model: swap_linears(nn.Sequential(nn.Linear(2, 2)), rules=9), TypeError, "^rules is a int"),
        (
            lambda model: nn.functional.linear(torch.ones(1, 12), model.module[0].weight),
            TypeError,
            "linear was given a TernaryWeight, but must be given tensors: `dequantize`",
        ),
        (
            lambda model: swap_linears(nn.Sequential(nn.Linear(2, 2).half())),
            TypeError,
            r"the layer '0' is refused: linear has dtype float16, .* by \.float\(\)",
        ),
        (
            lambda model: swap_linears(nn.Sequential(nn.Linear(2, 2, device="meta"))),
            ValueError,
            "the layer '0' is refused: linear is on the meta device",
        ),
    ],
)
def test_wrong_uses_are_named(wrong: Any, error: type[Exception], sentence: str) -> None:
    model = Ternary(net())
    before = bits(model)
    with pytest.raises(error, match=sentence):
        wrong(model)
    assert same(bits(model), before)


def test_a_model_is_moved_copied_saved_and_loaded() -> None:
    model = Ternary(net())
    model.backward(squares(model), rate=6.0, step=0)
    model.step()
    twin = copy.deepcopy(model)
    other = Ternary(net(seed=7))
    other.load_state_dict(model.state_dict())
    for each in (model, twin, other):
        each.backward(squares(each), rate=6.0, step=1)
        each.step()
    assert same(bits(twin), bits(model)) and same(bits(other), bits(model))
    model.to(torch.bfloat16)
    assert model(problem()[0].to(torch.bfloat16)).dtype is model.dtype is torch.bfloat16
    # A layer by itself, or a module of the user's around it, is moved as any other.
    assert nn.Sequential(Linear(4, 4, bias=True)).to(torch.bfloat16)[0].bias.dtype is torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
def test_a_module_may_be_moved_by_itself(assign: bool) -> None:
    """What belongs to no layer follows the layers: the count of faults of a model that was built without memory."""
    parts = nn.Sequential(Linear(8, 40, device="meta"), nn.ReLU(), Linear(40, 1, device="meta"))
    source = nn.Sequential(Linear(8, 40), nn.ReLU(), Linear(40, 1))
    model, twin = Ternary(parts), Ternary(copy.deepcopy(source))
    if not assign:
        parts.to_empty(device="cpu")
    parts.load_state_dict(source.state_dict(), assign=assign)
    for each in (model, twin):
        assert each.backward(squares(each), rate=60.0, step=0)
        each.step()
    assert same(bits(model), bits(twin)) and model.faulty_rows == 0


def test_rows_of_a_table_and_a_norm_learn() -> None:
    table, norm = Embedding(10, 36, seed=1), RMSNorm(36, frozen=False)
    model, ids = Ternary(nn.Sequential(table, norm)), torch.tensor([[1, 2, 3, 3]])
    before = bits(model)
    for step in range(40):
        model.backward(model(ids).square().mean() + model(ids).mean(), rate=20.0, step=step)
        model.step()
    moved = (table.weight.trit_accum != before["module.0.trit_accum"]).any(dim=1).nonzero().flatten()
    assert set(moved.tolist()) <= {1, 2, 3} and len(moved)
    assert not same(
        bits(norm), {name.removeprefix("module.1."): x for name, x in before.items() if ".1." in name}
    )


def test_from_float_is_the_nearest_weight() -> None:
    linear = nn.Linear(50, 20)
    layer = Linear.from_float(linear)
    wanted = ternarize(linear.weight.detach())
    assert all(torch.equal(x, layer.weight.tensors()[name]) for name, x in wanted.tensors().items())
    assert layer.bias is linear.bias
    x = torch.randn(64, 50)
    with torch.no_grad():
        assert float((layer(x) - linear(x)).norm() / linear(x).norm()) < 0.6


def test_layers_are_of_any_op_set(subject: Subject) -> None:
    """The same weight, and after a vote and a step the same bits as with the reference."""
    linear, x = nn.Linear(36, 24, bias=False), torch.randint(-3, 4, (8, 36)).float()
    states = []
    for ops in (reference_ops, subject.ops):
        layer = Linear.from_float(
            copy.deepcopy(linear).to(subject.device), ops=ops, rules=Rules(orthogonal_steps=0)
        )
        model = Ternary(layer)
        assert model.ops is ops
        # Of small whole numbers every sum is exact, in whatever order.
        model.backward(model(x.to(subject.device)).sum(), rate=9.0, step=0)
        model.step()
        states.append(ops.to_spec(layer.weight))
    assert all(torch.equal(states[0].tensors()[name], part) for name, part in states[1].tensors().items())


def test_swapping_exchanges_what_is_selected() -> None:
    module = nn.Sequential(
        nn.Linear(4, 6), nn.ModuleDict({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 2)})
    )
    shared = module[1]["a"]
    module.append(shared)
    weight = shared.weight.detach().clone()
    lost = swap_linears(module, lambda name, linear: linear.out_features == 6)
    assert list(lost) == ["0", "1.a", "2"] and type(module[0]) is Linear
    assert (
        type(module[1]["a"]) is Linear and module[1]["a"] is module[2] and type(module[1]["b"]) is nn.Linear
    )
    difference = dequantize(module[2].weight, dtype=torch.float64) - weight
    assert lost["2"].error == pytest.approx(float(difference.norm() / weight.double().norm()))


def test_swapping_refuses_what_would_be_lost_silently() -> None:
    module = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)}
    )
    module["head"].weight = module["embed"].weight
    with pytest.raises(ValueError, match=r"the weight of 'head' is 'embed\.weight' too"):
        swap_linears(module)
    assert type(module["body"]) is nn.Linear
    assert list(swap_linears(module, lambda name, linear: name == "body")) == ["body"]
    with pytest.raises(ValueError, match="must have at least one"):
        swap_linears(module, lambda name, linear: name == "body")
