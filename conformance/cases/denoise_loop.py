"""Calls to compare of the family denoise_loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis.strategies import SearchStrategy

from conformance.cases.case import Case

CASES: dict[str, SearchStrategy[Case]] = {}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {}
"""Sums of absolute terms of the ops that subtract."""
