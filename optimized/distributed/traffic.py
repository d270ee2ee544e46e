"""Traffic: tensors on their way between ranks, as bytes, and how long a rank waits for them.

What begins an exchange returns a function that ends it, so that a rank can go on meanwhile.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from arbitor.optimized.distributed.world import World, answered, as_bytes

PENDING_BYTES = 2**28
"""Most bytes of a rank that are on their way at a time."""

HELD_BYTES = 2**31
"""Most bytes of the gradients of all ranks that an owner holds, as they travel. Of many ranks fewer are on their way.

An exchange begins before older ones end. So for a moment the owner holds those of one exchange more, a quarter of this as a rule.
"""


Events = tuple[torch.cuda.Event, torch.cuda.Event]
"""What a GPU notes where it begins and ends to wait."""


@dataclass
class Recorded:
    """Exchanges that CUDA graphs hold, which are replayed together.

    Fields:
        received: bytes that this rank is sent in a replay.
        waits:    what the GPU notes at its waits in a replay. A replay writes over what the one before noted.
        replays:  replays that were not counted yet.
        closed:   whether the graphs are gone, so that no replay follows.
    """

    received: int = 0
    waits: list[Events] = field(default_factory=list)
    replays: int = 0
    closed: bool = False

    def replay(self) -> None:
        """Note a replay."""
        self.replays += 1

    def close(self) -> None:
        """Note that the graphs are gone."""
        self.closed = True

    def count(self) -> tuple[float, int]:
        """Return seconds of waiting and bytes received of the replays since the last call; each counts as the last one."""
        replays, self.replays = self.replays, 0
        if not replays or not self.waits:
            return 0.0, replays * self.received
        self.waits[-1][1].synchronize()
        return replays * sum(map(_seconds, self.waits)), replays * self.received


class Traffic:
    """What a rank sends and is sent. Every rank begins the same exchanges in the same order.

    Attributes:
        most_pending: most bytes of this rank that are on their way at a time.
    """

    def __init__(self, world: World, *, on_gpu: Callable[[], bool]) -> None:
        """Begin without exchanges. `on_gpu` says whether waiting holds up a GPU, and not the host."""
        self.most_pending = min(PENDING_BYTES, HELD_BYTES // world.count)
        self._world, self._on_gpu = world, on_gpu
        self._under_way: deque[tuple[int, Callable[[], None]]] = deque()
        self._pending = 0
        self._waited, self._received = 0.0, 0
        self._since = time.perf_counter()
        self._events: deque[Events] = deque()
        self._recorded: list[Recorded] = []
        self._recording: Recorded | None = None

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks at once."""
        with self._waiting():
            parts = self._world.gathered(tensor)
        self._receive(tensor.nbytes * (self._world.count - 1))
        return parts

    def begin_gather(self, tensor: Tensor, owner: int | None) -> Callable[[], Tensor | None]:
        """See `World`."""
        end = self._world.begin_gather(tensor, owner)
        if owner is None or owner == self._world.number:
            self._receive(tensor.nbytes * (self._world.count - 1))

        def wait() -> Tensor | None:
            with self._waiting():
                return end()

        return wait

    def begin_deal(self, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to send a tensor to each rank; return what waits for what each rank sends to this one.

        The ranks first tell each other how long the parts are.
        """
        lengths = torch.tensor([len(part) for part in parts])
        arriving = [int(each[self._world.number]) for each in self.gathered(lengths)]
        wait = self.begin_parts(parts, arriving)
        return lambda: list(wait().split(arriving))

    def begin_parts(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Callable[[], Tensor]:
        """Begin to send a tensor to each rank; return what waits for what the ranks send to this one, one below the other.

        Args:
            parts: what each rank is sent. The tensors have one dtype, and one shape but for the first dimension.
            lengths: the first dimension of what each rank sends to this one.
        """
        number, arriving, like = self._world.number, list(lengths), parts[0]
        size = like.element_size() * math.prod(like.shape[1:])
        arrived = like.new_empty(sum(arriving) * size, dtype=torch.uint8)
        sizes = [length * size for length in arriving]
        with answered():
            if like.is_cuda and self._world.exchanges_over_nccl:
                # It reads the parts where they are. Gloo would want them one below the other.
                work = dist.all_to_all(
                    list(arrived.split(sizes)), [as_bytes(part) for part in parts], async_op=True
                )
            else:
                sent = as_bytes(torch.cat(list(parts)))
                work = dist.all_to_all_single(
                    arrived, sent, sizes, [len(part) * size for part in parts], async_op=True
                )
        self._receive(arrived.nbytes - arriving[number] * size)

        def wait() -> Tensor:
            with self._waiting(), answered():
                work.wait()
            return arrived.view(like.dtype).reshape(sum(arriving), *like.shape[1:])

        return wait

    def begin_broadcast(self, content: Tensor, source: int) -> Callable[[], None]:
        """Begin to send bytes from one rank to all, which have room for them; return what waits for the bytes."""
        with answered():
            work = dist.broadcast(content, src=source, async_op=True)
        self._receive(content.nbytes * (self._world.number != source))

        def wait() -> None:
            with self._waiting(), answered():
                work.wait()

        return wait

    def at_first(self, tensor: Tensor, source: int, size: int) -> Tensor | None:
        """Return a tensor of another rank on the CPU of rank 0, and None on other ranks. Only these two ranks need to call this.

        The tensor goes by way of the CPU. A GPU needs no room for it, and a backend of GPUs need not send between two ranks.

        Args:
            tensor: what the source sends; on rank 0 one of its dtype, and of its shape but for the first dimension.
            source: the rank that sends, not 0.
            size: the first dimension of what is sent.
        """
        if self._world.number == source:
            with answered():
                dist.send(as_bytes(tensor.cpu()), dst=0)
        if not self._world.is_first:
            return None
        arrived = torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype)
        with answered():
            dist.recv(as_bytes(arrived), src=source)
        return arrived

    def later(self, size: int, end: Callable[[], None]) -> None:
        """Keep what ends an exchange of so many bytes, and end older exchanges if too many are under way."""
        self._under_way.append((size, end))
        self._pending += size
        self._end_down_to(self.most_pending)

    def end_all(self) -> None:
        """End all exchanges that are under way, the oldest first."""
        self._end_down_to(0)

    def forget(self) -> None:
        """Forget the exchanges that are under way."""
        self._under_way.clear()
        self._pending = 0

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Record exchanges in CUDA graphs within the block; yield what is told of each replay, and of the end of the graphs."""
        # Where passes are recorded again and again, nobody may ask how much was exchanged.
        self._count_replays()
        self._recording = recorded = Recorded()
        try:
            yield recorded
        finally:
            self._recording = None
        self._recorded.append(recorded)

    def measured(self) -> tuple[float, int]:
        """Return seconds that this rank has waited for others and the bytes that it received, since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
        self._count_events()
        self._count_replays()
        counted = self._waited, self._received
        self._waited, self._received = 0.0, 0
        self._since = time.perf_counter()
        return counted

    def seconds(self) -> float:
        """Return seconds since the last call of `measured`."""
        return time.perf_counter() - self._since

    def _receive(self, size: int) -> None:
        """Count bytes that this rank is sent."""
        if self._recording is not None:
            self._recording.received += size
        else:
            self._received += size

    def _end_down_to(self, size: int) -> None:
        """End exchanges, the oldest first, until at most so many bytes are under way; 0: all of them."""
        while self._under_way and (self._pending > size or size == 0):
            ended, end = self._under_way.popleft()
            self._pending -= ended
            end()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting: of the host, or of the GPU, on which a wait holds up no host."""
        if self._on_gpu():
            recording = self._recording
            # An event that is not external would be no part of a graph.
            start, end = (
                torch.cuda.Event(enable_timing=True, external=recording is not None) for _ in range(2)
            )
            start.record()
            yield
            end.record()
            if recording is not None:
                recording.waits.append((start, end))
                return
            self._events.append((start, end))
            self._count_events()
            return
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def _count_events(self) -> None:
        """Count the waiting that the GPU has done, so that its events do not pile up."""
        while self._events and self._events[0][1].query():
            self._waited += _seconds(self._events.popleft())

    def _count_replays(self) -> None:
        """Count what was replayed since the last call, and forget the recordings that are closed."""
        for recorded in self._recorded:
            waited, received = recorded.count()
            self._waited += waited
            self._received += received
        self._recorded = [each for each in self._recorded if not each.closed]


def _seconds(events: Events) -> float:
    """Return the seconds between two events, both of which have been."""
    start, end = events
    return start.elapsed_time(end) / 1000
