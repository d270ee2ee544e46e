"""Attention of one position to a cache of latents; against torch's, on the same latents and on a cache of heads."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import ids_of
from bench.runner import Session, measure


@pytest.mark.parametrize("case", ids_of("attention"))
def test_attention(benchmark: Any, bench_session: Session, case: str) -> None:
    measure(benchmark, bench_session, case)
