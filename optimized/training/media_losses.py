"""Means of the losses of a mix over batches, of those that are learned and of those that are held out.

Legend: B samples of a batch, T ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

from arbitor.optimized.training.evaluate import NATS_PER_BIT, in_turns
from arbitor.optimized.training.media_batch import Batch

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel

COMPONENTS = ("bytes", "route", "latent", "tokens")
"""Components of the loss that lines of metrics have."""


class Means:
    """The mean of each component of the loss over batches: over the predicted bytes for that of bytes, else over samples."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def add(self, batch: Batch, *parts: Mapping[str, float]) -> None:
        """Add the means of a batch by component. They may be in parts, which add up to them."""
        for name in parts[0]:
            count = batch.taught_bytes() if name == "bytes" else len(batch.ids_BT)
            self._counts[name] = self._counts.get(name, 0) + count
            self._sums.setdefault(name, []).extend(part[name] * count for part in parts)

    def predicted_bytes(self) -> int:
        """Return how many bytes the mean of that of bytes is over."""
        return self._counts.get("bytes", 0)

    def named(self, when: str) -> dict[str, float | None]:
        """Return the means by their names in lines of metrics: of bytes in bits, the others as they are, None where not finite.

        Args:
            when: how a name begins, ``train`` or ``val``.
        """
        found: dict[str, float | None] = {f"{when}_bpb": None}
        for name, sums in self._sums.items():
            count = self._counts[name]
            # Of texts of three bytes at most no byte is predicted.
            mean = math.fsum(sums) / count if count else math.nan
            metric, value = ("bpb", mean / NATS_PER_BIT) if name == "bytes" else (name, mean)
            found[f"{when}_{metric}"] = value if math.isfinite(value) else None
        return found


def mean_losses(model: ArbModel, batches: Iterable[Batch]) -> Means:
    """Measure a model on some batches, and return its mean losses.

    Each rank measures its parts of every batch, and all ranks return the same. Every rank must call this with the same batches.

    Args:
        model: its weights are only read.
        batches: of one kind.
    """
    means = Means()
    for batch in batches:
        parts = batch.parts(model.voting.ranks.count)
        sizes = [len(part.ids_BT) for part in parts]
        measure = partial(_losses_of_part, model, batch, parts)
        means.add(batch, *in_turns(model.voting.ranks, sizes, measure))
    return means


def _losses_of_part(
    model: ArbModel, batch: Batch, parts: Sequence[Batch], turn: Sequence[int]
) -> dict[str, float]:
    """Return the components of the loss of the part of this rank, by name. Those of all parts add up to those of the batch.

    Args:
        model: its weights are only read.
        batch, parts: a batch and its parts.
        turn: which part each rank reads now.
    """
    ranks = model.voting.ranks
    losses = model.losses(**parts[turn[ranks.number]].on(model.voting.faults.device))
    found = {}
    for name in COMPONENTS:
        if name in losses:
            # The sum of a rank is divided by the terms of all ranks over the number of ranks: `Ranks.divisor`.
            terms = sum(parts[i].terms()[name] for i in turn)
            share = Fraction(terms, ranks.count * max(batch.terms()[name], 1))
            found[name] = losses[name].item() * float(share)
    return found
