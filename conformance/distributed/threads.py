"""Ranks that are threads of one process, which deal and add up their tensors at a barrier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from torch import Tensor

from arbitor.reference.graph.ranks import Ranks
from conformance.system.command import TIMEOUT


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, number: int, table: list[Sequence[Tensor]], barrier: Barrier) -> None:
        self.number, self.count = number, len(table)
        self._table, self._barrier = table, barrier

    def dealt(self, parts: Sequence[Tensor]) -> list[Tensor]:
        assert len(parts) == self.count
        self._table[self.number] = parts
        self._barrier.wait(timeout=TIMEOUT)
        found = [of_rank[self.number].clone() for of_rank in self._table]
        self._barrier.wait(timeout=TIMEOUT)
        return found

    def total(self, values: Tensor) -> Tensor:
        first, *others = self.dealt([values] * self.count)
        for other in others:
            assert other.shape == first.shape and other.dtype == first.dtype
            first = first + other
        return first

    def divisor(self, chosen: Tensor) -> Tensor:
        return self.total(chosen.sum()).clamp(min=1) / self.count


def on_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what each of some ranks returns."""
    table: list[Sequence[Tensor]] = [()] * count
    barrier = Barrier(count)

    def guarded(ranks: Ranks) -> Any:
        try:
            return work(ranks)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(guarded, [ThreadRanks(number, table, barrier) for number in range(count)]))
