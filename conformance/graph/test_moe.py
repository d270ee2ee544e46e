"""Both paths of the mixture of experts give one result, shares and load are those of the rule, and a step waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph.adapters import attach
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import fan_out
from arbitor.reference.graph.moe import DENSE_RANKS, FEW_POSITIONS, SharedProjectionMoE
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance.compare import alike, exact, unsigned_zeros
from conformance.graph import models
from conformance.graph.models import integers, on, quick_context
from conformance.subject import Subject, needs_cuda


def both_paths(**fields: Any) -> list[tuple[GraphContext, SharedProjectionMoE]]:
    """Return the same module on the grouped and on the dense path."""
    made = []
    for dense_max in (0, 1000):
        parts = quick_context(dense_dispatch_max_tokens=dense_max, **fields)
        made.append((parts, SharedProjectionMoE(parts)))
    return made


@pytest.mark.parametrize(
    ("op_set", "top_k"), [("reference", 1), ("reference", 2), ("reference", 4), ("subject", 2)]
)
def test_both_paths_give_the_same(request: pytest.FixtureRequest, op_set: str, top_k: int) -> None:
    """The output and the gradient of the input, through shares and router as well."""
    ops, device = on(request.getfixturevalue(op_set))
    # Kernels know no float64.
    dtype = torch.float64 if op_set == "reference" else torch.float32
    results = []
    for _, moe in both_paths(top_k=top_k, dtype=dtype, ops=ops, device=device):
        x_BPD = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        x_BPD.requires_grad_()
        y_BPD = moe(x_BPD)
        y_BPD.square().sum().backward()
        results.append((y_BPD.detach(), x_BPD.grad))
    for got, want, what in zip(*results, ("y", "dx"), strict=True):
        alike(got, want, what)


MANY = [[0, 3], [0, 1], [1, 3], [0, 3], [0, 1]]
FEW = [[3]]
"""Experts of some positions, none of which chose expert 2. FEW has so few slots of 8 experts that none is sorted.

Equal logits give shares of 1 / 2 to two chosen experts, and of 1 / 8 to a single one of 8, on which all sums are exact.
"""

INNER = 6


@pytest.mark.parametrize(
    ("vote_rule", "num_experts", "chosen"),
    [("stochastic", 4, MANY), ("sign", 4, MANY), ("stochastic", 8, FEW)],
    ids=["stochastic", "sign", "few slots"],
)
def test_both_paths_cast_the_same_votes(
    subject: Subject, vote_rule: str, num_experts: int, chosen: list[list[int]]
) -> None:
    """On exact sums both paths agree bit for bit. An expert that no position chose keeps every byte in both.

    The op set under test must also leave what the reference leaves.
    """
    # Few rows, as the interpreter votes and steps row by row.
    fields = {"vote_rule": vote_rule, "num_experts": num_experts, "shared_inner": INNER, "expert_rank": 3}
    states = []
    for ops, device in ((reference_ops, torch.device("cpu")), on(subject)):
        for parts, moe in both_paths(ops=ops, device=device, **fields):
            states.append(state_after_a_vote(parts, moe, chosen))
    for state in states[1:]:
        exact(state, states[0])


def state_after_a_vote(parts: GraphContext, moe: SharedProjectionMoE, chosen: list[list[int]]) -> Any:
    """Let the experts of a module vote and step on exact sums. Return the gradient of the input and the weights of the experts."""
    experts_Mk = torch.tensor(chosen, device=parts.device)
    experts, unused = (moe.expert_down, moe.expert_up), slice(2 * INNER, 3 * INNER)
    before = canonical(moe.expert_up)
    x_MD = integers(len(chosen), 24, seed=1).to(parts.device).requires_grad_()
    logits_ME = torch.zeros(len(chosen), moe.num_experts, device=parts.device)
    with parts.voting.taking(rate=2.0, step=0, size=3):
        if moe.takes_all(len(chosen)):
            (ranks_MR,) = fan_out(x_MD, moe.expert_down)
            y_MI = moe.all_modulations(ranks_MR, logits_ME, experts_Mk)
        else:
            y_MI = moe.modulations(x_MD, logits_ME, experts_Mk).sum(dim=-2)
        (y_MI * integers(len(chosen), INNER, seed=2).to(parts.device)).sum().backward()
    voted = canonical(moe.expert_up)
    assert voted.trit_accum.any() and canonical(moe.expert_down).trit_accum.any()
    exact(voted.trit_accum[unused], before.trit_accum[unused], "expert 2")
    for module in experts:
        module.step_weight()
    after = canonical(moe.expert_up)
    exact(trits_of(after)[unused], trits_of(before)[unused], "expert 2")
    assert not torch.equal(trits_of(after), trits_of(before)), "no trit moved"
    return unsigned_zeros(x_MD.grad.cpu()), canonical(moe.expert_down), after


def canonical(module: TernaryGroupedLinear) -> TernaryWeight:
    """Return a copy of a module's weight in canonical form, on the CPU."""
    return module.ops.to_spec(module.weight).to("cpu").clone()


