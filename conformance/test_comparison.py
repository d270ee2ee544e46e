"""The generic comparison: every op of the table, against the reference, on drawn calls."""

from __future__ import annotations

import pytest
from hypothesis import given

from arbitor.reference.op_table import OP_TABLE

from .case import Case, compare
from .families import CASES
from .subject import Subject


@pytest.mark.parametrize("name", OP_TABLE)
def test_op_equals_reference(subject: Subject, name: str) -> None:
    # Before anything is drawn: there would be nothing to shrink.
    if not subject.has(name):
        pytest.fail(f"{subject.name} has no op `{name}`", pytrace=False)

    @given(case=CASES[name])
    def run(case: Case) -> None:
        compare(subject, name, case, count=True)

    run()
