"""The rank of a model that a process trains alone, as a loop of one's own does."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference.graph.ranks import Ranks


class Alone(Ranks):
    """A rank that refuses passes in one process of several. Nobody would exchange their votes, and the weights would differ."""

    def part(self, loss: Tensor) -> Tensor:
        """See `Ranks`. Every pass begins with it. Raises RuntimeError in one process of several, as in a loop under torchrun."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if together and torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                f"this process is one of {torch.distributed.get_world_size()}, but the votes of a loop of one's own are not "
                "exchanged between processes: train with `torchrun -m arbitor.train`, or without a process group"
            )
        return super().part(loss)
