"""The suite must reject every broken implementation, and every law must reject one."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings

from conformance.cases import CASES, Case, compare
from conformance.law import LAWS
from conformance.mutants import MUTANTS, Mutant, build
from conformance.subject import Subject

for _file in sorted((Path(__file__).parent / "ops").glob("test_*.py")):  # importing files the laws
    importlib.import_module(f"conformance.ops.{_file.stem}")

LAW_EXAMPLES, COMPARISON_EXAMPLES = 200, 1000
"""Examples that a law or a comparison gets to find the fault; it stops at the first. A comparison draws whatever fits the
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
    [(mutant, law) for mutant in MUTANTS for law in mutant.rejected_by],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_law_rejects_mutant(mutant: Mutant, law: str) -> None:
    subject = broken(mutant)
    with pytest.raises((AssertionError, RuntimeError)):  # a crash is a failure too
        LAWS[law].check(subject, examples=LAW_EXAMPLES, shrink=False)
        raise AcceptedError(f"{law} accepts the mutant {mutant.name}")


@pytest.mark.parametrize(
    ("mutant", "op"),
    [(mutant, op) for mutant in MUTANTS for op in mutant.compared],
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
    named = {law for mutant in MUTANTS for law in mutant.rejected_by}
    assert named == set(LAWS), f"idle laws: {set(LAWS) - named}; unknown: {named - set(LAWS)}"


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
