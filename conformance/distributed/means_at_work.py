"""What ranks find out together of the running means of gradients. See `ranks_at_work`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized.distributed.run import whole_state
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.averages import GradientAverage
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.types import has_memory
from conformance.distributed.at_work import (
    RATE,
    Place,
    handed_on,
    memory_of,
    model_of,
    ranks_of,
    take_steps,
    together,
)
from conformance.distributed.experts_at_work import WIDE
from conformance.training import nano

SPREAD = replace(WIDE, average_gradients=True)
"""A model whose experts are no equal parts, and have means."""

SLOTS, PASSES = 40, 2
"""Slots of a rank, so many that each expert has some, and passes, of which the second is led by the first."""


def means_of(model: ArbModel) -> dict[str, GradientAverage]:
    """Return the running means of a model, by the name of their weight."""
    found = {name: module.average for name, module in model.ternary_modules().items()}
    return {name: average for name, average in found.items() if isinstance(average, GradientAverage)}


def keeps_means(world: World, folder: Path) -> Any:
    """Which means a rank keeps after two steps; digests of them, of what rank 0 collects, and of who goes on with the state."""
    model = together(nano.MEANS, world)
    take_steps(model, world, 2)
    means, ranks = means_of(model), ranks_of(model)
    modules, state = model.ternary_modules(), whole_state(model)
    return {
        "owned": {name: ranks.steps(modules[name].tensor_id) for name in means},
        "kept": {
            name: [has_memory(table) for table in each.tables().values()] for name, each in means.items()
        },
        "led": {name: bool(each.get_buffer("mean").any()) for name, each in means.items()},
        "means": {name: state_sha256(each.tables()) for name, each in means.items()},
        "collected": state
        and {
            name: state_sha256({table: state[f"{name}.average.{table}"] for table in each.tables()})
            for name, each in means.items()
        },
        "hashes": handed_on(model, world),
    }


def spreads_means(world: World, folder: Path) -> Any:
    """Means of experts that are spread over ranks, beside those of one process, after passes whose sums are exact.

    Activations and gradients are small whole numbers, so that no sum is rounded, whatever is summed where.
    """
    spread, alone = together(SPREAD, world, experts=True), model_of(SPREAD)
    for model in (spread, alone):
        stack = model.layers[0].moe_graph.moe.expert_up
        assert isinstance(stack, TernaryGroupedLinear)
        generator = torch.Generator().manual_seed(1)
        for step in range(PASSES):
            num_slots = SLOTS * world.count
            x, grad = (
                torch.randint(-3, 4, (num_slots, width), generator=generator).float().to(Place.device)
                for width in (stack.weight.shape[1], SPREAD.shared_inner)
            )
            chosen = torch.randint(-1, 7, (num_slots,), generator=generator).to(Place.device)
            if model is spread:
                x, grad, chosen = (each.chunk(world.count)[world.number] for each in (x, grad, chosen))
            with model.voting.taking(rate=RATE, step=step, undo=False):
                stack(x.requires_grad_(), chosen).backward(grad)
    found, wanted = whole_state(spread), alone.state()
    names = [name for name in wanted if ".expert_up.average." in name]
    return {
        "same": found and {name: torch.equal(found[name], wanted[name].cpu()) for name in names},  # type: ignore[arg-type, union-attr]
        "led": all(bool(wanted[name].any()) for name in names),  # type: ignore[union-attr]
        "kept": {
            name: [memory_of(means_of(model)[name]) for model in (alone, spread)]
            for name, module in spread.ternary_modules().items()
            if module.spread is not None
        },
        "hashes": handed_on(spread, world, experts=True),
    }
