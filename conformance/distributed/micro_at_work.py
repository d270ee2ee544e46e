"""What ranks find out together of steps of several micro-batches, whose gradients are summed. See `ranks_at_work`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.layers import Multiplier
from conformance.distributed.at_work import (
    BATCH,
    RATE,
    Place,
    digest_of,
    model_of,
    ranks_of,
    together,
)
from conformance.distributed.cuts_at_work import CUT
from conformance.training import nano
from conformance.training.runs import train_until_killed

ACCUM = 3
"""Micro-batches of a step."""

CASES: dict[str, tuple[ArbConfig, torch.dtype]] = {
    "float32": (nano.NANO, torch.float32),
    "bfloat16": (nano.NANO, torch.bfloat16),
    "running means": (nano.MEANS, torch.float32),
    "stacks of several owners": (CUT, torch.float32),
}
"""Models, and the dtypes in which gradients are summed."""


def sums_micro_batches(world: World, folder: Path) -> Any:
    """The state after two steps of whole-number gradients, by the ranks and by one process that votes with their sum; and bytes.

    No sum is rounded, so that no order of them can be told from another. The bytes are those that a rank received in each pass and
    step.
    """
    found = {}
    for name, (config, dtype) in CASES.items():
        model, alone = together(config, world, dtype), model_of(config, dtype)
        ranks, exchanged = ranks_of(model), []
        draws = torch.Generator().manual_seed(7)
        for step in range(2):
            last = ACCUM * step + ACCUM - 1
            sums: dict[str, torch.Tensor] = {}
            for number in range(ACCUM * step, last + 1):
                grads = [drawn(model, draws) for _ in range(world.count)]
                ranks.measured()
                with model.voting.taking(rate=RATE, step=number, accum=ACCUM, undo=False):
                    vote(model, grads[world.number])
                exchanged.append(ranks.measured()[1])
                for of_rank in grads:
                    for of, grad in of_rank.items():
                        sums[of] = sums.get(of, 0) + grad
            model.step()
            exchanged.append(ranks.measured()[1])
            with alone.voting.taking(rate=RATE, step=last):
                vote(alone, sums)
            alone.step()
        digests = [digest_of(model), digest_of(alone)]
        found[name] = {"digests": digests, "exchanged": exchanged, "waits": model.voting.waits}
    return found


def drawn(model: ArbModel, draws: torch.Generator) -> dict[str, torch.Tensor]:
    """Return a gradient of whole numbers for each matrix."""
    return {
        name: torch.randint(-2, 3, module.weight.shape, generator=draws).float().to(Place.device)
        for name, module in model.ternary_modules().items()
        if isinstance(module, Multiplier)
    }


def vote(model: ArbModel, grads: dict[str, torch.Tensor]) -> None:
    """Let weights vote in the pass that is open, whatever their uses."""
    weights = model.ternary_modules()
    for name, grad in grads.items():
        module = weights[name]
        module.uses = 1
        matrices = getattr(module, "num_groups", 1) if getattr(module, "orthogonal", False) else 0
        module.vote(grad.clone(), num_matrices=matrices)


def trains_in_micro_batches(world: World, folder: Path) -> Any:
    """The hashes of a run with sums, of the same that was killed and went on, and of one whose micro-batches vote by themselves."""
    asked = TrainOptions(
        preset="nano", data=str(folder / "text.txt"), device=Place.device, steps=4, batch=BATCH, accum=ACCUM,
    )  # fmt: skip
    whole = train(replace(asked, save=False)).summary  # type: ignore[type-var]
    begun = replace(asked, run=folder / "micro", save_interval=2)  # type: ignore[type-var]
    train_until_killed(3, begun)
    resumed = train(TrainOptions(run=folder / "micro", resume=True)).summary
    votes = train(replace(asked, save=False, accum_votes=True)).summary  # type: ignore[type-var]
    return [each["state_sha256"] for each in (whole, resumed, votes)]
