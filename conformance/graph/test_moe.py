"""Both paths of the mixture of experts give one result. Only experts in use vote, and large weights are taken in parts.

Legend: M slots (rows of activations), N outputs, K inputs, E experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import TernaryLinear, layers
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.grouped import TernaryGroupedLinear, numbered
from arbitor.reference.graph.moe import SharedProjectionMoE, all_shares, chosen_shares
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance.compare import alike, exact, unsigned_zeros
from conformance.graph import models
from conformance.report import needs_cuda, skip
from conformance.subject import Subject, weight_of


def context(
    *,
    dtype: torch.dtype = torch.float32,
    ops: Any = reference_ops,
    device: torch.device | str = "cpu",
    **fields: Any,
) -> GraphContext:
    config = models.nano(theta=2, theta_e=3, **fields).config
    return GraphContext(ops, config, device=device, dtype=dtype, seed=11)


def integers(*shape: int, seed: int) -> Tensor:
    """Return floats whose products and sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def on(subject: Subject) -> tuple[Any, torch.device]:
    """Return the ops of a subject, with weights that the reference draws, and where they run."""
    return models.drawn_by_the_reference(subject.ops), subject.device


def both_paths(**fields: Any) -> list[tuple[GraphContext, SharedProjectionMoE]]:
    """Return the same module on the grouped and on the dense path."""
    made = []
    for dense_max in (0, 1000):
        parts = context(dense_dispatch_max_tokens=dense_max, **fields)
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


MANY = (
    [[0, 3], [0, 1], [1, 3], [0, 3], [0, 1]],
    [[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.5, 0.25], [0.5, 0.5]],
)
FEW = ([[3]], [[0.75]])
"""Experts and shares of some positions, none of which chose expert 2. FEW has so few slots of 8 experts that none is sorted."""

INNER = 6


@pytest.mark.parametrize(
    ("vote_rule", "num_experts", "chosen"),
    [("stochastic", 4, MANY), ("sign", 4, MANY), ("stochastic", 8, FEW)],
    ids=["stochastic", "sign", "few slots"],
)
def test_both_paths_cast_the_same_votes(
    subject: Subject, vote_rule: str, num_experts: int, chosen: tuple[Any, Any]
) -> None:
    """On exact sums both paths agree bit for bit. An expert that no position chose keeps every byte in both.

    The op set under test must also leave what the reference leaves.
    """
    # Few rows, as the interpreter votes and steps row by row.
    fields = {"vote_rule": vote_rule, "num_experts": num_experts, "shared_inner": INNER, "expert_rank": 3}
    states = []
    for ops, device in ((reference_ops, torch.device("cpu")), on(subject)):
        for parts, moe in both_paths(ops=ops, device=device, **fields):
            states.append(state_after_a_vote(parts, moe, *chosen))
    for state in states[1:]:
        exact(state, states[0])


def state_after_a_vote(parts: GraphContext, moe: SharedProjectionMoE, chosen: Any, shares: Any) -> Any:
    """Let the experts of a module vote and step on exact sums. Return the gradient of the input and the weights of the experts."""
    experts_Mk, shares_Mk = (torch.tensor(value, device=parts.device) for value in (chosen, shares))
    experts, unused = (moe.expert_down, moe.expert_up), slice(2 * INNER, 3 * INNER)
    before = canonical(moe.expert_up)
    x_MD = integers(len(chosen), 24, seed=1).to(parts.device).requires_grad_()
    with parts.voting.taking(rate=2.0, step=0, size=3):
        y_MI = moe.modulations(x_MD, experts_Mk, shares_Mk).sum(dim=-2)
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


def test_only_few_positions_take_the_dense_path() -> None:
    asked: list[int] = []

    def watched(x: Tensor, weight: Any, experts: Tensor, *, num_groups: int) -> Tensor:
        asked.append(experts.numel())
        return reference_ops.grouped_linear(x, weight, experts, num_groups=num_groups)

    parts = context(ops=models.ops_with(grouped_linear=watched), dense_dispatch_max_tokens=6)
    moe = SharedProjectionMoE(parts)
    for positions in (3, 4):
        moe(torch.ones(2, positions, 24))
    assert asked == [24, 24, 16, 16]


def test_shares_are_a_softmax_over_the_chosen_experts() -> None:
    logits = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))
    chosen = logits.topk(3, dim=-1).indices.sort(dim=-1).values
    shares = all_shares(chosen, chosen_shares(logits, chosen), 6)
    want = logits.masked_fill(~(shares > 0), -torch.inf).softmax(dim=-1)
    alike(shares, want)
    assert ((shares > 0).sum(dim=-1) == 3).all()


