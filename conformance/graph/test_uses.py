"""A weight that a pass uses several times votes with the sum of its gradients, or, where rows are chosen, in parts of the rate."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.config import with_fields
from arbitor.reference.graph import TernaryEmbedding, TernaryLinear, layers, voting
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.model import LOSS_REFERENCE
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.graph.voting import part_of_rate
from arbitor.reference.types import TernaryWeight
from conformance.compare import exact
from conformance.graph import models
from conformance.subject import Subject


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_moe_iters": 3, "num_hops": 1},
        {"max_moe_iters": 1, "composite_codes": 0},
        # The graph computes the nodes that a batch needs, not the nodes of all codes.
        {"num_codes": 500, "num_hops": 3},
    ],
)
def test_a_weight_votes_once_whatever_its_uses(fields: dict[str, Any]) -> None:
    """With the whole rate, and as if one product had had the inputs and the gradients of all uses."""
    noting, rates = models.ops_noting_rates()
    gradients: dict[int, list[torch.Tensor]] = {}
    config = with_fields(models.WHOLE, orthogonal_steps=0, **fields)
    model = models.whole(config, ops=noting)
    rates.clear()
    several = {m.tensor_id: m for m in model.ternary_modules().values() if m.uses > 1}
    cast = model.voting.cast

    def note(voter: Any, gradient: Any) -> None:
        if voter.tensor_id in several and not gradient.chosen:
            gradients.setdefault(voter.tensor_id, []).append(gradient.grad_NK.clone())
        cast(voter, gradient)

    model.voting.cast = note
    before = {tensor_id: deepcopy(module.weight) for tensor_id, module in several.items()}
    model.backward(model.losses(models.random_ids(3, 24)), rate=models.RATE, step=2)
    tables = {m.tensor_id for m in model.ternary_modules().values() if isinstance(m, TernaryEmbedding)}
    matrices = {tensor_id: of for tensor_id, of in rates.items() if tensor_id not in tables}
    assert all(of == [models.RATE] for of in matrices.values())
    most = max(config.max_moe_iters, config.num_hops + bool(config.composite_codes))
    assert max(len(of) for of in gradients.values()) >= most > 1
    for tensor_id, of_uses in gradients.items():
        total = of_uses[0].clone()
        for grad in of_uses[1:]:
            total += grad
        clock = {"seed": model.voting.seed, "step": 2, "tensor_id": tensor_id}
        want = ops.accumulate_gradient(
            before[tensor_id], total, models.RATE, exponent_rule=config.exponent_rule, **clock
        )
        exact(several[tensor_id].weight, want)


def test_experts_that_the_batch_chose_vote_at_parts_of_the_rate() -> None:
    """Fewer slots than experts: turns choose other experts, and the rates at which a weight votes add up to the rate."""
    noting, rates = models.ops_noting_rates()
    model = models.whole(with_fields(models.WHOLE, max_moe_iters=3, num_experts=64), ops=noting)
    moe = model.layers[-1].moe_graph.moe
    rates.clear()
    model.backward(model.losses(models.random_ids(1, 4)), rate=models.RATE, step=2)
    of_experts = [rates[m.tensor_id] for m in moe.modules() if isinstance(m, TernaryGroupedLinear)]
    assert of_experts and any(of == [models.RATE / 3] * 3 for of in of_experts)


@pytest.mark.parametrize("most", [2**27, 100])
@pytest.mark.parametrize(
    ("slots", "want"),
    [([1, 5, 5], [1, 2]), ([5, 1, 1], [1, 1, 1]), ([5, 0, 5], [3]), ([1, 1, 1, 1, 5, 5], [1, 1, 1, 1, 2])],
)
def test_uses_in_which_the_batch_chose_experts_leave_the_others_their_part(
    monkeypatch: pytest.MonkeyPatch, most: int, slots: list[int], want: list[int]
) -> None:
    """As where ranks keep experts for each other, and few slots arrive in some turns. Rates add up to the rate in each part."""
    monkeypatch.setattr(layers, "VOTE_ELEMENTS", most)
    noting, rates = models.ops_noting_rates()
    model = models.whole(ops=noting)
    experts = TernaryGroupedLinear(model.context, 4, 16, 8)
    experts.uses = 3
    rates.clear()
    with model.voting.taking(rate=models.RATE, step=2):
        for count in slots:
            experts(torch.ones(count, 16), torch.arange(count) % 4).sum().backward()
        assert len(model.voting.current.sums) == len(list(layers.row_ranges(8, 64)))
    parts = len(list(layers.row_ranges(8, 64)))
    assert parts == 1 or most < 2**27
    assert sorted(rates[experts.tensor_id]) == sorted(models.RATE * share / 3 for share in want * parts)


def test_weights_that_vote_at_other_parts_of_the_rate_are_counted_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alike stacks whose gradients wait together leave what each leaves that votes by itself."""

    def voted(waiting: int) -> list[TernaryWeight]:
        monkeypatch.setattr(voting, "WAITING_ELEMENTS", waiting)
        model = models.whole()
        stacks = [TernaryGroupedLinear(model.context, 4, 32, 32) for _ in range(4)]
        draws = torch.Generator().manual_seed(3)
        with model.voting.taking(rate=models.RATE, step=2):
            for stack, uses, slots in zip(
                stacks, (3, 3, 2, 1), ([1, 5, 5], [5, 5, 5], [1, 5], [5]), strict=True
            ):
                stack.uses = uses
                for count in slots:
                    x = torch.randn(count, 32, generator=draws)
                    stack(x, torch.arange(count) % 4).square().sum().backward()
        return [stack.weight for stack in stacks]

    for got, want in zip(voted(2**25), voted(0), strict=True):
        exact(got, want)


