"""Files of a run damaged at random are refused in a sentence, or do no harm. `python -m conformance.system.fuzz` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.system import fuzz
from conformance.training import nano


def test_damaged_files_of_a_run_do_no_harm(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nano.register(monkeypatch)
    ends = fuzz.mutated(finished, seed=20261128, count=60)
    # The mutations are of many kinds: some leave everything usable, and some a part of it.
    assert ends.total() == 60 and len(ends) > 1


def test_the_fuzzer_notices_what_is_no_sentence(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: object) -> None:
        raise KeyError("step")

    monkeypatch.setattr(fuzz, "read_metrics", raises)
    with pytest.raises(AssertionError, match=r"mutation 0 of seed 1 .*KeyError"):
        fuzz.mutated(finished, seed=1, count=1)
