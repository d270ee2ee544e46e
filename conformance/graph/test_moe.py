"""The mixture of experts: two paths with one result, votes of the experts in use alone, load, and large weights in parts.

Legend: M slots (rows of activations), N outputs, K inputs, E experts.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import TernaryLinear, layers
from arbitor.reference.graph.grouped import TernaryGroupedLinear, numbered
from arbitor.reference.graph.moe import SharedProjectionMoE, chosen_experts
from arbitor.reference.graph.state import GraphContext
from conformance.compare import alike, exact, unsigned_zeros
from conformance.graph import models
from conformance.report import needs_cuda, skip
from conformance.subject import Subject


def context(*, dtype: torch.dtype = torch.float32, ops: Any = reference_ops, **fields: Any) -> GraphContext:
    config = models.nano(theta=2, theta_e=3, **fields).config
    return GraphContext(ops, config, device="cpu", dtype=dtype, seed=11)


def integers(*shape: int, seed: int) -> Tensor:
    """Return floats whose products and sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def both_paths(**fields: Any) -> list[tuple[GraphContext, SharedProjectionMoE]]:
    """Return the same module twice: grouped, and dense."""
    made = []
    for dense_max in (0, 1000):
        parts = context(dense_dispatch_max_tokens=dense_max, **fields)
        made.append((parts, SharedProjectionMoE(parts)))
    return made


def weights_of(module: torch.nn.Module) -> tuple[Any, ...]:
    return tuple(m.weight for m in module.modules() if isinstance(m, (TernaryLinear, TernaryGroupedLinear)))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_both_paths_give_the_same(top_k: int) -> None:
    """The output and the gradient of the input, through shares and router as well."""
    results = []
    for parts, moe in both_paths(top_k=top_k, dtype=torch.float64):
        x_BPD = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), dtype=parts.dtype)
        x_BPD.requires_grad_()
        y_BPD = moe(x_BPD)
        y_BPD.square().sum().backward()
        results.append((y_BPD.detach(), x_BPD.grad))
    for got, want, what in zip(*results, ("y", "dx"), strict=True):
        alike(got, want, what)


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
def test_both_paths_cast_the_same_votes(vote_rule: str) -> None:
    """On sums that are exact, bit for bit; an expert that no position chose keeps every byte in both."""
    experts_Mk = torch.tensor([[0, 3], [0, 1], [1, 3], [0, 3], [0, 1]])
    shares_Mk = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.5, 0.25], [0.5, 0.5]])
    states = []
    for parts, moe in both_paths(vote_rule=vote_rule):
        before = moe.expert_up.weight.clone()
        x_MD = integers(5, 24, seed=1).requires_grad_()
        with parts.voting.at(rate=2.0, step=0, size=3):
            (moe.modulation(x_MD, experts_Mk, shares_Mk) * integers(5, 20, seed=2)).sum().backward()
        experts = (moe.expert_down, moe.expert_up)
        assert all(module.weight.trit_accum.any() for module in experts)
        exact(moe.expert_up.weight.trit_accum[40:60], before.trit_accum[40:60], "expert 2")
        for module in experts:
            module.step_weight()
        exact(moe.expert_up.weight.trits()[40:60], before.trits()[40:60], "expert 2")
        states.append((unsigned_zeros(x_MD.grad), *(module.weight for module in experts)))
    exact(states[1], states[0])


def test_only_few_positions_take_the_dense_path() -> None:
    asked: list[int] = []

    def watched(x: Tensor, weight: Any, experts: Tensor, *, num_groups: int) -> Tensor:
        asked.append(len(experts))
        return reference_ops.grouped_linear(x, weight, experts, num_groups=num_groups)

    parts = context(ops=models.ops_with(grouped_linear=watched), dense_dispatch_max_tokens=6)
    moe = SharedProjectionMoE(parts)
    for positions in (3, 4):
        moe(torch.ones(2, positions, 24))
    assert asked == [24, 24, 16, 16]


