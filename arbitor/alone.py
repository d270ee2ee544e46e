"""Whether a process trains a model alone, as a loop of one's own does."""

from __future__ import annotations

import torch

from arbitor.reference.graph.ranks import Ranks


def check_alone(ranks: Ranks) -> None:
    """Refuse a pass of one process of several whose votes nobody exchanges, by a RuntimeError: their weights would drift apart."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ranks.count == 1 and together and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            f"this process is one of {torch.distributed.get_world_size()}, but the votes of a loop of one's own are not exchanged "
            "between processes: train with `torchrun -m arbitor.train`, or without a process group"
        )
