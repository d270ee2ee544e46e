"""The suite must reject every broken implementation, and every law must reject one."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import Phase, given, settings

from conformance.case import Case, compare
from conformance.families import CASES, LAWS, MUTANTS
from conformance.law import Law
from conformance.mutant import Mutant, build, patched
from conformance.subject import Subject

LAW_EXAMPLES, COMPARISON_EXAMPLES = 200, 1000
"""Examples that a law or a comparison gets to find the fault. It stops at the first. A comparison draws whatever fits the
device, so that a rare coincidence (two infinities in one row) can take a while to turn up.
"""


class AcceptedError(Exception):
    """A broken implementation passed."""


@cache
def broken(mutant: Mutant) -> Subject:
    """Return a broken implementation."""
    return Subject(build(mutant), f"mutant {mutant.name}")


@pytest.mark.parametrize(
    ("mutant", "law"),
    [(mutant, law) for law in LAWS.values() for mutant in law.rejects],
    ids=lambda value: value.name,
)
def test_law_rejects_mutant(mutant: Mutant, law: Law) -> None:
    subject = broken(mutant)
    # A crash is a failure too.
    with pytest.raises((AssertionError, RuntimeError)):
        law.check(subject, examples=LAW_EXAMPLES, shrink=False)
        raise AcceptedError(f"{law.name} accepts the mutant {mutant.name}")


@pytest.mark.parametrize(
    ("mutant", "op"),
    [(mutant, op) for mutant in MUTANTS.values() for op in mutant.compared],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_comparison_rejects_mutant(mutant: Mutant, op: str) -> None:
    subject = broken(mutant)

    @settings(max_examples=COMPARISON_EXAMPLES, phases=[Phase.generate])
    @given(case=CASES[op])
    def run(case: Case) -> None:
        compare(subject, op, case)

    with pytest.raises((AssertionError, RuntimeError)):
        run()
        raise AcceptedError(f"comparing {op} accepts the mutant {mutant.name}")


def test_every_law_rejects_a_mutant() -> None:
    idle = [
        f"conformance/ops/{law.file}.py: {law.name} rejects no mutant"
        for law in LAWS.values()
        if not law.rejects
    ]
    assert not idle, "\n".join(idle)


def test_every_mutant_is_rejected() -> None:
    rejected = {mutant.name for law in LAWS.values() for mutant in law.rejects}
    accepted = [name for name, mutant in MUTANTS.items() if name not in rejected and not mutant.compared]
    assert not accepted, f"no law and no comparison rejects {', '.join(accepted)}"


def test_a_mutant_of_text_that_changed_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"mutant late: `x \+ 1` is found 0 times in norm\.py"):
        patched(Mutant("late", "norm", "x + 1", "x"), "return x + 2")
