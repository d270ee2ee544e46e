"""The denoise step, its backward pass, and the whole loop; against torch elementwise, and torch on dense weights."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("denoise"))
def test_denoise(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
