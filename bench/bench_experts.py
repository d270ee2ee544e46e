"""Grouped linear of experts: forward, both gradients, load; against torch's grouped product and a loop over experts."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("experts"))
def test_experts(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
