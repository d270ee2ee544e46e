"""What ranks find out of passes that are recorded. See `ranks_at_work`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed import ranks as ranks_module
from arbitor.optimized.distributed.world import World
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from conformance.distributed.at_work import RATE, Place, digest_of, random_ids, ranks_of, together
from conformance.distributed.cuts_at_work import CUT
from conformance.training import nano
from conformance.training.no_graphs import FIRST_BYTES, some_losses_are_not_finite, without_graphs
from conformance.training.runs import replays

STEPS = ("one pass", "one pass", "one pass", "two passes", "one pass", "one pass")
"""Steps of the passes that are counted. The first two are launched, and so is the step of two passes."""

LIVELY: dict[str, Any] = {"theta": 1, "theta_e": 1}

CASES: dict[str, tuple[ArbConfig, torch.dtype, str, int]] = {
    "every module": (replace(nano.WHOLE, average_gradients=True, **LIVELY), torch.float32, "full", 1),
    "stacks of several owners in eight bits": (replace(CUT, **LIVELY), torch.bfloat16, "mxint8", 1),
    "sums of micro-batches": (replace(CUT, average_gradients=True, **LIVELY), torch.bfloat16, "full", 2),
}
"""Models that are compared, their dtype, how gradients travel, and how many passes of a step are summed."""

REPLAYED_PASSES, REPLAYED_STEPS = 5, 3
"""What is replayed of these steps. A step is launched once before it is recorded."""


def replays_what_it_launches(world: World, folder: Path) -> Any:
    """Recorded passes and steps beside launched ones: nats, the state, bytes received, and what a loss of NaN on one rank does.

    Where tensors of a GPU do not travel by NCCL, and on CPUs, replays launch what was recorded.
    """
    return {name: compared(world, *case) for name, case in CASES.items()}


def parts_stepped(patch: pytest.MonkeyPatch, model: ArbModel) -> set[tuple[int, ...]]:
    """Return a set that fills with the tensor ids of the weights that this rank steps together."""
    found: set[tuple[int, ...]] = set()
    step_some = model.step_some

    def noted(tensor_ids: Sequence[int]) -> None:
        found.add(tuple(tensor_ids))
        step_some(tensor_ids)

    patch.setattr(model, "step_some", noted)
    return found


def compared(
    world: World, config: ArbConfig, dtype: torch.dtype, exchange: str, accum: int
) -> dict[str, Any]:
    """Return what passes of each kind come to, by its name, and how many replays there were."""
    found: dict[str, Any] = {}
    for kind in (Passes, RecordedPasses):
        with pytest.MonkeyPatch.context() as patch, values_vouched_for():
            # An owner has several pieces, each with a graph of its steps.
            patch.setattr(ranks_module, "PIECE_BYTES", 2**9)
            some_losses_are_not_finite(patch)
            replayed: list[Any]
            if Place.device == "cuda" and world.exchanges_over_nccl:
                replayed = replays(patch)
            else:
                replayed = []
                without_graphs(patch, replayed)
            model = together(config, world, dtype, exchange)
            stepped = parts_stepped(patch, model)
            passes = kind(model, accum=accum)
            ranks = ranks_of(passes.model)
            ranks.measured()
            nats, number = [], 0
            for step in STEPS:
                for _ in range(2 if step == "two passes" else 1):
                    nats.append(passes.take(ids_of(world, number), rate=RATE, step=number))
                    number += 1
                passes.step()
            # A refused pass that is replayed has exchanged gradients, and one that is launched has not.
            received, accepted = ranks.measured()[1], digest_of(passes.model)
            refused = passes.take(ids_of(world, number, refused=True), rate=RATE, step=number)
            passes.step()
            found["graphs of a step"] = len(getattr(passes, "_step_graphs", ()))
            found["parts of a step"] = len(stepped)
            passes.close()
            ranks.measured()
            found[kind.__name__] = {
                "recordings": len(ranks._traffic._recorded),
                "nats": nats,
                "received": received,
                "refused": refused,
                "states": [accepted, digest_of(passes.model)],
                "faults": int(passes.model.voting.faults),
            }
            found["replays"] = len(replayed)
    return found


def ids_of(world: World, number: int, *, refused: bool = False) -> Any:
    """Return the windows of this rank for a pass, whose loss is NaN on the last rank if it is to be refused."""
    ids_BT = random_ids(number)
    ids_BT[:, 0] = FIRST_BYTES["accepted"]
    ids_BT = world.share(ids_BT)
    if refused and world.number == world.count - 1:
        ids_BT[0, 0] = FIRST_BYTES["refused"]
    return ids_BT
