"""Ternary conv1d and its backward passes; against torch's in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("conv"))
def test_conv(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
