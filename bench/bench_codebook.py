"""Nearest codes, exact and among candidates, and upkeep of a codebook; against chunked products and argmin."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("codebook"))
def test_codebook(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
