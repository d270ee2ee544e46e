"""Ranks that are threads of one process, for tests of what ranks make of what they tell each other. They meet at a table."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

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
