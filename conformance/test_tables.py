"""Tables for kernels that update several weights: kept for later calls, dropped in time, and never one that a recording reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from arbitor.optimized.kernels import codebook, together
from conformance.subject import Subject, weight_of

CPU = torch.device("cpu")
MOST = 3


@pytest.fixture(autouse=True)
def few_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep a few tables alone, and none of another test."""
    monkeypatch.setattr(together, "MOST_TABLES", MOST)
    monkeypatch.setattr(together, "_TABLES", {})
    monkeypatch.setattr(together, "_RECORDED", set())
    yield


def table(number: int) -> torch.Tensor | None:
    found = together.table_of([[number, 2 * number]], CPU)
    return None if found is None else found.tensor


def test_a_table_is_made_once() -> None:
    assert table(1) is table(1)


def test_the_latest_table_is_kept_however_many_there_were() -> None:
    for number in range(5 * MOST):
        made = table(number)
        assert made is not None and made.tolist() == [[number, 2 * number]]
        assert made is table(number), "the table of a call is made anew in the next one"
        assert len(together._TABLES) <= MOST


def test_a_recording_takes_what_is_there_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if there are as many such tables as are kept of others."""
    recorded = [table(number) for number in range(MOST)]
    with monkeypatch.context() as patch:
        patch.setattr(together, "is_recorded", lambda device: True)
        assert table(MOST) is None
        assert all(table(number) is recorded[number] for number in range(MOST))
    for number in range(MOST, 5 * MOST):
        table(number)
    assert all(table(number) is recorded[number] for number in range(MOST))
    assert len(together._TABLES) <= 2 * MOST


def test_weights_that_come_and_go_leave_few_tables(subject: Subject) -> None:
    """Each has memory of its own, which a table names."""
    kept = [weight_of(subject, 4, 12) for _ in range(4 * MOST)]
    for weight in kept:
        subject.raw("apply_steps")((weight,))
    assert len(together._TABLES) <= MOST


def test_probes_stay_where_a_recorded_graph_reads_them() -> None:
    """However many kinds of buckets there are."""
    first = codebook.probe_sets(1, 1, CPU)
    for sign_bits in range(2, 14):
        for num_probes in range(1, 8):
            codebook.probe_sets(sign_bits, min(num_probes, 2**sign_bits), CPU)
    assert codebook.probe_sets(1, 1, CPU) is first
