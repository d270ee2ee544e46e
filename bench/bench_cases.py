"""Every case: ops of the table, an update step, train steps. `pytest bench -k linear` takes a family, an op, a shape or a peer."""

from __future__ import annotations

from typing import Any

import pytest

from bench import cases
from bench.runner import Session, measure


@pytest.mark.parametrize("case", cases.ids())
def test_case(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
