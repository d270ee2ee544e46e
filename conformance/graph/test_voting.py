"""A backward pass casts the right votes at the right time, and nothing leaks from one pass to the next."""

from __future__ import annotations

import importlib
import math
import weakref
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.graph import TernaryEmbedding, TernaryLinear, TernaryRMSNorm, layers
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import union_of_rows
from arbitor.reference.graph.ranks import Gradient
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.ops.scale import dequantize
from conformance.compare import exact
from conformance.graph import models


def context(ops_set: Any = ops, dtype: torch.dtype = torch.float32, **fields: Any) -> GraphContext:
    config = models.nano(**fields).config
    return GraphContext(ops_set, config, device="cpu", dtype=dtype, seed=5)


def test_backward_counts_votes_and_moves_no_weight() -> None:
    model = models.nano()
    before = models.state_of(model)
    assert model.backward(model.loss(models.random_ids(2, 12)), rate=models.RATE, step=0)
    changed = models.changed_tensors(before, model)
    assert {field for _, field in changed} == {"trit_accum", "exponent_accum"}
    voters = {name for name, module in model.ternary_modules().items() if not module.frozen}
    assert {name for name, field in changed if field == "trit_accum"} == voters


def test_norms_are_frozen() -> None:
    model = models.nano(theta=1, theta_e=1)
    before = models.state_of(model)
    model.backward(model.loss(models.random_ids(2, 12)), rate=models.RATE, step=0)
    model.step()
    norms = {name for name, module in model.ternary_modules().items() if isinstance(module, TernaryRMSNorm)}
    assert norms and not norms & {name for name, _ in models.changed_tensors(before, model)}
    for name in norms:
        assert torch.equal(dequantize(model.weights()[name]), torch.ones(model.weights()[name].shape))


def test_a_norm_that_is_not_frozen_votes() -> None:
    parts = context()
    norm = TernaryRMSNorm(parts, 10, frozen=False)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    with parts.voting.taking(rate=1.0, step=0):
        norm(x).pow(3).sum().backward()
    grad = ops.rms_norm_weight_grad(3 * ops.rms_norm(x, norm.weight).square(), x)
    fresh = ops.constant_weight((1, 10), trit=1, exponent=0).with_mantissa(norm.weight.mantissa_bits)
    exact(norm.weight, ops.accumulate_gradient(fresh, grad, 1.0, seed=5, step=0, tensor_id=0))


def test_weights_behind_detached_inputs_vote() -> None:
    parts = context()
    first, second = TernaryLinear(parts, 9, 7), TernaryLinear(parts, 7, 4)
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    with parts.voting.taking(rate=1.0, step=0):
        second(first(x).detach()).square().sum().backward()
    parts.voting.deliver()
    assert second.voted and second.weight.trit_accum.any()
    assert not first.voted and not first.weight.trit_accum.any()


