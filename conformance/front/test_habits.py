"""Habits of torch: what a loop of another library does with a model works here, or is refused in a sentence, and never silent."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from arbitor import ArbModel, ArbOptimizer, adapters, convert
from arbitor.nn import Linear, Ternary, swap_linears
from arbitor.optimized.training.checkpoint import state_sha256
from conformance.training import nano
from conformance.training.nano import IDS

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))


def model() -> ArbModel:
    return ArbModel(nano.NANO, device="cpu", seed=1)


def net() -> nn.Sequential:
    return nn.Sequential(Linear(24, 24, seed=0), nn.ReLU(), nn.Linear(24, 1))


def loss_of(module: nn.Module) -> torch.Tensor:
    loss: torch.Tensor = module.loss(IDS) if isinstance(module, ArbModel) else module(X).square().mean()
    return loss


def scaled(loss: torch.Tensor) -> torch.amp.GradScaler:
    """A scaler that has scaled a loss."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss)
    return scaler


def test_the_first_parameter_of_a_model_without_any_says_why() -> None:
    """`next(model.parameters())` is how libraries ask where a model is."""
    it = model()
    with pytest.raises(
        StopIteration, match=r"has no parameter, because its weights are integers: .* device and dtype"
    ):
        next(it.parameters())
    assert next(it.parameters(), None) is None and list(it.parameters()) == []
    assert it.device == torch.device("cpu") == Ternary(net()).device
    assert len(list(Ternary(net()).parameters())) == 2
    adapters.attach(it, rank=2, targets="value_up")
    assert next(it.parameters()).dtype == torch.float32 and list(it.parameters())
    assert list(Ternary(Linear(12, 12)).parameters()) == []


@pytest.mark.parametrize(
    "make", [model, lambda: ArbModel(nano.WHOLE, device="cpu"), lambda: Ternary(net()), ArbOptimizer]
)
def test_all_that_dir_lists_can_be_read(make: Callable[[], Any]) -> None:
    """As debuggers, `inspect.getmembers` and consoles that complete a name do. What must be refused is not listed."""
    it = ArbOptimizer(model(), rate=6.0) if make is ArbOptimizer else make()
    for each in (it, copy.copy(it), copy.deepcopy(it)):
        parts = each.modules() if isinstance(each, nn.Module) else ()
        for part in (each, *parts):
            for name in dir(part):
                getattr(part, name)
            assert inspect.getmembers(part)
        with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
            _ = each.nothing


@pytest.mark.parametrize("make", [model, lambda: Ternary(net())])
def test_a_loop_without_votes_ends_at_its_second_pass(make: Callable[[], Any]) -> None:
    """As a trainer of another library runs it: `loss.backward()`, then the step of an optimizer of floats."""
    it = make()
    before = state_sha256(it.state())
    loss_of(it).backward()
    with pytest.raises(RuntimeError, match=r"must take the place of loss.backward\(\)"):
        loss_of(it).backward()
    with pytest.raises(RuntimeError, match="did not vote"):
        it.backward(loss_of(it), rate=6.0, step=0)
    with pytest.raises(RuntimeError, match="did not vote"):
        it.step()
    assert state_sha256(it.state()) == before
    it.drop_gradients()
    assert it.backward(loss_of(it), rate=6.0, step=0)
    it.step()
    assert state_sha256(it.state()) != before


def test_one_backward_pass_may_come_through_many_weights_and_several_losses() -> None:
    it = model()
    (it.loss(IDS) + it.loss(IDS)).backward()
    it.requires_grad_(False)
    it.drop_gradients()
    x = X.clone().requires_grad_()
    layer = Linear(24, 24)
    layer.requires_grad_(False)
    for _ in range(2):
        layer(x).sum().backward()
    assert x.grad is not None


