"""What the suite did: which ops were compared, where, how, on how many examples, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest

from arbitor.reference.op_table import OP_TABLE


class Ledger:
    """Counts of one run of the suite."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        """The ops whose comparison was selected."""
        self.compared: Counter[str] = Counter()
        self.law_examples: Counter[str] = Counter()
        self.skipped: dict[str, str] = {}

    def counts(self) -> dict[str, dict]:
        """Return the counts as plain dictionaries, for another process."""
        return {name: dict(value) for name, value in vars(self).items()}

    def add(self, counts: dict[str, dict]) -> None:
        """Add the counts of another process of this run."""
        self.asked |= Counter(counts["asked"])
        self.compared.update(counts["compared"])
        self.law_examples.update(counts["law_examples"])
        self.skipped.update(counts["skipped"])

    def lines(self, implementation: str, where: str) -> list[str]:
        """Return the summary."""
        missing = [name for name in self.asked if not self.compared[name]]
        kinds = Counter(str(OP_TABLE[name].output) for name in self.compared)
        how = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
        lines = [
            f"implementation: {implementation}",
            f"where:          {where}",
            f"compared:       {len(self.compared)} of {len(self.asked)} ops ({how})"
            f" on {self.compared.total()} examples",
            f"laws:           {len(self.law_examples)} on {self.law_examples.total()} examples",
        ]
        if missing:
            lines.append(f"not compared:   {', '.join(missing)}")
        lines += [f"skipped:        {what}: {reason}" for what, reason in self.skipped.items()]
        return lines


LEDGER = Ledger()
"""The ledger of this process."""


class Failures:
    """A plugin that appends each failure to a file as soon as it is known: of a test, and of a file that cannot be imported."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Append the file's name and what it raised."""
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Append the test's name and what it raised."""
        self._note(report)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{report.nodeid}, {report.when}\n{report.longreprtext}\n\n")


def skip(what: str, reason: str) -> NoReturn:
    """Leave a test out, with a reason that the summary prints."""
    LEDGER.skipped[what] = reason
    pytest.skip(reason)
