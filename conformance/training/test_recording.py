"""Branches of a CUDA graph that is being recorded: which streams they take, and that they end. Streams stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from arbitor.optimized.training import recording
from arbitor.optimized.training.recording import BRANCHES, side_by_side


class Stream:
    """A stream that notes for which others it has waited."""

    made = 0

    def __init__(self, device: int = 0) -> None:
        Stream.made += 1
        self.device_index, self.name = device, Stream.made
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Stream]:
    """What returns the current stream, of which a recording is under way."""
    streams = [Stream()]

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    def now() -> Stream:
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(recording, "_branches", {})
    return now


def streams_of(current: Callable[[], Stream], count: int) -> list[Stream]:
    """Return the streams on which pieces run."""
    found: list[Stream] = []
    side_by_side([lambda: found.append(current())] * count)
    return found


def test_branches_of_all_recordings_take_the_same_streams(current: Callable[[], Stream]) -> None:
    """They begin behind their stem, which goes on behind them. Some pieces of many share a branch."""
    stem, made = current(), Stream.made
    found = streams_of(current, 3)
    assert len({each.name for each in found}) == 3 and stem not in found
    assert all(each.waited == [stem] for each in found) and stem.waited == found
    many = streams_of(current, 2 * BRANCHES)
    assert many[:3] == found and many[BRANCHES:] == many[:BRANCHES]
    assert streams_of(current, 2) == found[:2] and Stream.made == made + BRANCHES


def test_a_piece_alone_stays_on_its_stem(current: Callable[[], Stream]) -> None:
    assert streams_of(current, 1) == [current()]


def test_branches_of_branches_share_no_stream(current: Callable[[], Stream]) -> None:
    """Two of them that did would run one after the other."""
    found: list[list[Stream]] = []
    side_by_side([lambda: found.append(streams_of(current, 2))] * 3)
    outer = streams_of(current, 3)
    assert len({each.name for each in (*outer, *(each for inner in found for each in inner))}) == 9
    for stem, inner in zip(outer, found, strict=True):
        assert stem.waited[1:-1] == inner and all(each.waited == [stem] for each in inner)


@pytest.mark.parametrize("is_broken", [False, True])
def test_branches_end_where_a_piece_raises(
    current: Callable[[], Stream], monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    """A recording that ends with an open branch says so, and nothing of what was raised. Nor may the end of a branch hide it."""
    stem, ran = current(), []

    def broken(_: Stream) -> None:
        raise RuntimeError("the recording is no longer valid")

    def raises() -> None:
        ran.append(current())
        if is_broken:
            stem.wait_stream = broken  # type: ignore[method-assign]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side([partial(ran.append, None), raises])
    assert len(ran) == 2 and current() is stem
    if not is_broken:
        assert stem.waited[-1] is ran[1] and len(stem.waited) == 2


def test_nothing_is_launched_in_the_stream_of_a_recording(
    current: Callable[[], Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a library keeps for it ends with any of its graphs in some releases of torch."""
    stream, found, pools = Stream(), [], []

    @contextmanager
    def graph(_: object, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        pools.append(pool)
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: "memory"))
    assert len(recording.recorded(*[lambda: found.append(current())] * 2)) == 2
    assert found[0] is found[1] is not stream and pools == [None, "memory"]
    assert stream.waited == found
