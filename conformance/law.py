"""Laws are properties that hold for every implementation, written once and run against good and broken ones.

`@law(name=strategy, ..., rejects=[mutant, ...])` turns `test_<op>_<law>(ops, name, ...)` into a pytest test of the
implementation under test, and files it in `LAWS`, where test_mutants.py finds it and shows that it rejects its mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy

from .mutant import Mutant
from .report import LEDGER
from .subject import Subject

LAWS: dict[str, Law] = {}
"""Every law by name, as far as the files of families are imported (families.py imports all)."""


@dataclass(frozen=True)
class Law:
    """A property of a set of ops: `body(ops, **drawn)` raises AssertionError where it does not hold.

    file:       the file that states it, without its `.py`
    strategies: what is drawn for the body, by argument
    rejects:    the mutants that it must reject; a law that rejects none has no place in the suite
    share:      the part of the usual number of examples that it gets
    """

    name: str
    file: str
    body: Callable[..., None]
    strategies: dict[str, SearchStrategy]
    rejects: tuple[Mutant, ...]
    share: float = 1.0

    def check(self, ops: Subject, *, examples: int | None = None, shrink: bool = True) -> None:
        """Run the law on drawn examples, as many as the profile says unless told."""
        if not self.strategies:
            self.run(ops)
            return
        count = max(1, round((examples or settings.default.max_examples) * self.share))
        phases = [phase for phase in settings.default.phases if shrink or phase != Phase.shrink]

        @settings(max_examples=count, phases=phases)
        @given(**self.strategies)
        def run(**drawn: Any) -> None:
            self.run(ops, **drawn)

        run()

    def run(self, ops: Subject, **drawn: Any) -> None:
        """Run the law on one example. A failure names the ops that were called."""
        LEDGER.law_examples[self.name] += 1
        ops.called.clear()
        try:
            self.body(ops, **drawn)
        except AssertionError as failure:
            if ops.called:
                failure.add_note(f"{self.name} called {', '.join(dict.fromkeys(ops.called))} of {ops.name}")
            raise


def law(
    *, rejects: Sequence[Mutant], share: float = 1.0, **strategies: SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a law with what it rejects. `share` scales its number of examples, and is below 1 where one example is dear."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        file = body.__module__.rpartition(".")[2]
        test = filed(Law(body.__name__, file, body, strategies, tuple(rejects), share))
        test.__module__ = body.__module__
        return test

    return decorate


def filed(law: Law) -> Callable[..., None]:
    """File a law. Return the pytest test of it."""
    assert law.name not in LAWS, f"two laws are called {law.name}"
    LAWS[law.name] = law

    def test(subject: Subject) -> None:
        law.check(subject)

    test.__name__, test.__doc__ = law.name, law.body.__doc__
    return test
