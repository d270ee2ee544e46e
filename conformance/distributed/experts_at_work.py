"""What ranks find out together that keep experts for each other. See `ranks_at_work`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed import run
from arbitor.optimized.distributed.ranks import GroupRanks
from arbitor.optimized.distributed.sizes import slots_received
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.graph import grouped
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.spread import Slots
from conformance.distributed.at_work import (
    RATE,
    Place,
    digest_of,
    handed_on,
    memory_of,
    model_of,
    received_by_all,
    take_pass,
    take_steps,
    together,
    told,
    voted_like_one,
    whole_run,
)
from conformance.training import nano

EXPERTS = replace(nano.NANO, num_experts=7, top_k=2)
"""A model whose experts are no equal parts, and whose gradients vote as they are."""

WIDE = replace(EXPERTS, expert_rank=32, shared_inner=32)
"""One whose gradients of experts are made orthogonal, and whose parts are no whole bytes of the canonical form."""


def spreads_experts(world: World, folder: Path) -> Any:
    """Gradients of a model whose experts are spread over ranks, beside those of one process that has all windows and experts."""
    model = together(WIDE, world, experts=True)
    alone, names = voted_like_one(model, world)
    model.step()
    take_pass(model, world, 1)
    model.step()
    twin = together(WIDE, world, experts=True)
    take_steps(twin, world, 2)
    stacks = {n: m for n, m in model.ternary_modules().items() if isinstance(m, TernaryGroupedLinear)}
    return {
        **names,
        "hashes": [*handed_on(model, world, experts=True), digest_of(twin)],
        "kept": {
            name: [memory_of(each) for each in (alone.get_submodule(name), stack)]
            for name, stack in stacks.items()
        },
        "few experts": told(lambda: run.spreads_over(nano.NANO, World(0, 3), codes=False, experts=True)),
    }


def votes_as_one_process(world: World, folder: Path) -> Any:
    """The state of an expert stack after a step whose sums are exact, and that of one process, and the bytes that were received.

    Activations and gradients are small whole numbers, so that no sum is rounded, whatever is summed where.
    """
    found = []
    for experts in (True, False):
        model = together(EXPERTS, world, experts=experts) if experts else model_of(EXPERTS)
        stack = model.layers[0].moe_graph.moe.expert_up
        assert isinstance(stack, TernaryGroupedLinear)
        generator = torch.Generator().manual_seed(1)
        num_slots, columns = 6 * world.count, stack.weight.shape[1]
        num_outputs = EXPERTS.shared_inner
        x = torch.randint(-3, 4, (num_slots, columns), generator=generator).float().to(Place.device)
        grad = torch.randint(-3, 4, (num_slots, num_outputs), generator=generator).float().to(Place.device)
        chosen = torch.randint(-1, 7, (num_slots,), generator=generator).to(Place.device)
        if experts:
            x, grad, chosen = (each.chunk(world.count)[world.number] for each in (x, grad, chosen))
        x.requires_grad_()
        ranks = model.voting.ranks
        if isinstance(ranks, GroupRanks):
            ranks.measured()
        with model.voting.taking(rate=RATE, step=0, undo=False):
            y = stack(x, chosen)
            y.backward(grad)
        if isinstance(ranks, GroupRanks):
            keepers = stack.spread.keepers(chosen[chosen >= 0] * num_outputs)  # type: ignore[union-attr]
            elsewhere = int((keepers != world.number).sum())
            lengths = 5 * 8 * world.count * (world.count - 1)
            # A slot, its input and its gradients leave a rank, and what they become comes back.
            wanted = slots_received(elsewhere, columns, num_outputs, 4) + lengths
            bytes_ = received_by_all(model, wanted)
        model.step()
        y, grad_x = model.voting.ranks.everyone([y.detach(), x.grad.detach()])
        found.append((y.tolist(), grad_x.tolist(), digest_of(model)))
    return {"same": [one == other for one, other in zip(*found, strict=True)], "bytes": bytes_}


def trains_with_spread_experts(world: World, folder: Path) -> Any:
    """A run whose ranks keep experts for each other, and what it is told that goes on without spreading."""
    options = replace(whole_run(folder), run=folder / "experts", shard_codes=True, shard_experts=True)  # type: ignore[type-var]
    dealt: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            grouped, "Slots", lambda experts_M, *more: dealt.append(len(experts_M)) or Slots(experts_M, *more)
        )
        train(options)
    other = told(lambda: train(TrainOptions(run=folder / "experts", resume=True, shard_experts=False)))
    return {"slots": len(dealt), "other": other}