def test_gradients_between_two_passes_have_a_way_out() -> None:
    optimizer = ArbOptimizer(model(), rate=6.0)
    optimizer.backward(optimizer.model.loss(IDS))
    voted = state_sha256(optimizer.model.state())
    loss_of(optimizer.model).backward()
    for refused in (optimizer.step, lambda: optimizer.backward(optimizer.model.loss(IDS))):
        with pytest.raises(RuntimeError, match=r"model.drop_gradients\(\) goes on without them"):
            refused()
    with pytest.raises(RuntimeError, match="zero_grad must follow step"):
        optimizer.zero_grad()
    assert state_sha256(optimizer.model.state()) == voted
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.passes == 1


@pytest.fixture
def two_ranks() -> Any:
    """A process group in which this process is one of two, whose exchanges do nothing."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("make", [model, lambda: Ternary(net())])
def test_one_process_of_several_casts_no_votes_alone(make: Callable[[], Any], two_ranks: None) -> None:
    it = make()
    before = state_sha256(it.state())
    with pytest.raises(RuntimeError, match=r"is one of 2, but the votes .* `torchrun -m arbitor.train`"):
        ArbOptimizer(it, rate=6.0).backward(loss_of(it))
    assert state_sha256(it.state()) == before


@pytest.mark.parametrize("make", [model, lambda: Ternary(net())])
def test_a_process_that_torchrun_started_with_others_casts_no_votes_alone(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has joined the processes. The variable alone tells of them."""
    optimizer = ArbOptimizer(make(), rate=6.0)
    before = state_sha256(optimizer.model.state())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"is one of 2, but the votes .* without the variable WORLD_SIZE$"):
        optimizer.backward(loss_of(optimizer.model))
    assert state_sha256(optimizer.model.state()) == before
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert optimizer.backward(loss_of(optimizer.model))


def test_a_rate_beside_the_one_of_schedulers_is_refused() -> None:
    optimizer = ArbOptimizer(model(), rate=6.0)
    before = state_sha256(optimizer.model.state())
    optimizer.param_groups[0]["rate"] = 1.0
    with pytest.raises(
        ValueError, match="param_groups has 'rate', but the rate of an ArbOptimizer is its 'lr'"
    ):
        optimizer.backward(optimizer.model.losses(IDS))
    assert state_sha256(optimizer.model.state()) == before


@pytest.mark.parametrize(
    "change",
    [
        nn.init.xavier_uniform_,
        lambda weight: weight.data,
        lambda weight: weight.copy_(torch.zeros(24, 24)),
        lambda weight: weight.zero_(),
    ],
)
def test_a_ternary_weight_is_no_tensor(change: Callable[[Any], Any]) -> None:
    with pytest.raises(
        AttributeError, match=r"Weight has no attribute '\w+', as it is no tensor: `dequantize`"
    ):
        change(Linear(24, 24).weight)


def test_what_no_tensor_has_a_weight_is_not_told_to_become_one_for() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'voted'$"):
        _ = Linear(24, 24).weight.voted


@pytest.mark.parametrize("other", [Linear(24, 24, seed=1), nn.Linear(24, 24)])
def test_no_two_layers_share_a_weight(other: Any) -> None:
    layer = Linear(24, 24, seed=0)
    before = layer.weight
    with pytest.raises(
        TypeError, match=r"weight is given as a \w+, but a Linear keeps .* no two layers share a weight"
    ):
        layer.weight = other.weight
    assert layer.weight is before and not list(layer.parameters())


def test_an_optimizer_is_copied_with_its_model() -> None:
    optimizer = ArbOptimizer(model(), rate=6.0)
    optimizer.backward(optimizer.model.losses(IDS))
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    stream = io.BytesIO()
    torch.save(optimizer, stream)
    stream.seek(0)
    read = torch.load(stream, weights_only=False)
    for each in (optimizer, twin, read):
        each.backward(each.model.losses(IDS))
        each.step()
    assert twin.model is not optimizer.model
    assert len({state_sha256(each.model.state()) for each in (optimizer, twin, read)}) == 1
    both = copy.deepcopy((optimizer.model, optimizer))
    assert both[1].model is both[0] and both[1].passes == 2


