"""Tensors on their way between ranks: how many at a time, how long a rank waits for them, and what graphs of them count."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from arbitor.optimized.distributed import ranks as ranks_module
from arbitor.optimized.distributed import traffic, world
from arbitor.optimized.distributed.ranks import GroupRanks
from arbitor.optimized.distributed.run import begin_measuring, measured
from conformance.compare import exact
from conformance.distributed.threads import Table, on_threads
from conformance.graph import models


def test_exchanges_end_when_too_much_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ends first, and no more end than have to: what has ended is under way no more."""
    monkeypatch.setattr(traffic, "PENDING_BYTES", 100)
    sent, ended, seen = traffic.Traffic(world.World(0, 2), on_gpu=lambda: False), [], []
    for number, size in enumerate((40, 60, 30, 70, 10)):
        sent.later(size, partial(ended.append, number))
        seen.append(list(ended))
    assert seen == [[], [], [0], [0, 1], [0, 1, 2]]
    sent.end_all()
    assert ended == [0, 1, 2, 3, 4] and sent._pending == 0
    sent.later(100, partial(ended.append, 5))
    sent.forget()
    sent.end_all()
    assert len(ended) == 5 and sent._pending == 0


class Event:
    """Stands in for an event of a GPU, which has passed what it was given so far as `done` says."""

    recorded: ClassVar[int] = 0
    done: ClassVar[int] = 0

    def __init__(self, *, enable_timing: bool, external: bool) -> None:
        assert enable_timing
        self.at, self.external = 0, external

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def query(self) -> bool:
        return self.at <= Event.done

    def synchronize(self) -> None:
        Event.done = max(Event.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return 1000.0 * (end.at - self.at)


def test_waiting_of_a_gpu_is_counted_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events do not pile up until somebody asks for the sum, and none is asked before the GPU has passed it."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "done", 0)
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    for number in range(100):
        Event.done = max(Event.recorded - 4, 0)
        sent.gathered(torch.tensor(number))
        assert len(sent._events) <= 3
    assert sent.measured() == (100.0, 0) and not sent._events
    assert sent.measured() == (0.0, 0)


def test_waiting_is_a_share_of_the_time_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank waited while it validated, before its steps, made a share of more than 1."""
    now = 0.0
    monkeypatch.setattr(traffic, "time", SimpleNamespace(perf_counter=lambda: now))
    model = models.nano()
    ranks = GroupRanks(model, world.World())

    def wait(seconds: float) -> None:
        nonlocal now
        with ranks._traffic._waiting():
            ranks._traffic._receive(100)
            now += seconds

    wait(10.0)
    begin_measuring(model)
    wait(6.0)
    now += 2.0
    assert measured(model, steps=4) == {"waiting_share": 0.75, "exchanged_bytes": 25.0}


def test_a_replay_counts_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and waits of recorded exchanges count for each replay, the waits as those of the last one, and are counted once."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "done", 0)
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    with sent.recording() as recorded:
        for _ in range(2):
            with sent._waiting():
                sent._receive(7)
    assert all(event.external for events in recorded.waits for event in events)
    # What is recorded has not run.
    assert sent.measured() == (0.0, 0)
    with sent._waiting():
        sent._receive(5)
    for _ in range(3):
        recorded.replay()
    assert sent.measured() == (1.0 + 3 * 2.0, 5 + 3 * 14)
    assert sent.measured() == (0.0, 0)
    # Also where the GPU has not come to the end of the last replay.
    monkeypatch.setattr(Event, "done", 0)
    recorded.replay()
    assert sent.measured() == (2.0, 14)


@pytest.mark.parametrize("asked", [True, False])
def test_recordings_whose_graphs_are_gone_leave(asked: bool) -> None:
    """Their last replays are counted, whether or not somebody asks before the next recording."""
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    total = 0
    for again in range(5):
        with sent.recording() as recorded:
            sent._receive(7)
        for _ in range(again):
            recorded.replay()
        recorded.close()
        if asked:
            total += sent.measured()[1]
        assert len(sent._recorded) == (0 if asked else 1)
    assert total + sent.measured()[1] == 7 * (0 + 1 + 2 + 3 + 4)
    assert not sent._recorded


def test_a_recording_that_failed_is_none() -> None:
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    with pytest.raises(RuntimeError), sent.recording():
        raise RuntimeError("no memory")
    sent._receive(5)
    assert sent.measured() == (0.0, 5)


def test_tensors_that_all_ranks_see_travel_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their dtypes and shapes, and in the order in which they were given."""
    given = [
        [
            torch.tensor([[1, 2, 3]], dtype=torch.int8) + rank,
            torch.tensor([2.0**40, -1.0]).double() + rank,
            torch.tensor([rank == 0]),
            torch.empty(0, 2),
            torch.tensor([[7], [9]], dtype=torch.int32) + rank,
            torch.tensor([3], dtype=torch.int64) + rank,
        ]
        for rank in range(2)
    ]

    def seen(number: int, table: Table) -> tuple[int, list[Tensor]]:
        ranks, exchanged = GroupRanks(models.nano(), world.World(number, 2)), []

        def gathered(_: traffic.Traffic, tensor: Tensor) -> list[Tensor]:
            exchanged.append(tensor)
            # As they arrive, one behind the other.
            return list(torch.stack(table.meet(number, tensor)).unbind())

        ranks._traffic.gathered = gathered.__get__(ranks._traffic)  # type: ignore[method-assign]
        found = list(ranks.everyone(given[number]))
        assert not list(ranks.everyone([]))
        return len(exchanged), found

    assert [exchanges for exchanges, _ in on_threads(2, seen)] == [1, 1]
    # An int64 does not fit behind the others.
    monkeypatch.setattr(ranks_module, "TOGETHER_BYTES", 3 + 16 + 1 + 8 + 7)
    for exchanges, found in on_threads(2, seen):
        assert exchanges == 2
        for each, *of_ranks in zip(found, *given, strict=True):
            exact(each, torch.cat(of_ranks))
