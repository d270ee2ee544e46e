"""Each use of a weight that a pass uses several times votes at its part of the rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.config import with_fields
from arbitor.reference.graph import TernaryEmbedding
from arbitor.reference.graph.model import LOSS_REFERENCE
from arbitor.reference.graph.voting import part_of_rate
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
def test_each_of_several_uses_votes_at_its_part_of_the_rate(fields: dict[str, Any]) -> None:
    """The rates at which a weight votes in one pass add up to the rate, for experts of the loop and matrices of the graph."""
    noting, rates = models.ops_noting_rates()
    config = with_fields(models.WHOLE, **fields)
    model = models.whole(config, ops=noting)
    rates.clear()
    model.backward(model.losses(models.random_ids(3, 24)), rate=models.RATE, step=2)
    tables = {m.tensor_id for m in model.ternary_modules().values() if isinstance(m, TernaryEmbedding)}
    matrices = {tensor_id: of_uses for tensor_id, of_uses in rates.items() if tensor_id not in tables}
    for of_uses in matrices.values():
        assert of_uses == [models.RATE / len(of_uses)] * len(of_uses)
    most = max(config.max_moe_iters, config.num_hops + bool(config.composite_codes))
    assert max(map(len, matrices.values())) == most and any(
        len(of_uses) == 1 for of_uses in matrices.values()
    )
    assert all(set(rates[tensor_id]) == {models.RATE} for tensor_id in tables & rates.keys())


def test_each_step_of_the_video_head_votes_at_its_part_of_the_rate() -> None:
    noting, rates = models.ops_noting_rates()
    model = models.whole(ops=noting)
    head, steps = model.video_head, model.config.video_steps
    assert head is not None and steps > 1
    rates.clear()
    tokens_BPD = torch.randn(2, 5, model.config.width, generator=torch.Generator().manual_seed(1))
    with model.voting.taking(rate=models.RATE, step=2):
        head(tokens_BPD, halt_threshold=None).square().sum().backward()
    for module in (head.latent_in, head.query, head.latent_out):
        assert rates[module.tensor_id] == [models.RATE / steps] * steps
    assert rates[head.steps.tensor_id] == [models.RATE]


@pytest.mark.parametrize("uses", [1, 2, 3, 7])
def test_a_rate_on_the_device_is_divided_alike(subject: Subject, uses: int) -> None:
    """The op gets the float32 nearest to the quotient, of a number and of a tensor. CUDA's own division by a number is off."""
    for value in [*torch.linspace(0.01, 127, 200).tolist(), 5.3, 0.1]:
        rate = torch.tensor(value, device=subject.device)
        # The quotient has enough bits in float64 to be rounded once.
        want = torch.tensor(float(rate) / uses, dtype=torch.float32).item()
        part = part_of_rate(rate, uses)
        # It stays where it is: a number would wait for the device.
        assert isinstance(part, torch.Tensor) and float(part) == want
        assert torch.tensor(part_of_rate(value, uses), dtype=torch.float32).item() == want


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
