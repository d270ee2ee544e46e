"""Five trits to a byte, and back."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("packing"))
def test_packing(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
