"""Every family of the op table is complete. A missing piece fails with a sentence that names the family and the piece."""

from __future__ import annotations

import importlib

import pytest

from conformance.families import CASES, FAMILIES, FILES, REFUSALS, REFUSES_NOTHING, missing
from conformance.subject import Subject


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_complete(family: str) -> None:
    found = missing(family)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_has_a_row(family: str) -> None:
    """What the file of a family names as its ops is what the table names."""
    named = importlib.import_module(f"arbitor.reference.ops.{family}").__all__
    rowless = sorted(set(named) - set(FAMILIES[family]))
    assert not rowless, (
        f"family `{family}`: reference/op_table/{family}.py has no row for {', '.join(rowless)}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_implementation_has_the_ops_of_the_family(subject: Subject, family: str) -> None:
    absent = [op for op in FAMILIES[family] if op not in subject.ops.__all__ or not hasattr(subject.ops, op)]
    assert not absent, f"family `{family}`: {subject.name} does not export {', '.join(absent)}"


def test_every_file_belongs_to_a_family() -> None:
    strays = [f"conformance/ops/{stem}.py" for stem, family in FILES.items() if family is None]
    assert not strays, (
        f"{', '.join(strays)}: no family of the op table has this name, nor is it a part of one"
    )


def test_no_file_speaks_of_an_op_that_is_gone() -> None:
    known = {op for ops in FAMILIES.values() for op in ops}
    spoken_of = {*CASES, *REFUSES_NOTHING, *(case.op for case in REFUSALS)}
    assert spoken_of <= known, f"the op table has no row for {', '.join(sorted(spoken_of - known))}"


def test_an_op_refuses_something_or_nothing() -> None:
    both = REFUSES_NOTHING.keys() & {case.op for case in REFUSALS}
    assert not both, f"{', '.join(sorted(both))}: refuses calls, but is said to refuse nothing"
