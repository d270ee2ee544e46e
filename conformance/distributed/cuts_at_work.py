"""What ranks find out together of a stack of matrices that is cut, so that each rank owns some. See `ranks_at_work`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from arbitor.optimized.distributed.world import World
from arbitor.reference.constants import VOTED_IN
from conformance.distributed.at_work import (
    RATE,
    digest_of,
    handed_on,
    random_ids,
    ranks_of,
    take_steps,
    together,
)
from conformance.training import nano

CUT = replace(nano.NANO, num_experts=7, top_k=2, expert_rank=35, shared_inner=40)
"""A model whose experts are no equal parts. Each expert is whole bytes of the canonical form, so that the reference cuts it too."""


def cuts_stacks(world: World, folder: Path) -> Any:
    """Rows of the stacks of experts that each rank owns, and bytes of their accumulators in memory; who goes on with the state; and
    whether a pass that raises leaves a vote."""
    model = together(CUT, world)
    take_steps(model, world, 2)
    stacks = {name: each for name, each in model.ternary_modules().items() if ".moe.expert_" in name}
    hashes = handed_on(model, world)
    losses = model.losses(world.share(random_ids(2)))
    try:
        with model.voting.taking(rate=RATE, step=2):
            model.voting.ranks.part(sum(losses.values())).backward()  # type: ignore[union-attr, arg-type]
            model.voting.ranks.finish()
            wrote = model.voting.current is not None and model.voting.current.wrote
            raise KeyError
    except KeyError:
        pass
    return {
        "owned": {
            name: list(map(list, ranks_of(model).owned[each.tensor_id])) for name, each in stacks.items()
        },
        "kept": {
            name: [
                each.weight.shape[1],
                *(
                    tensor.untyped_storage().nbytes()
                    for part, tensor in each.own_rows().tensors().items()
                    if part in VOTED_IN
                ),
                *(each.get_buffer(part).untyped_storage().nbytes() for part in sorted(VOTED_IN)),
            ]
            for name, each in stacks.items()
        },
        "hashes": hashes,
        "wrote": wrote,
        "undone": digest_of(model) == hashes[0],
    }
