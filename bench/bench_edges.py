"""Sums over neighbours, their gradients, the update of neighbour tables; against torch's CSR product, index_add and gather."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("edges"))
def test_edges(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
