"""Ranks that are threads of one process, for tests of what ranks make of what they tell each other. They meet at a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from torch import Tensor

from arbitor.reference.graph.ranks import Ranks
from conformance.system.command import TIMEOUT


class Table:
    """Where each rank lays down what it has, and sees what the others have.

    Attributes:
        count: how many ranks there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._laid: list[Any] = [None] * count
        self._barrier = Barrier(count)

    def meet(self, number: int, given: Any) -> list[Any]:
        """Return what each rank gives, in the order of their numbers. Every rank must call this."""
        self._laid[number] = given
        self._barrier.wait(timeout=TIMEOUT)
        found = list(self._laid)
        self._barrier.wait(timeout=TIMEOUT)
        return found

    def leave(self) -> None:
        """Let the others wait for nobody."""
        self._barrier.abort()


def on_threads(count: int, work: Callable[[int, Table], Any]) -> list[Any]:
    """Return what `work` returns on each of some ranks. It is given the number of the rank, and the table."""
    table = Table(count)

    def guarded(number: int) -> Any:
        try:
            return work(number, table)
        except BaseException:
            table.leave()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(guarded, range(count)))


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, number: int, table: Table) -> None:
        self.number, self.count = number, table.count
        self._table = table

    def dealt(self, parts: Sequence[Tensor]) -> list[Tensor]:
        assert len(parts) == self.count
        found = [of_rank[self.number].clone() for of_rank in self._table.meet(self.number, parts)]
        # A rank may write to its parts once all have their copies.
        self._table.meet(self.number, None)
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
    return on_threads(count, lambda number, table: work(ThreadRanks(number, table)))
