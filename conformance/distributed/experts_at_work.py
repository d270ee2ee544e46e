"""What ranks find out together that keep experts for each other. See `ranks_at_work`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arbitor.optimized.distributed import run
from arbitor.optimized.distributed.ranks import GroupRanks
from arbitor.optimized.distributed.run import whole_state
from arbitor.optimized.distributed.sizes import slots_received
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.graph import grouped
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.spread import Slots
from conformance.compare import alike
from conformance.distributed import oracle
from conformance.distributed.at_work import (
    BATCH,
    RATE,
    Place,
    digest_of,
    model_of,
    random_ids,
    take_pass,
    together,
    told,
)
from conformance.training import nano

EXPERTS = replace(nano.NANO, num_experts=7, top_k=2)
"""A model whose experts are no equal parts, and whose gradients vote as they are."""

WIDE = replace(EXPERTS, expert_rank=32, shared_inner=32)
"""One whose gradients of experts are made orthogonal, and whose parts are no whole bytes of the canonical form."""


def spreads_experts(world: World, folder: Path) -> Any:
    """Gradients of a model whose experts are spread over ranks, beside those of one process that has all windows and experts."""
    model, alone = together(WIDE, world, experts=True), model_of(WIDE)
    ours, theirs = oracle.watch_totals(model), oracle.watch_totals(alone)
    take_pass(model, world, 0)
    alone.backward(alone.losses(random_ids()), rate=RATE, step=0)
    stacks = {n: m for n, m in model.ternary_modules().items() if isinstance(m, TernaryGroupedLinear)}
    for name, total in ours.items():
        rows = stacks[name].spread.rows if name in stacks else slice(None)  # type: ignore[union-attr]
        wanted = theirs[name][rows.start : rows.stop]
        alike(total.cpu(), wanted.cpu(), name)
    model.step()
    take_pass(model, world, 1)
    model.step()
    state = whole_state(model)
    one = model_of(WIDE)
    if state is not None:
        one.load_state(state)
    given = [state]
    dist.broadcast_object_list(given, src=0)
    again = together(WIDE, world, experts=True)
    again.load_state(given[0])  # type: ignore[arg-type]
    twin = together(WIDE, world, experts=True)
    for step in range(2):
        take_pass(twin, world, step)
        twin.step()
    return {
        "compared": sorted(ours),
        "all": sorted(theirs),
        "hashes": [digest_of(model), state and state_sha256(one.state()), digest_of(again), digest_of(twin)],
        "kept": {
            name: [
                sum(each.untyped_storage().nbytes() for each in stack.buffers())
                for stack in (alone.get_submodule(name), part)
            ]
            for name, part in stacks.items()
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
            received = torch.tensor(ranks.measured()[1])
            keepers = stack.spread.keepers(chosen[chosen >= 0] * num_outputs)  # type: ignore[union-attr]
            elsewhere = int((keepers != world.number).sum())
            lengths = 5 * 8 * world.count * (world.count - 1)
            # A slot, its input and its gradients leave a rank, and what they become comes back.
            wanted = slots_received(elsewhere, columns, num_outputs, 4) + lengths
            bytes_ = [int(ranks.total(received)), int(ranks.total(torch.tensor(wanted)))]
        model.step()
        y, grad_x = (model.voting.ranks.everyone(each.detach()) for each in (y, x.grad))
        found.append((y.tolist(), grad_x.tolist(), digest_of(model)))
    return {"same": [one == other for one, other in zip(*found, strict=True)], "bytes": bytes_}


def trains_with_spread_experts(world: World, folder: Path) -> Any:
    """A run of two ranks, and what it is told that goes on without spreading."""
    if world.count != 2:
        return None
    options = TrainOptions(
        preset="whole",
        data=str(folder / "text.txt"),
        device=Place.device,
        steps=2,
        batch=BATCH,
        eval_windows=5,
    )
    options = replace(options, run=folder / "experts", shard_codes=True, shard_experts=True)  # type: ignore[type-var]
    dealt: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            grouped, "Slots", lambda experts_M, *more: dealt.append(len(experts_M)) or Slots(experts_M, *more)
        )
        train(options)
    other = told(lambda: train(TrainOptions(run=folder / "experts", resume=True, shard_experts=False)))
    return {"slots": len(dealt), "other": other}