def test_the_share_of_a_single_expert_is_its_part_of_all() -> None:
    logits = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(2))
    chosen = logits.argmax(dim=-1, keepdim=True)
    alike(chosen_shares(logits, chosen), logits.softmax(dim=-1).amax(dim=-1, keepdim=True))
    assert chosen_shares(logits.to(torch.bfloat16), chosen).dtype == torch.bfloat16


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

    def kept(grad: Tensor, x: Tensor) -> Tensor:
        result = reference_ops.linear_weight_grad(grad, x)
        found[tuple(result.shape)] = result
        return result

    parts = context(
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
        moe = SharedProjectionMoE(context(ops=ops, device=device, num_experts=5))
        handicap_E = moe.get_buffer("handicap")
        handicap_E.copy_(torch.tensor(before))
        one = torch.tensor([[[0, 4], [0, 4]]], device=device)
        two = torch.tensor([[[1, 2], [0, 4], [1, 4]]], device=device)
        moe.count_passes([(one,), (two,)])
        exact(handicap_E.cpu(), torch.tensor(after, dtype=torch.int16))
        exact(moe.get_buffer("load").cpu(), torch.tensor([3, 2, 1, 0, 4]))


def test_moves_of_a_handicap_are_bounded_and_cut_towards_0() -> None:
    """Of 33 choices an expert with all but one has 4.8 times its share and moves by 16; a hundredth too much is no move."""
    moe = SharedProjectionMoE(context(num_experts=5))
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
    parts = context(dtype=torch.float64, top_k=2)
    moe = SharedProjectionMoE(parts)
    x_BPD = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        modulations = moe.modulations

        def watched(x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
            found.extend((experts, shares))
            return modulations(x, experts, shares)

        patch.setattr(moe, "modulations", watched)
        moe(x_BPD)
        moe.get_buffer("handicap")[1] = 32767
        moe(x_BPD)
    before, _, after, shares = found
    assert (before == 1).any() and not (after == 1).any()
    logits = moe.router(x_BPD).gather(-1, after)
    alike(shares, logits.softmax(dim=-1))


def test_handicaps_even_out_the_load() -> None:
    """A router whose rows favour one expert: without a handicap it is chosen always, after some steps as often as the others."""
    parts = context(num_experts=4, top_k=1)
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
    """With fewer slots than experts and with more, the op set under test leaves what the reference leaves."""
    results = []
    for ops, device in ((reference_ops, torch.device("cpu")), on(subject)):
        config = models.nano(theta=5, theta_e=3, vote_rule=vote_rule).config
        parts = GraphContext(ops, config, device=device, dtype=torch.float32, seed=7)
        layer = TernaryGroupedLinear(parts, 6, 13, 5)
        slots, outputs = torch.tensor(experts, device=device), []
        for step in range(2):
            x = integers(len(experts), 13, seed=step).to(device).requires_grad_()
            y = layer(x, slots)
            with parts.voting.taking(rate=2.0, step=step, size=2):
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
            with parts.voting.taking(rate=2.0, step=step, size=3):
                (grouped(plain(x), experts) * integers(count, 6, seed=5)).sum().backward()
            found += [plain.weight.clone(), grouped.weight.clone()]
            plain.step_weight()
            grouped.step_weight()
        states.append((*found, plain.weight, grouped.weight))
        # One output of every expert is the least part.
        row = 20 * min(count, 5)
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


class Work(TorchDispatchMode):
    """Notes what is asked of the device while it is active: launches of Triton, and ops of torch with the shapes they return.

    asked:    all of it in its order, as comparable values.
    launches: of these the kernels, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any]] = []
        self.launches: list[str] = []
        self.launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What the interpreter does with torch is no work of a GPU.
        if not self.launching:
            made = result if isinstance(result, (tuple, list)) else (result,)
            self.asked.append((str(func), [tuple(each.shape) for each in made if isinstance(each, Tensor)]))
        return result

    def launch(self, kernel: Any, grid: Any, run: Any) -> Any:
        """Note a launch, then have it run."""
        self.asked.append((kernel.fn.__name__, grid))
        self.launches.append(kernel.fn.__name__)
        self.launching = True
        try:
            return run()
        finally:
            self.launching = False


@contextmanager
def watched_work() -> Iterator[Work]:
    """Note the work of the device, kernels included, compiled or interpreted."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def noting(run: Any, work: Work) -> Any:
        return lambda kernel, *args, grid, **kwargs: work.launch(
            kernel, grid, lambda: run(kernel, *args, grid=grid, **kwargs)
        )

    with pytest.MonkeyPatch.context() as patch, Work() as work:
        patch.setenv("ARB_VALUE_CHECKS", "0")
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", noting(kind.run, work))
        yield work


def needs_launches(subject: Subject) -> None:
    """Leave a test of launches out where they are not Triton's."""
    if subject.name != "arbitor.optimized.ops":
        skip("launches of experts", f"it counts those of arbitor.optimized.ops, not of {subject.name}")


WAITING = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select")
"""Parts of the names of torch's ops that wait for the device. They return a number, or a shape that values decide."""

SORTING = ("_count_slots_kernel", "_place_slots_kernel")
"""The launches that bring slots in the order of their experts, before the launch that multiplies."""

SPREADS = {
    "sorted": (4, [[0] * 9, [3] * 9, [0, 1, 2, 3, 0, 1, 2, 3, 0], [2, 0, 2, -1, 0, 0, -1, 2, 2], [-1] * 9]),
    "few": (16, [[7, 7], [0, 15], [15, -1], [-1, -1]]),
}
"""Spreads of slots over experts: all on one, even, some experts and slots unused, none used. Slots of `few` are not sorted."""


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_is_one_launch_however_slots_fall(
    subject: Subject, kind: str, dtype: torch.dtype
) -> None:
    """And nothing else that is asked of the device depends on it either."""
    needs_launches(subject)
    num_groups, spreads = SPREADS[kind]
    num_rows, num_columns, count = 5, 13, len(spreads[0])
    weight = weight_of(subject, num_groups * num_rows, num_columns)
    x = integers(count, num_columns, seed=1).to(subject.device, dtype)
    grad = integers(count, num_rows, seed=2).to(subject.device, dtype)
    for name, operands in (
        ("grouped_linear", (x, weight)),
        ("grouped_linear_input_grad", (grad, weight)),
        ("grouped_linear_weight_grad", (grad, x)),
    ):
        done = []
        for spread in spreads:
            experts = torch.tensor(spread, device=subject.device)
            with watched_work() as work:
                subject.raw(name)(*operands, experts, num_groups=num_groups)
            products = [launch for launch in work.launches if launch not in SORTING]
            assert len(products) == 1, f"{name} of slots {spread}: {work.launches}"
            done.append(work)
        same_work(done, name)


def test_a_gate_is_one_launch_forward_and_one_backward(subject: Subject) -> None:
    """One launch makes the gradients of gate, up and terms. All terms have one gradient, and no copy of it is made."""
    needs_launches(subject)
    gate, up, grad = (integers(3, 5, seed=seed).to(subject.device) for seed in range(3))
    terms = integers(3, 2, 5, seed=3).to(subject.device)
    leaves = [each.requires_grad_() for each in (gate, up, terms)]
    with watched_work() as work:
        found = torch.autograd.grad(subject.raw("gated")(*leaves), leaves, grad)
    assert work.launches == ["_gated_kernel", "_gated_grads_kernel"]
    exact(found[:2], subject.raw("gated_grads")(grad, *(leaf.detach() for leaf in leaves))[:2])
    assert found[2].stride(1) == 0 and found[2].shape == terms.shape


@pytest.mark.parametrize("count", [3, 9])
def test_votes_of_experts_take_one_launch_a_part(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With fewer slots than experts and with more, parts follow from the shape of the weight, and other work from shapes too."""
    needs_launches(subject)
    # A part is two of six outputs of each of five experts.
    monkeypatch.setattr(layers, "VOTE_ELEMENTS", 2 * 5 * 14)
    layer = TernaryGroupedLinear(
        context(ops=models.drawn_by_the_reference(subject.ops), device=subject.device), 5, 14, 6
    )
    x, grad = (integers(count, width, seed=width).to(subject.device) for width in (14, 6))
    places, done = torch.arange(count, device=subject.device), []
    for experts in (places * 0, places % 5, places % 2 * 4 - 1, places * 0 - 1):
        leaf = x.clone().requires_grad_()
        with layer.voting.taking(rate=2.0, step=0), watched_work() as work:
            layer(leaf, experts).backward(grad)
        assert work.launches.count("_grouped_weight_grad_kernel") == 3, work.launches
        assert work.launches.count("_packed_product_kernel") == 2, work.launches
        done.append(work)
    same_work(done, "a pass of a grouped linear")


def same_work(done: list[Work], what: str) -> None:
    """Fail unless all of some work is the same, and none of it waits for the device."""
    for index, work in enumerate(done):
        waits = [name for name, _ in work.asked if any(part in name for part in WAITING)]
        assert not waits, f"{what}, spread {index}, waits in {waits}"
        assert work.asked == done[0].asked, f"{what}: spreads {index} and 0 ask for other work"


@pytest.mark.parametrize(
    ("positions", "fields"),
    [
        (64, {}),
        # 4 slots are so few that none is sorted.
        (1, {"num_experts": 32}),
        (64, {"dense_dispatch_max_tokens": 2 * 64}),
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


def uneven_batches(positions: int) -> list[Tensor]:
    """Return batches [2, P, 32] whose positions are all over the experts, on others, all on the same, and most on one."""
    scattered = torch.randn(2, positions, 32, generator=torch.Generator().manual_seed(1))
    alike_BPD = scattered[:1, :1].expand(2, positions, 32)
    return [scattered, -scattered, alike_BPD, alike_BPD + scattered / 4]
