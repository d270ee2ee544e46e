"""Every family of the op table is complete. A missing piece fails with a sentence that names the family and the piece."""

from __future__ import annotations

import importlib
import inspect

import pytest

from arbitor.reference import ops as reference_ops
from conformance.families import CASES, FAMILIES, FILES, LAWS, MUTANTS, REFUSALS, REFUSES_NOTHING
from conformance.import_lint import ROOT
from conformance.subject import Subject


def missing(family: str) -> list[str]:
    """Return a sentence for each piece of the reference and of the suite that a family of the table lacks."""
    files = {stem for stem, owner in FILES.items() if owner == family}
    laws = [
        law for law in LAWS.values() if law.file in files and not law.name.startswith("test_refusals_of_")
    ]
    page = ROOT / "docs" / "spec" / f"{family}.md"
    lines = page.read_text().splitlines() if page.exists() else []
    headings = {line.strip("# `\n") for line in lines if line.startswith("#")}
    pieces = {
        f"the page docs/spec/{family}.md": page.exists(),
        f"the file conformance/ops/test_{family}.py": bool(files),
        "a law: a function under @law in its file": bool(laws),
    }
    for op in FAMILIES[family]:
        function = getattr(reference_ops, op, None)
        home = getattr(inspect.getmodule(function), "__name__", None)
        pieces |= {
            f"`{op}` among what arbitor.reference.ops exports": op in reference_ops.__all__,
            f"`{op}` in reference/ops/{family}.py": home == f"arbitor.reference.ops.{family}",
            f"the heading `{op}` in docs/spec/{family}.md": op in headings,
            f"calls of `{op}` to compare: a function under @calls": op in CASES,
            f'a mutant that comparing `{op}` rejects: one with compared="{op}"': any(
                op in mutant.compared for mutant in MUTANTS.values()
            ),
            f"a call that `{op}` refuses": op in REFUSES_NOTHING or any(case.op == op for case in REFUSALS),
            f"the golden vector conformance/vectors/{op}.json": (
                ROOT / "conformance" / "vectors" / f"{op}.json"
            ).exists(),
        }
    return [f"family `{family}` lacks {piece}" for piece, present in pieces.items() if not present]


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
