"""Bits per byte of a model on fixed windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel

NATS_PER_BIT = math.log(2)
"""One bit is this many nats; losses are nats per byte, reports bits per byte."""


def validation_bpb(model: ArbModel, windows_WT: torch.Tensor, *, batch: int, device: str) -> float | None:
    """Return the mean bits per predicted byte over all windows.

    Args:
        model: its weights are only read.
        windows_WT: int64 [W, T], on the CPU; places 3 to T - 1 of each window are predicted.
        batch: windows at a time, over all ranks. Each rank of the model takes a part of the windows.
        device: where the model is.

    Returns:
        Bits per byte, or None where a loss is not finite.
    """
    ranks = model.voting.ranks
    pieces = windows_WT.split(max(1, batch // ranks.count))
    nats_of_pieces = torch.zeros(len(pieces), dtype=torch.float64)
    with torch.no_grad():
        for i in range(ranks.number, len(pieces), ranks.count):
            windows_BT = pieces[i]
            nats_of_pieces[i] = model.loss(windows_BT.to(device)).item() * windows_BT.shape[0]
    # In the order of the pieces, whoever computed them.
    nats = sum(ranks.total(nats_of_pieces).tolist())
    bpb = nats / windows_WT.shape[0] / NATS_PER_BIT
    return bpb if math.isfinite(bpb) else None