def test_chosen_experts_are_the_largest_and_ties_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 5.0, 9.0]]])
    experts, shares = chosen_experts(logits, 2)
    assert experts.tolist() == [[[1, 2], [0, 1], [2, 3]]]
    alike(shares[0, 2], torch.tensor([5.0, 9.0]).softmax(dim=0))


def test_the_load_counts_choices_of_accepted_passes_when_stepped() -> None:
    model = models.nano(num_layers=1)
    moe, ids_BT = model.layers[0].moe_graph.moe, models.random_ids(2, 10)
    assert not moe.load_shares().any()
    assert not model.backward(model.loss(ids_BT) * torch.nan, rate=models.RATE, step=0)
    model.step()
    assert not moe.load.any(), "a loss that is not finite was counted"
    for step in range(2):
        assert model.backward(model.loss(ids_BT), rate=models.RATE, step=step)
    assert not moe.load.any(), "counted before the step"
    model.step()
    assert moe.load.sum() == 2 * 2 * 8 * model.config.top_k
    alike(moe.load_shares(), moe.load / moe.load.sum())
    counted = moe.load.clone()
    model.backward(model.loss(ids_BT), rate=models.RATE, step=2)
    model.load_state({name: value.clone() for name, value in model.state().items()})
    model.step()
    exact(moe.load, counted)


def test_numbered_names_each_expert_in_use_once() -> None:
    experts = torch.tensor([7, -1, 3, 7, 900])
    groups, used = numbered(experts)
    assert groups.tolist() == [1, -1, 0, 1, 2] and used.tolist() == [3, 7, 900, -1, -1]
    assert numbered(torch.tensor([-1, -1]))[1].tolist() == [-1, -1]
    assert numbered(experts[:0])[0].tolist() == []


@pytest.mark.parametrize(
    ("vote_rule", "experts"),
    [("stochastic", [2]), ("stochastic", [5, -1, 5, 0]), ("sign", [4, 4, 0, 1, -1, 0, 5, 4, 2])],
    ids=["1", "4", "9"],
)
def test_a_grouped_linear_votes_and_steps_alike(subject: Subject, vote_rule: str, experts: list[int]) -> None:
    """With fewer slots than experts and with more: what the op set under test leaves is what the reference leaves."""
    results = []
    for ops, device in ((reference_ops, torch.device("cpu")), (subject.ops, subject.device)):
        config = models.nano(theta=5, theta_e=3, vote_rule=vote_rule).config
        parts = GraphContext(ops, config, device=device, dtype=torch.float32, seed=7)
        layer = TernaryGroupedLinear(parts, 6, 13, 5)
        slots, outputs = torch.tensor(experts, device=device), []
        for step in range(2):
            x = integers(len(experts), 13, seed=step).to(device).requires_grad_()
            y = layer(x, slots)
            with parts.voting.at(rate=2.0, step=step, size=2):
                (y * integers(len(experts), 5, seed=9).to(device)).sum().backward()
            outputs += [y.detach().cpu(), x.grad.cpu()]
            layer.step_weight()
        weight = ops.to_spec(layer.weight).to("cpu")
        voted = weight.trit_accum.reshape(6, -1).any(dim=1) | weight.exponent_accum.reshape(6, -1).any(dim=1)
        assert set(voted.nonzero().flatten().tolist()) <= set(experts)
        results.append((unsigned_zeros(tuple(outputs)), weight))
    exact(results[1], results[0])
    assert results[0][1].trit_accum.any()


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
@pytest.mark.parametrize("count", [3, 9])
def test_large_weights_vote_in_parts(monkeypatch: pytest.MonkeyPatch, vote_rule: str, count: int) -> None:
    """However many rows vote at a time, the state is the same, before the step and after it."""
    experts, states = torch.arange(count) % 4, []
    for most in (2**27, 100, 1):
        monkeypatch.setattr(layers, "VOTE_ELEMENTS", most)
        made: list[Tensor] = []

        def watched(op: Any, made: list[Tensor] = made) -> Any:
            def run(*args: Any, **kwargs: Any) -> Tensor:
                made.append(op(*args, **kwargs))
                return made[-1]

            return run

        ops = models.ops_with(
            linear_weight_grad=watched(reference_ops.linear_weight_grad),
            grouped_linear_weight_grad=watched(reference_ops.grouped_linear_weight_grad),
        )
        parts = context(ops=ops, vote_rule=vote_rule)
        plain, grouped = TernaryLinear(parts, 14, 20), TernaryGroupedLinear(parts, 5, 20, 6)
        found: list[Any] = []
        for step in range(2):
            x = integers(count, 14, seed=step)
            with parts.voting.at(rate=2.0, step=step, size=3):
                (grouped(plain(x), experts) * integers(count, 6, seed=5)).sum().backward()
            found += [plain.weight.clone(), grouped.weight.clone()]
            plain.step_weight()
            grouped.step_weight()
        states.append((*found, plain.weight, grouped.weight))
        row = 20 * min(count, 5)  # one output of every expert is the least part
        assert max(grad.numel() for grad in made) <= max(most, row)
        assert (len(made) == 4) == (most == 2**27)
    exact(states[1], states[0])
    exact(states[2], states[0])