def test_no_graph_is_built_without_grad_mode() -> None:
    model = models.nano()
    with torch.no_grad():
        assert not model.loss(models.random_ids(1, 8)).requires_grad
    with torch.inference_mode():
        assert not model.loss(models.random_ids(1, 8)).requires_grad


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_changes_not_one_byte(vote_rule: str, factor: float) -> None:
    model = models.nano(vote_rule=vote_rule, theta=1, theta_e=1)
    ids_BT = models.random_ids(2, 10)
    model.backward(model.loss(ids_BT), rate=models.RATE, step=0)
    model.step()
    before = models.state_of(model)
    assert model.backward(model.loss(ids_BT) * factor, rate=models.RATE, step=1) is False
    model.step()
    assert not models.changed_tensors(before, model)
    assert model.voting.faults == 0


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
def test_gradient_rows_that_are_not_finite_are_silent_and_counted(vote_rule: str) -> None:
    parts = context(vote_rule=vote_rule)
    layer = TernaryLinear(parts, 12, 4)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    y.register_hook(lambda grad: grad * torch.tensor([1.0, math.nan, 1.0, math.inf]))
    with parts.voting.taking(rate=1.0, step=0, size=3):
        y.sum().backward()
    assert parts.voting.faults == 2
    assert not layer.weight.trit_accum[[1, 3]].any()
    assert layer.weight.trit_accum[[0, 2]].any()


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
def test_at_rate_0_nothing_moves(vote_rule: str) -> None:
    model = models.nano(vote_rule=vote_rule, theta=1, theta_e=1)
    before = models.state_of(model)
    assert model.backward(model.loss(models.random_ids(2, 10)), rate=0.0, step=0)
    model.step()
    assert not models.changed_tensors(before, model)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_at_rate_0_no_table_moves(rate: float | torch.Tensor) -> None:
    """At rate 0 no counter, neighbour, strength or load changes, and no code that died is revived."""
    model = models.whole()
    model.get_buffer("shared_vq.bridge.tables.text.usage").zero_()
    before = {name: value.clone() for name, value in model.state().items()}
    assert model.backward(model.losses(models.random_ids(2, 24)), rate=rate, step=5)
    model.step()
    exact(tuple(model.state().values()), tuple(before.values()))


def test_rate_and_step_may_be_device_scalars() -> None:
    ids_BT, states = models.random_ids(2, 10), []
    for rate, step in ((models.RATE, 7), (torch.tensor(models.RATE), torch.tensor(7))):
        model = models.nano()
        model.backward(model.loss(ids_BT), rate=rate, step=step)
        states.append(models.state_of(model))
    exact(tuple(states[0].values()), tuple(states[1].values()))


@pytest.mark.parametrize("argument", [{"rate": -1.0}, {"rate": math.nan}, {"step": -1}])
def test_bad_arguments_are_refused_before_anything_moves(argument: dict[str, Any]) -> None:
    model = models.nano()
    before = models.state_of(model)
    with pytest.raises(ValueError, match=next(iter(argument))):
        model.backward(model.loss(models.random_ids(1, 8)), **{"rate": 1.0, "step": 0, **argument})
    assert not models.changed_tensors(before, model)
    assert not model.voting.active


def test_micro_batches_accumulate_one_after_the_other() -> None:
    """State after two micro-batches and a step is that of `accumulate_gradient` twice and `apply_step`, weight by weight."""
    calls: list[tuple[torch.Tensor, float, dict[str, Any]]] = []

    def record(weight: Any, grad: torch.Tensor, rate: float, **kwargs: Any) -> Any:
        copies = {name: value for name, value in kwargs.items() if name not in ("out", "faults")}
        calls.append((grad.clone(), rate, copies))
        return ops.accumulate_gradient(weight, grad, rate, **kwargs)

    model = models.nano(ops=models.ops_with(accumulate_gradient=record), theta=2, theta_e=1)
    want = list(models.state_of(model).values())
    for step in range(2):
        model.backward(model.loss(models.random_ids(2, 10, seed=step)), rate=models.RATE, step=step)
    model.step()
    used: dict[int, list[torch.Tensor]] = {}
    for grad, rate, kwargs in calls:
        assert kwargs["seed"] == 3
        tensor_id = kwargs["tensor_id"]
        want[tensor_id] = ops.accumulate_gradient(want[tensor_id], grad, rate, **kwargs)
        used.setdefault(tensor_id, []).append(kwargs["rows"])
    assert [len(rows) for rows in used.values()] == [2] * len(used)
    assert sorted({kwargs["step"] for _, _, kwargs in calls}) == [0, 1]
    for tensor_id, rows in used.items():
        both = None if rows[0] is None else torch.cat(rows).unique()
        both = both if both is None else both[both >= 0]
        want[tensor_id] = ops.apply_step(want[tensor_id], theta=2, theta_e=1, rows=both)
    exact(tuple(model.weights().values()), tuple(want))
    assert any((weight.exponents != weight.exponents[0, 0]).any() for weight in want), "no exponent has moved"