def test_rows_that_are_not_finite_are_counted() -> None:
    it = Ternary(nn.Sequential(Linear(24, 24, seed=0)))
    x = X.clone()
    x[0, 0] = 1e38
    y = it(X)
    y.register_hook(lambda grad: torch.where(torch.arange(24) < 3, float("nan"), grad))
    assert it.faulty_rows == 0
    # Rows that vote as they are. A matrix that is made orthogonal is faulty as a whole.
    it.module[0].orthogonal = False
    assert it.backward(y.square().mean(), rate=6.0, step=0)
    assert it.faulty_rows == 3


def test_float_linears_are_not_saved_as_a_ternary_model(tmp_path: Path) -> None:
    it = model()
    it.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    adapters.use_float_linears(it)
    with pytest.raises(RuntimeError, match=r"is a float weight, .* `arb export --merge float`"):
        it.save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    adapted = model()
    adapters.attach(adapted, rank=2, targets="value_up")
    adapted.save_pretrained(tmp_path / "adapted")
    assert adapters.adapters_of(ArbModel.from_pretrained(tmp_path / "adapted", device="cpu"))


def test_a_file_is_not_converted_onto_itself(tmp_path: Path) -> None:
    source, ternary = tmp_path / "float.safetensors", tmp_path / "ternary.safetensors"
    save_file({"w": torch.randn(4, 24)}, source)
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    for target in (source, tmp_path / "link", tmp_path / "." / source.name):
        with pytest.raises(ValueError, match="must be another file than source"):
            convert.convert_file(source, target)
    convert.convert_file(source, ternary)
    with pytest.raises(ValueError, match="must be another file than source"):
        convert.restore_file(ternary, ternary)
    assert source.read_bytes() == before
    with pytest.raises(TypeError, match=r"source is a dict, .*: ternarize_all takes a state dict"):
        convert.convert_file({"w": torch.ones(2, 2)}, ternary)
    with pytest.raises(TypeError, match=r"target is a NoneType, but must be the name of a file$"):
        convert.convert_file(source, None)


def test_new_layers_are_not_swapped_into_what_votes_already() -> None:
    held = Ternary(net())
    for module in (held, held.module, adapters.use_float_linears(own := model()) and own):
        with pytest.raises(ValueError, match=r"votes with a model already, .* swap first"):
            swap_linears(module)
    assert type(held.module[2]) is nn.Linear


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (
            lambda it: ArbOptimizer(SimpleNamespace(_orig_mod=it), rate=6.0),
            TypeError,
            "give its attribute _orig_mod$",
        ),
        (lambda it: ArbOptimizer(nn.DataParallel(it), rate=6.0), TypeError, "give its attribute module$"),
        (lambda it: ArbOptimizer(nn.Linear(2, 2), rate=6.0), TypeError, "must be an ArbModel or a Ternary$"),
        (lambda it: ArbOptimizer(it, rate=float("nan")), ValueError, "finite, from 0.0 to 127.0"),
        (lambda it: adapters.attach(it, alpha=0), ValueError, "finite, above 0 to "),
        (lambda it: it.generate(IDS), TypeError, r"prompts is a Tensor, .* bytes\(ids.tolist\(\)\)"),
        (
            lambda it: scaled(it.loss(IDS)).step(ArbOptimizer(it, rate=6.0)),
            RuntimeError,
            "votes do not depend on the size of a loss",
        ),
    ],
)
def test_other_habits_are_named(wrong: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        wrong(model())


def test_a_text_ends_when_the_model_is_stepped() -> None:
    it = model()
    pieces = it.generate(b"ab", max_new_bytes=9, stream=True)
    next(pieces)
    it.backward(it.losses(IDS), rate=6.0, step=0)
    it.step()
    with pytest.raises(RuntimeError, match="between two pieces of a text"):
        list(pieces)


def test_scale_and_clipping_of_a_loss_change_no_vote() -> None:
    """docs/python.md says so."""
    states = []
    for scale in (1.0, 2.0**-4):
        optimizer = ArbOptimizer(model(), rate=6.0)
        optimizer.backward(optimizer.model.loss(IDS) * scale)
        assert float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)) == 0
        optimizer.step()
        states.append(state_sha256(optimizer.model.state()))
    assert states[0] == states[1]
