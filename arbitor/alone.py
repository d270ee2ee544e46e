"""The rank of a model that a process trains alone, as a loop of one's own does."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from arbitor.reference.graph.ranks import Ranks


class Alone(Ranks):
    """A rank that refuses passes in one process of several. Nobody would exchange their votes, and the weights would differ."""

    def part(self, loss: Tensor) -> Tensor:
        """See `Ranks`. Every pass begins with it. Raises RuntimeError in one process of several, as in a loop under torchrun."""
        count, way_out = _processes()
        if count > 1:
            raise RuntimeError(
                f"this process is one of {count}, but the votes of a loop of one's own are not exchanged between processes: train "
                f"with `torchrun -m arbitor.train`, or without {way_out}"
            )
        return super().part(loss)


def _processes() -> tuple[int, str]:
    """Return how many processes this one was joined or started with, and by what, in words."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), "a process group"
    asked = os.environ.get("WORLD_SIZE", "")
    return int(asked) if asked.isdecimal() else 1, "the variable WORLD_SIZE"