def test_the_same_pass_from_the_same_state_gives_the_same_state() -> None:
    """An earlier pass leaves no gradient, no flag and no rows."""
    model, ids_BT = models.nano(theta=1, theta_e=1), models.random_ids(2, 10)
    start = {name: value.clone() for name, value in model.state().items()}
    ends = []
    for noise in (0, 1, 2):
        # No step follows this pass.
        model.backward(model.loss(models.random_ids(2, 10, seed=noise)), rate=models.RATE, step=noise)
        model.load_state(start)
        model.backward(model.loss(ids_BT), rate=models.RATE, step=5)
        model.step()
        ends.append(tuple(models.state_of(model).values()))
    exact(ends[1], ends[0])
    exact(ends[2], ends[0])


def test_a_step_without_votes_changes_nothing() -> None:
    model = models.nano(theta=1, theta_e=1, on_flip="carry")
    model.backward(model.loss(models.random_ids(2, 10)), rate=20.0, step=0)
    model.step()
    before = models.state_of(model)
    model.step()
    assert not models.changed_tensors(before, model)


def test_no_two_weight_gradients_live_at_once_and_none_after() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(op: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            assert not [ref for ref in alive if ref() is not None], "an earlier weight gradient is still held"
            result = op(*args, **kwargs)
            alive.append(weakref.ref(result[1] if isinstance(result, tuple) else result))
            return result

        return run

    watched_ops = models.ops_with(
        linear_weight_grad=watched(ops.linear_weight_grad),
        grouped_linear_weight_grad=watched(ops.grouped_linear_weight_grad),
        embedding_row_grads=watched(ops.embedding_row_grads),
    )
    model = models.nano(ops=watched_ops)
    loss = model.loss(models.random_ids(2, 10))
    model.backward(loss, rate=models.RATE, step=0)
    assert len(alive) == sum(not module.frozen for module in model.ternary_modules().values())
    # The ranks of a nano model are too small for gradients that wait to be made orthogonal.
    assert not [ref for ref in alive if ref() is not None]
    assert all(buffer.grad is None for buffer in model.buffers())


def test_a_second_backward_pass_is_refused_and_votes_nothing() -> None:
    model = models.nano()
    loss = model.loss(models.random_ids(2, 10))
    model.backward(loss, rate=models.RATE, step=0)
    before = models.state_of(model)
    with pytest.raises(RuntimeError, match="second time"):
        model.backward(loss, rate=models.RATE, step=1)
    assert not models.changed_tensors(before, model)


def test_a_step_between_forward_and_backward_is_refused() -> None:
    model = models.nano()
    loss = model.loss(models.random_ids(2, 10))
    model.load_weights(models.state_of(model))
    before = models.state_of(model)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        model.backward(loss, rate=models.RATE, step=1)
    assert not models.changed_tensors(before, model)


def test_forward_passes_may_come_before_backward_passes() -> None:
    """Two micro-batches with both forward passes first give what one after the other gives."""
    ids = [models.random_ids(2, 10, seed=seed) for seed in range(2)]
    one_by_one, together = models.nano(), models.nano()
    for step in range(2):
        one_by_one.backward(one_by_one.loss(ids[step]), rate=models.RATE, step=step)
    losses = [together.loss(each) for each in ids]
    for step in range(2):
        together.backward(losses[step], rate=models.RATE, step=step)
    exact(tuple(one_by_one.weights().values()), tuple(together.weights().values()))


def test_each_use_of_a_weight_votes_on_its_own() -> None:
    parts = context()
    layer = TernaryLinear(parts, 8, 8)
    fresh = layer.weight.clone()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with parts.voting.taking(rate=1.0, step=0):
        layer(layer(x)).square().sum().backward()
    y = ops.linear(x, fresh)
    outer = 2 * ops.linear(y, fresh)
    inner = ops.linear_input_grad(outer, fresh)
    clock: dict[str, Any] = {"seed": 5, "step": 0, "tensor_id": 0}
    want = ops.accumulate_gradient(fresh, ops.linear_weight_grad(outer, y), 1.0, **clock)
    want = ops.accumulate_gradient(want, ops.linear_weight_grad(inner, x), 1.0, **clock)
    exact(layer.weight, want)


MATRICES = {"all wait": (2**25, [4, 1]), "three wait": (3 * 40 * 36, [3, 1, 1]), "none waits": (0, [1] * 5)}
"""Elements that may wait, and the matrices in each call: four of one shape, one of which votes twice, and one of another."""


@pytest.mark.parametrize("kind", MATRICES)
def test_matrices_of_one_shape_are_made_orthogonal_in_one_call(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As many as may wait. The votes are those of each matrix alone, and a weight that votes twice does so in its order."""
    most, stacks = MATRICES[kind]
    asked: list[int] = []
    grads: list[tuple[int, torch.Tensor]] = []
    voting = importlib.import_module("arbitor.reference.graph.voting")
    monkeypatch.setattr(voting, "WAITING_ELEMENTS", most)

    def stacked(grad_NK: torch.Tensor, *, iterations: int, num_groups: int) -> torch.Tensor:
        asked.append(num_groups)
        return ops.orthogonalize(grad_NK, iterations=iterations, num_groups=num_groups)

    parts = context(models.ops_with(orthogonalize=stacked))
    cast = parts.voting.cast
    monkeypatch.setattr(
        parts.voting, "cast", lambda who, g: (grads.append((who.tensor_id, g.grad_NK)), cast(who, g))
    )
    first, second, other = (
        TernaryLinear(parts, 40, 36),
        TernaryLinear(parts, 40, 36),
        TernaryLinear(parts, 36, 40),
    )
    third = TernaryGroupedLinear(parts, 1, 40, 36)
    want = [module.weight.clone() for module in (first, second, other, third)]
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    y = other(first(x))
    with parts.voting.taking(rate=100.0, step=0):
        made = (first(y), second(y), third(y, torch.zeros(50, dtype=torch.int64)))
        torch.stack(made).pow(3).sum().backward()
    assert sorted(asked) == sorted(stacks)
    assert [tensor_id for tensor_id, _ in grads].count(0) == 2
    for tensor_id, grad in grads:
        grad = ops.orthogonalize(grad, iterations=3)
        want[tensor_id] = ops.accumulate_gradient(
            want[tensor_id], grad, 100.0, seed=5, step=0, tensor_id=tensor_id
        )
    exact(tuple(module.weight for module in (first, second, other, third)), tuple(want))
    assert (first.weight.trit_accum.abs() == 127).any(), "no count is full, so any order would do"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_matrix_is_made_orthogonal_before_it_votes(dtype: torch.dtype) -> None:
    """A gradient is made orthogonal in the dtype of the activations. Rows of classes and narrow matrices vote as they are."""
    clock: dict[str, Any] = {"seed": 5, "step": 0, "tensor_id": 0, "exponent_rule": "score"}
    cases = (
        ({}, 32, {}, True),
        ({}, 31, {}, False),
        ({}, 32, {"orthogonal": False}, False),
        ({"orthogonal_steps": 0}, 32, {}, False),
        ({"orthogonal_steps": 1}, 32, {}, True),
    )
    for config, width, options, made_so in cases:
        parts = context(dtype=dtype, **config)
        layer = TernaryLinear(parts, 40, width, **options)
        fresh, x = (
            layer.weight.clone(),
            torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).to(dtype),
        )
        with parts.voting.taking(rate=1.0, step=0):
            layer(x).pow(3).sum().backward()
        grad = ops.linear_weight_grad(3 * ops.linear(x, fresh).square(), x)
        if made_so:
            grad = ops.orthogonalize(grad.to(dtype), iterations=config.get("orthogonal_steps", 3))
        exact(layer.weight, ops.accumulate_gradient(fresh, grad, 1.0, **clock))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
def test_an_op_rounds_a_gradient_to_what_it_votes_in(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vote_rule: str
) -> None:
    """Gradients that are made orthogonal come out in bfloat16, if activations are, and all others in float32, also for ranks."""
    asked: list[torch.dtype] = []
    cast: list[torch.dtype] = []

    def watched(op: Any) -> Any:
        def run(*args: Any, **how: Any) -> torch.Tensor:
            asked.append(how["dtype"])
            return op(*args, **how)

        return run

    # Each weight votes in two parts.
    monkeypatch.setattr(layers, "VOTE_ELEMENTS", 32 * 40)
    watched_ops = models.ops_with(
        linear_weight_grad=watched(ops.linear_weight_grad),
        grouped_linear_weight_grad=watched(ops.grouped_linear_weight_grad),
    )
    parts = context(watched_ops, dtype, vote_rule=vote_rule)
    wide, thin = TernaryLinear(parts, 40, 64), TernaryLinear(parts, 40, 24)
    classes = TernaryLinear(parts, 40, 64, orthogonal=False)
    experts, thin_experts = TernaryGroupedLinear(parts, 2, 40, 32), TernaryGroupedLinear(parts, 2, 40, 16)
    slots = torch.tensor([0, 1, 1, 0, 1])
    x, both = (models.integers(5, width, seed=width).to(dtype) for width in (40, 80))
    cases = (
        (wide, lambda: wide(x), True),
        (thin, lambda: thin(x), False),
        (classes, lambda: classes(x), False),
        (experts, lambda: experts(x, slots), True),
        (experts, lambda: experts(x[:1], slots[:1]), True),
        (experts, lambda: experts.side_by_side(both), True),
        (experts, lambda: layers.fan_out(x, experts)[0], True),
        (thin_experts, lambda: thin_experts(x, slots), False),
        (thin_experts, lambda: layers.fan_out(x, thin_experts)[0], False),
    )
    exchange = parts.voting.ranks.exchange

    def noted(tensor_id: int, gradient: Gradient, cast_total: Any) -> None:
        cast.append(gradient.grad_NK.dtype)
        exchange(tensor_id, gradient, cast_total)

    monkeypatch.setattr(parts.voting.ranks, "exchange", noted)
    for module, forward, is_orthogonal in cases:
        asked.clear()
        cast.clear()
        with parts.voting.taking(rate=1.0, step=0):
            forward().square().sum().backward()
        rounds = is_orthogonal and vote_rule == "stochastic" and dtype is torch.bfloat16
        want = torch.bfloat16 if rounds else torch.float32
        assert asked and set(asked) == {want}, (module, asked)
        # A float64 gradient is cast as float32.
        assert cast == asked, (module, cast)


def test_each_expert_is_made_orthogonal_on_its_own() -> None:
    parts = context()
    layer = TernaryGroupedLinear(parts, 3, 40, 32)
    fresh, x = layer.weight.clone(), torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    # The third row is not used.
    experts = torch.arange(60) % 2
    with parts.voting.taking(rate=1.0, step=0):
        layer(x, experts).pow(3).sum().backward()
    y = ops.grouped_linear(x, fresh, experts, num_groups=3)
    grad = ops.grouped_linear_weight_grad(3 * y.square(), x, experts, num_groups=3)
    alone = [ops.orthogonalize(part) for part in grad.unflatten(0, (3, -1))]
    clock: dict[str, Any] = {"seed": 5, "step": 0, "tensor_id": 0, "exponent_rule": "score"}
    exact(layer.weight, ops.accumulate_gradient(fresh, torch.cat(alone), 1.0, **clock))
    assert layer.weight.trit_accum[:64].any() and not layer.weight.trit_accum[64:].any()


def test_what_an_expert_votes_does_not_depend_on_how_many_slots_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient is made orthogonal in parts that follow from the weight, here 48 and 16 of its 64 rows."""
    monkeypatch.setattr(layers, "VOTE_ELEMENTS", 3 * 40 * 48)
    x, grad = (torch.randn(2, width, generator=torch.Generator().manual_seed(width)) for width in (40, 64))
    states = []
    # There are fewer slots than experts in one case, and more in the other.
    for unused in (0, 4):
        parts = context()
        layer = TernaryGroupedLinear(parts, 3, 40, 64)
        experts = torch.cat([torch.tensor([2, 0]), torch.full((unused,), -1)])
        with parts.voting.taking(rate=5.0, step=0):
            layer(torch.cat([x, x.new_zeros(unused, 40)]), experts).backward(
                torch.cat([grad, grad.new_zeros(unused, 64)])
            )
        states.append(layer.weight)
    exact(states[0], states[1])
    assert states[0].trit_accum[:64].any() and not states[0].trit_accum[64:128].any()


def test_rows_that_are_not_finite_are_counted_where_gradients_are_made_orthogonal() -> None:
    parts = context()
    layer = TernaryLinear(parts, 40, 33)
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    y, grad = layer(x), torch.ones(50, 33)
    grad[3, 7] = math.nan
    with parts.voting.taking(rate=1.0, step=0):
        y.backward(grad)
    silent = torch.arange(33) == 7
    assert int(parts.voting.faults) == 1
    assert not layer.weight.trit_accum[silent].any() and layer.weight.trit_accum[~silent].any(dim=1).all()


def test_the_sign_rule_votes_with_the_step_of_the_loss() -> None:
    model = models.nano(vote_rule="sign", max_vote_step=8)
    loss = model.loss(models.random_ids(2, 10))
    size = ops.step_from_loss(loss.item(), math.log(297), 8)
    model.backward(loss, rate=models.RATE, step=0)
    values = model.weights()["byte_head.vocabulary"].trit_accum.unique().tolist()
    assert set(values) <= {-size, 0, size} and len(values) > 1


def test_frozen_exponents_stay() -> None:
    model = models.nano(exponent_rule="frozen", theta=1)
    before = models.state_of(model)
    model.backward(model.loss(models.random_ids(2, 10)), rate=models.RATE, step=0)
    model.step()
    fields = {field for _, field in models.changed_tensors(before, model)}
    assert "packed" in fields and not fields & {"exponents", "exponent_accum"}


def test_only_used_rows_of_a_table_change() -> None:
    model = models.nano(theta=1, theta_e=1)
    ids_BT = torch.tensor([[65, 65, 66, 67, 65, 68, 67, 66]])
    before = models.state_of(model)["embedding.table"]
    model.backward(model.loss(ids_BT), rate=models.RATE, step=0)
    model.step()
    after = model.weights()["embedding.table"]
    rows = (after.trit_accum != before.trit_accum).any(dim=1) | (trits_of(after) != trits_of(before)).any(
        dim=1
    )
    rows |= (after.exponents != before.exponents).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [65, 66, 67, 68]


def test_a_row_used_twice_votes_once_with_the_sum() -> None:
    parts = context()
    table = TernaryEmbedding(parts, 6, 12)
    fresh = table.weight.clone()
    scale = torch.tensor([1.0, 2.0, -4.0])[:, None]
    with parts.voting.taking(rate=1.0, step=0):
        (table(torch.tensor([4, 1, 4])) * scale).sum().backward()
    grad = torch.tensor([2.0, -3.0])[:, None].expand(2, 12)
    want = ops.accumulate_gradient(fresh, grad, 1.0, seed=5, step=0, tensor_id=0, rows=torch.tensor([1, 4]))
    exact(table.weight, want)


def test_union_of_rows_names_each_row_once() -> None:
    lists = [torch.tensor([1, 4, -1, -1]), torch.tensor([0, 4, 9]), torch.tensor([4])]
    rows = union_of_rows(lists)
    assert rows.shape == (8,)
    assert sorted(row for row in rows.tolist() if row >= 0) == [0, 1, 4, 9]
    assert union_of_rows(lists[:1]) is lists[0]