def test_large_weights_are_unpacked_in_parts(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op set's own bound on dense copies changes no bit of sums that are exact, and is kept."""
    try:
        linear = importlib.import_module(f"{subject.ops.__name__}.linear")
        limit = linear.DENSE_ELEMENTS
    except (ImportError, AttributeError):
        skip("dense copies in parts", f"{subject.name} has no bound on them")
    weight = reference_ops.initial_weight((40, 36), std=0.2, seed=1, tensor_id=2)
    calls = (("linear", integers(5, 36, seed=1)), ("linear_input_grad", integers(5, 40, seed=2)))
    for dtype in (torch.float32, torch.bfloat16):
        for name, values in calls:
            results = []
            for most in (limit, 1):
                monkeypatch.setattr(linear, "DENSE_ELEMENTS", most)
                results.append(unsigned_zeros(subject.call(name, values.to(dtype), weight)))
            exact(results[1], results[0], name)
    assert len(linear.row_ranges(40, 36)) == 3


def test_a_step_waits_for_nothing_and_compiles_nothing_again(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However positions fall on experts: once its kernels are compiled, neither pass of the module waits for the device."""
    needs_cuda(subject, "waiting of experts")
    import triton

    monkeypatch.setenv("ARB_VALUE_CHECKS", "0")
    config = models.nano(shared_inner=48, expert_rank=16, width=32, head_dim=16).config
    parts = GraphContext(subject.ops, config, device=subject.device, dtype=torch.bfloat16, seed=11)
    moe = SharedProjectionMoE(parts)
    rng = torch.Generator().manual_seed(1)
    scattered = torch.randn(2, 64, 32, generator=rng)
    alike_BPD = scattered[:1, :1].expand(2, 64, 32)
    # Positions all over the experts, all on the same, and most on one.
    batches = [
        each.to(subject.device, torch.bfloat16) for each in (scattered, alike_BPD, alike_BPD + scattered / 4)
    ]
    compiled: list[str] = []
    loads = []

    def step(number: int, x_BPD: Tensor) -> None:
        x_BPD = x_BPD.clone().requires_grad_()
        with parts.voting.at(rate=1.0, step=number):
            moe(x_BPD).sum().backward()

    step(0, batches[0])
    hook = lambda *args, **kwargs: compiled.append(str(kwargs.get("repr") or kwargs.get("key")))  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, x_BPD in enumerate(batches, start=1):
            step(number, x_BPD)
            loads.append(moe.recorded[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled, f"compiled again: {compiled}"
    assert len({tuple(load.tolist()) for load in loads}) == len(loads), "the batches fell on experts alike"
    assert any((load == 0).any() for load in loads), "no expert was empty"
