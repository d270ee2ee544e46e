"""Stored results: each case is in one file of its device, the one that measured it last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pytest_benchmark.utils import safe_dumps

from bench import parts
from bench.report import case_id


def supersede(older: Sequence[Path], newest: Path) -> None:
    """Take the cases of the newest file out of older ones, and remove a file that has no case left; other cases stay."""
    measured = {case_id(bench["fullname"]) for bench in json.loads(newest.read_text())["benchmarks"]}
    for path in older:
        stored = json.loads(path.read_text())
        kept = [bench for bench in stored["benchmarks"] if case_id(bench["fullname"]) not in measured]
        if not kept:
            path.unlink()
            continue
        reasons = stored.get("session", {}).get("without_a_number", {})
        missing = {test: reason for test, reason in reasons.items() if case_id(test) not in measured}
        if len(kept) == len(stored["benchmarks"]) and missing == reasons:
            continue
        stored["benchmarks"] = kept
        if reasons:
            stored["session"]["without_a_number"] = missing
        # As pytest-benchmark writes it, so that nothing else in the file changes.
        parts.write_text(path, safe_dumps(stored, ensure_ascii=True, indent=4))
