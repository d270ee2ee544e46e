"""A weight that a pass uses several times votes with the sum of its gradients, or, where rows are chosen, in parts of the rate."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.config import with_fields
from arbitor.reference.graph import TernaryEmbedding, layers
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.model import LOSS_REFERENCE
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.voting import part_of_rate
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
@pytest.mark.parametrize(("slots", "want"), [([1, 5, 5], [1, 2]), ([5, 1, 1], [1, 1, 1]), ([5, 0, 5], [3])])
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
