"""Tables for kernels that update several weights: kept for later calls, dropped in time, and never one that a recording reads."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized.kernels import codebook, together
from arbitor.optimized.kernels.unpack import unpacked_together
from conformance.compare import exact
from conformance.subject import Subject, needs_cuda, needs_ours, weight_of

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


class Arrival:
    """Stands in for the event of a copy to a GPU."""

    here = False

    def query(self) -> bool:
        return self.here


def test_a_stream_waits_for_a_table_that_another_one_may_still_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in each launch until the table is known to be there. A recording may not wait for what is outside of it."""
    made, arrival, waited = table(1), Arrival(), []
    (sent,) = together._TABLES.values()
    sent.arrived = arrival  # type: ignore[assignment]
    stream = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for count in (1, 2):
        assert table(1) is made and waited == [arrival] * count
    with monkeypatch.context() as patch:
        patch.setattr(together, "is_recorded", lambda device: True)
        assert table(1) is made and waited == [arrival] * 2
    arrival.here = True
    for _ in range(2):
        assert table(1) is made and waited == [arrival] * 2 and sent.arrived is None


def test_another_stream_reads_no_table_before_it_is_there(subject: Subject) -> None:
    """The copy of a table waits for the earlier work of its stream. Another stream read what was in that memory before."""
    needs_ours(subject, "tables of kernels")
    needs_cuda(subject, "a table and two streams")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()

    def read(number: int, cycles: int) -> tuple[bool, list[list[int]]]:
        """Return what the second stream finds, and whether the first one still sleeps then."""
        rows = [[number, 2 * number]]
        with torch.cuda.stream(first):
            torch.cuda._sleep(cycles)
            asleep = first.record_event()
            together.table_of(rows, subject.device)
        with torch.cuda.stream(second):
            found = together.table_of(rows, subject.device)
            assert found is not None
            copied = found.tensor.clone()
        was_asleep = not asleep.query()
        torch.cuda.synchronize()
        return was_asleep, copied.tolist()

    # What waits for the device when it is done first: to take memory, and to load kernels.
    read(1, 1000)
    was_asleep, seen = read(2, 2**30)
    assert was_asleep, "the host waited for the first stream"
    assert seen == [[2, 4]]


def test_weights_that_come_and_go_leave_few_tables(subject: Subject) -> None:
    """Each has memory of its own, which a table names."""
    kept = [weight_of(subject, 4, 12) for _ in range(4 * MOST)]
    for weight in kept:
        subject.raw("apply_steps")((weight,))
    assert len(together._TABLES) <= MOST


def displaced(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, which begins an element after an address of sixteen bytes."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


IN_TABLES = {
    "counted": ("words", "trit_accum", "exponent_accum"),
    "stepped": ("words", "trit_accum", "exponents", "exponent_accum"),
    "unpacked": ("words", "exponents"),
}
"""The tensors of a weight that kernels find in a table, by what is done with weights."""


@pytest.mark.parametrize(("how", "name"), [(how, name) for how, names in IN_TABLES.items() for name in names])
def test_a_weight_may_lie_at_any_address(subject: Subject, how: str, name: str) -> None:
    """Kernels tell the compiler that the addresses of a table are aligned, where all of them are."""
    needs_ours(subject, "kernels that find weights in a table")
    grad_NK = torch.randn(16, 48, generator=torch.Generator().manual_seed(1)).to(subject.device)

    def made(*weights: Any) -> Any:
        if how == "unpacked":
            return unpacked_together(weights, [1, 1], torch.float32, row_multiple=1)
        if how == "stepped":
            optimized_ops.apply_steps(weights, theta=1, theta_e=1, out=weights)
        else:
            ids = (3, 4)
            optimized_ops.accumulate_gradients(
                weights, grad_NK, 1.0, seed=1, step=2, tensor_ids=ids, out=weights
            )
        return [optimized_ops.to_spec(weight) for weight in weights]

    def weight() -> Any:
        return weight_of(subject, 8, 48).with_tensors(
            trit_accum=torch.arange(-48, 336, device=subject.device).view(8, 48).remainder(3).to(torch.int8)
        )

    moved = weight()
    moved = moved.with_tensors(**{name: displaced(getattr(moved, name))})
    assert getattr(moved, name).data_ptr() % together.ALIGNED
    found, want = made(weight(), moved), made(weight(), weight())
    for place in range(2):
        exact(found[place], want[place], f"weight {place}")


def test_probes_stay_where_a_recorded_graph_reads_them() -> None:
    """However many kinds of buckets there are."""
    first = codebook.probe_sets(1, 1, CPU)
    for sign_bits in range(2, 14):
        for num_probes in range(1, 8):
            codebook.probe_sets(sign_bits, min(num_probes, 2**sign_bits), CPU)
    assert codebook.probe_sets(1, 1, CPU) is first
