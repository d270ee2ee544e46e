"""Laws: properties that hold for every implementation, written once and run against good and broken ones.

`@law(name=strategy, ...)` turns `test_<op>_<law>(ops, name, ...)` into a pytest test of the implementation under test, and
files it in `LAWS`, where test_mutants.py finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy

from conformance.report import LEDGER
from conformance.subject import Subject

LAWS: dict[str, Law] = {}
"""Every law by name."""


@dataclass(frozen=True)
class Law:
    """A property of a set of ops: `body(ops, **drawn)` raises AssertionError where it does not hold."""

    name: str
    body: Callable[..., None]
    strategies: dict[str, SearchStrategy]
    share: float = 1.0

    def check(self, ops: Subject, *, examples: int | None = None, shrink: bool = True) -> None:
        """Run the law on drawn examples, as many as the profile says unless told."""
        if not self.strategies:
            LEDGER.law_examples[self.name] += 1
            self.body(ops)
            return
        count = max(1, round((examples or settings.default.max_examples) * self.share))
        phases = [phase for phase in settings.default.phases if shrink or phase != Phase.shrink]

        @settings(max_examples=count, phases=phases)
        @given(**self.strategies)
        def run(**drawn: Any) -> None:
            LEDGER.law_examples[self.name] += 1
            self.body(ops, **drawn)

        run()


def law(
    *, share: float = 1.0, **strategies: SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a law. `share` scales its number of examples: below 1 where one example is dear."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        entry = Law(body.__name__, body, strategies, share)
        assert entry.name not in LAWS, f"two laws are called {entry.name}"
        LAWS[entry.name] = entry

        def test(subject: Subject) -> None:
            entry.check(subject)

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        return test

    return decorate
