"""Memory: rows of n-grams, and the strengths of rows; no library has either."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("memory"))
def test_memory(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
