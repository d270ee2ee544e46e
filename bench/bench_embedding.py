"""Rows of a ternary table, and the gradients of those used; against torch's dense table."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("embedding"))
def test_embedding(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