def test_the_path_follows_from_sizes() -> None:
    """Many positions of experts with few ranks take all experts, and so do up to `dense_dispatch_max_tokens` positions."""
    asked: list[int] = []

    def watched(x: Tensor, weight: Any, experts: Tensor, *, num_groups: int) -> Tensor:
        asked.append(experts.numel())
        return reference_ops.grouped_linear(x, weight, experts, num_groups=num_groups)

    def slots_of(positions: int, **fields: int) -> list[int]:
        asked.clear()
        parts = quick_context(ops=models.ops_with(grouped_linear=watched), **fields)
        SharedProjectionMoE(parts)(torch.ones(2, positions, 24))
        return list(asked)

    few, ranks = FEW_POSITIONS // 2, DENSE_RANKS // 4
    assert slots_of(few) == [4 * few] * 2 and slots_of(few + 1) == []
    assert slots_of(few + 1, expert_rank=ranks) == [] and slots_of(few + 1, expert_rank=ranks + 1) != []
    assert slots_of(3, dense_dispatch_max_tokens=6) == [] and slots_of(4, dense_dispatch_max_tokens=6) != []


def test_an_adapter_of_experts_asks_for_the_chosen_alone() -> None:
    moe = SharedProjectionMoE(quick_context())
    assert moe.takes_all(1000)
    attach(moe, targets="expert_up", rank=2)
    assert not moe.takes_all(1000)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_however_many_experts_are_chosen(top_k: int) -> None:
    """With one expert chosen the router has a gradient. A softmax over a single logit is constant and has none."""
    model = models.nano(top_k=top_k)
    for step in range(3):
        model.backward(model.losses(models.random_ids(2, 12, seed=step)), rate=models.RATE, step=step)
        for layer in model.layers:
            counts = layer.moe_graph.moe.router.weight.trit_accum
            assert counts.count_nonzero() > counts.numel() / 2
        model.step()