def test_the_rest_of_a_pass_is_exchanged_in_the_order_of_weights_before_ranks_finish() -> None:
    """Sums to which a use is missing, whatever weight the backward pass came to last."""
    seen: list[Any] = []

    class Watched(Ranks):
        def exchange(self, tensor_id: int, *more: Any) -> None:
            seen.append(tensor_id)
            super().exchange(tensor_id, *more)

        def finish(self) -> None:
            seen.append("finish")

    model = models.whole()
    model.voting.ranks = Watched()
    linears = [TernaryLinear(model.context, 16, 8) for _ in range(3)]
    with model.voting.taking(rate=models.RATE, step=2):
        for place in (1, 2, 0):
            linears[place].uses = 2
            linears[place](torch.ones(3, 16)).sum().backward()
    assert seen == [*(layer.tensor_id for layer in linears), "finish"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sum_of_uses_is_rounded_to_the_dtype_of_the_gradients(dtype: torch.dtype) -> None:
    """A gradient that is made orthogonal in bfloat16 is summed in bfloat16, in the order in which uses come."""
    made: list[torch.Tensor] = []

    def note(grad_NK: torch.Tensor, **options: Any) -> torch.Tensor:
        made.append(grad_NK.clone())
        return ops.orthogonalize(grad_NK, **options)

    parts = models.quick_context(dtype=dtype, ops=models.ops_with(orthogonalize=note))
    layer = TernaryLinear(parts, 32, 32)
    layer.uses = 4
    # To 1 bfloat16 can add none of the others, of which each is half of its last place. Their sum it could.
    sizes = [1.0, 2**-8, 2**-8, 2**-8]
    with parts.voting.taking(rate=1.0, step=3):
        for size in sizes:
            layer(torch.ones(1, 32, dtype=dtype)).backward(torch.full((1, 32), size, dtype=dtype))
    want = torch.zeros((), dtype=dtype)
    for size in sizes:
        want = want + torch.tensor(size, dtype=dtype)
    assert float(want) == (1.0 if dtype is torch.bfloat16 else sum(sizes))
    (grad,) = made
    exact(grad, want.expand(32, 32).contiguous())


def test_parts_of_a_large_weight_are_summed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is made in parts leaves the state that it leaves whole."""

    def state(most: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(layers, "VOTE_ELEMENTS", most)
        model = models.whole(with_fields(models.WHOLE, orthogonal_steps=0, max_moe_iters=3))
        model.backward(model.losses(models.random_ids(3, 24)), rate=models.RATE, step=2)
        return dict(model.state())

    whole, parts = state(2**27), state(300)
    for name, tensor in whole.items():
        exact(parts[name], tensor, name)


def test_steps_of_the_video_head_vote_once() -> None:
    """Also if the loop ends before all steps are taken: what has come votes with the end of the pass."""
    noting, rates = models.ops_noting_rates()
    model = models.whole(ops=noting)
    head, steps = model.video_head, model.config.video_steps
    assert head is not None and steps > 1
    of_loop = (head.latent_in, head.query, head.latent_out)
    tokens_BPD = torch.randn(2, 5, model.config.width, generator=torch.Generator().manual_seed(1))
    for more in (0, 1):
        rates.clear()
        for module in of_loop:
            module.uses = steps + more
        with model.voting.taking(rate=models.RATE, step=2):
            head(tokens_BPD, halt_threshold=None).square().sum().backward()
        assert not rates.keys() - {m.tensor_id for m in head.modules() if isinstance(m, TernaryModule)}
        for module in (*of_loop, head.steps):
            assert rates[module.tensor_id] == [models.RATE]


@pytest.mark.parametrize(("uses", "shares"), [(1, 1), (2, 1), (3, 1), (7, 1), (3, 2), (7, 5)])
def test_a_rate_on_the_device_is_divided_alike(subject: Subject, uses: int, shares: int) -> None:
    """The op gets the float32 nearest to the quotient, of a number and of a tensor. CUDA's own division by a number is off."""
    for value in [*torch.linspace(0.01, 127, 200).tolist(), 5.3, 0.1]:
        rate = torch.tensor(value, device=subject.device)
        # The quotient has enough bits in float64 to be rounded once.
        want = torch.tensor(float(rate) * shares / uses, dtype=torch.float32).item()
        part = part_of_rate(rate, uses, shares)
        # It stays where it is: a number would wait for the device.
        assert isinstance(part, torch.Tensor) and float(part) == want
        assert torch.tensor(part_of_rate(value, uses, shares), dtype=torch.float32).item() == want


def test_the_sign_rule_casts_every_vote_in_full() -> None:
    """The sign rule has no rate to divide, so two turns of the loop vote twice, with the size that the loss gives."""
    sizes: dict[int, list[int]] = {}

    def record(weight: Any, votes: torch.Tensor, **kwargs: Any) -> Any:
        sizes.setdefault(kwargs["tensor_id"], []).append(int(votes.abs().max()))
        return ops.accumulate(weight, votes, **kwargs)

    config = replace(models.WHOLE, vote_rule="sign", max_moe_iters=2)
    model = models.whole(config, ops=models.ops_with(accumulate=record))
    sizes.clear()
    loss = model.losses(models.random_ids(3, 24))
    model.backward(loss, rate=models.RATE, step=2)
    size = ops.step_from_loss(model.objective(loss).item(), LOSS_REFERENCE, config.max_vote_step)
    gate = model.layers[-1].moe_graph.moe.gate
    assert gate.uses == 2 and sizes[gate.tensor_id] == [size, size]
