"""Orthogonalised gradients; against the same iteration in plain torch."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("orthogonal"))
def test_orthogonal(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