@pytest.mark.parametrize("dense_max", [0, 1000])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_router_votes_with_the_gradient_of_plain_autograd(top_k: int, dense_max: int) -> None:
    """In float64, against dense matrices and the rule written out once more."""
    found: dict[tuple[int, ...], Tensor] = {}

    def kept(grad: Tensor, x: Tensor, **how: Any) -> Tensor:
        result = reference_ops.linear_weight_grad(grad, x, **how)
        found[tuple(result.shape)] = result
        return result

    parts = quick_context(
        ops=models.ops_with(linear_weight_grad=kept),
        dtype=torch.float64,
        top_k=top_k,
        dense_dispatch_max_tokens=dense_max,
    )
    moe = SharedProjectionMoE(parts)
    dense = {
        name: reference_ops.dequantize(module.weight, dtype=torch.float64)
        for name, module in moe.named_children()
    }
    router = dense["router"].requires_grad_()
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = x @ router.T
    chosen = reference_ops.choose_experts(x, moe.router.weight, top_k=top_k)
    is_chosen = torch.zeros_like(logits).scatter(-1, chosen, 1.0).to(torch.bool)
    over = torch.ones_like(is_chosen) if top_k == 1 else is_chosen
    shares = logits.masked_fill(~over, -torch.inf).softmax(dim=-1) * is_chosen
    down, up = dense["expert_down"].reshape(4, 5, 24), dense["expert_up"].reshape(4, 20, 5)
    modulation = torch.einsum("bpe,eir,erd,bpd->bpi", shares, up, down, x)
    h = torch.nn.functional.silu(x @ dense["gate"].T) * (x @ dense["up"].T)
    y = (h * (1 + modulation)) @ dense["down"].T
    y.square().sum().backward()
    with parts.voting.taking(rate=1.0, step=0):
        got = moe(x)
        got.square().sum().backward()
    alike(got.detach(), y.detach(), "y")
    assert router.grad.count_nonzero() == router.numel()
    alike(found[tuple(router.shape)], router.grad, "router")


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_experts_are_chosen_alike_in_one_pass_and_byte_by_byte(dtype: torch.dtype, top_k: int) -> None:
    """Of five equal experts the first are chosen, in one row as in many, though float products of them round differently."""
    chosen: list[Tensor] = []

    def watched(x: Tensor, weight: Any, **how: Any) -> Tensor:
        chosen.append(reference_ops.choose_experts(x, weight, **how))
        return chosen[-1]

    sizes = {"num_experts": 5, "top_k": top_k, "window": 8, "block": 4, "num_summaries": 2}
    model = models.nano(ops=models.ops_with(choose_experts=watched), dtype=dtype, **sizes)
    routers = [layer.moe_graph.moe.router for layer in model.layers]
    for router in routers:
        first = torch.zeros(5, dtype=torch.int64)
        trits, exponents = trits_of(router.weight)[first], router.weight.exponents[first]
        router.load(weight_of_trits(trits, exponents, 12, mantissa_bits=router.weight.mantissa_bits))
    ids_BT, lowest = models.random_ids(1, 40), torch.arange(top_k)
    with torch.no_grad():
        model(ids_BT)
        assert len(chosen) == 2 and all((experts == lowest).all() for experts in chosen)
        chosen.clear()
        ledger = model.new_ledger()
        for start, end in ((0, 3), *((place, place + 1) for place in range(3, 40))):
            ledger.retract()
            model(ids_BT[:, start:end], ledger=ledger)
    assert len(chosen) == 2 * 38 and all((experts == lowest).all() for experts in chosen)


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Ten choices, 3, 2, 1, 0 and 4 of them: a share of 2 is even, so the moves are 8, 0, -8, -16 and 16.
        ((0, 0, 0, 0, 0), (24, 16, 8, 0, 32)),
        ((100, 50, 8, 16, 0), (108, 50, 0, 0, 16)),
        ((1, 2, 3, 0, 32767), (25, 18, 11, 0, 32767)),
    ],
)
def test_a_handicap_grows_where_an_expert_had_more_than_its_share(
    subject: Subject, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """The choices of all passes of a step count together, and the least handicap is 0."""
    for ops, device in ((reference_ops, torch.device("cpu")), on(subject)):
        moe = SharedProjectionMoE(quick_context(ops=ops, device=device, num_experts=5))
        handicap_E = moe.get_buffer("handicap")
        handicap_E.copy_(torch.tensor(before))
        one = torch.tensor([[[0, 4], [0, 4]]], device=device)
        two = torch.tensor([[[1, 2], [0, 4], [1, 4]]], device=device)
        moe.count_passes([(one,), (two,)])
        exact(handicap_E.cpu(), torch.tensor(after, dtype=torch.int16))
        exact(moe.get_buffer("load").cpu(), torch.tensor([3, 2, 1, 0, 4]))


def test_moves_of_a_handicap_are_bounded_and_cut_towards_0() -> None:
    """Of 33 choices an expert with all but one has 4.8 times its share and moves by 16; a hundredth too much is no move."""
    moe = SharedProjectionMoE(quick_context(num_experts=5))
    moe.count_passes([(torch.tensor([[[0]] * 32 + [[1]]]),)])
    # 16 (5 - 33) / 33 is -13.6, and an expert without a choice moves by -16.
    assert moe.get_buffer("handicap").tolist() == [32, 3, 0, 0, 0]
    moe.get_buffer("handicap").zero_()
    counts = [101, 99, 100, 100, 100]
    chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    moe.count_passes([(chosen.reshape(1, -1, 1),)])
    assert moe.get_buffer("handicap").tolist() == [0] * 5


def test_a_handicap_counts_in_the_choice_and_not_in_the_shares() -> None:
    """An expert that was first for every vector is chosen by none with a large handicap. The others share by their own logits."""
    parts = quick_context(dtype=torch.float64, top_k=2)
    moe = SharedProjectionMoE(parts)
    x_BPD = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        modulations = moe.modulations

        def watched(x: Tensor, logits: Tensor, experts: Tensor) -> Tensor:
            found.extend((experts, logits))
            return modulations(x, logits, experts)

        patch.setattr(moe, "modulations", watched)
        moe(x_BPD)
        moe.get_buffer("handicap")[1] = 32767
        moe(x_BPD)
    before, _, after, logits = found
    assert (before == 1).any() and not (after == 1).any()
    alike(logits, moe.router(x_BPD))


def test_handicaps_even_out_the_load() -> None:
    """A router whose rows favour one expert: without a handicap it is chosen always, after some steps as often as the others."""
    parts = quick_context(num_experts=4, top_k=1)
    moe = SharedProjectionMoE(parts)
    trits, exponents = trits_of(moe.router.weight), torch.full_like(moe.router.weight.exponents, -12)
    trits[1:] = -trits[:1]
    trits[0] = 1
    bits = moe.router.weight.mantissa_bits
    moe.router.load(weight_of_trits(trits, exponents, 12, mantissa_bits=bits))
    x = torch.randn(1, 400, 24, generator=torch.Generator().manual_seed(1)) + 0.5
    loads = []
    for _ in range(80):
        experts = parts.ops.choose_experts(
            x, moe.router.weight, top_k=1, handicap_E=moe.get_buffer("handicap")
        )
        loads.append(torch.bincount(experts.flatten(), minlength=4))
        moe.count_passes([(experts,)])
    assert loads[0].max() > 300
    late = torch.stack(loads[-40:]).sum(dim=0) / (40 * 100)
    assert late.min() > 0.5 and late.max() < 2, late


@pytest.mark.parametrize(
    ("positions", "fields"),
    [
        (32, {}),
        # 4 slots are so few that none is sorted.
        (1, {"num_experts": 32}),
        (64, {}),
    ],
    ids=["grouped", "few slots", "dense"],
)
def test_a_step_waits_for_nothing_and_compiles_nothing_again(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, positions: int, fields: dict[str, int]
) -> None:
    """Once its kernels are compiled, neither pass of the module waits for the device, however positions fall on experts."""
    needs_cuda(subject, "waiting of experts")
    import triton

    monkeypatch.setenv("ARB_VALUE_CHECKS", "0")
    sizes = {"shared_inner": 48, "expert_rank": 16, "width": 32, "head_dim": 16, **fields}
    parts = GraphContext(
        subject.ops, models.nano(**sizes).config, device=subject.device, dtype=torch.bfloat16, seed=11
    )
    moe = SharedProjectionMoE(parts)
    batches = [batch.to(subject.device, torch.bfloat16) for batch in uneven_batches(positions)]
    compiled: list[str] = []
    loads = []

    def step(number: int, x_BPD: Tensor) -> None:
        x_BPD = x_BPD.clone().requires_grad_()
        with parts.voting.taking(rate=1.0, step=number):
            moe(x_BPD).sum().backward()

    step(0, batches[0])
    hook = lambda *args, **kwargs: compiled.append(str(kwargs.get("repr") or kwargs.get("key")))  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, x_BPD in enumerate(batches, start=1):
            step(number, x_BPD)
            parts.voting.deliver()
            loads.append(moe.ops.expert_load(moe.recorded[-1][0], num_groups=moe.num_experts))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled, f"compiled again: {compiled}"
    assert len({tuple(load.tolist()) for load in loads}) > 2, "the batches fell on experts alike"
    assert any((load == 0).any() for load in loads), "no expert was empty"
    assert moe.takes_all(2 * positions) == (positions == 64)


def uneven_batches(positions: int) -> list[Tensor]:
    """Return batches [2, P, 32] whose positions are all over the experts, on others, all on the same, and most on one."""
    scattered = torch.randn(2, positions, 32, generator=torch.Generator().manual_seed(1))
    alike_BPD = scattered[:1, :1].expand(2, positions, 32)
    return [scattered, -scattered, alike_BPD, alike_BPD + scattered / 4]
