"""One train step of a preset: loss, backward pass with votes, step."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("train_step"))
def test_train_step(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
