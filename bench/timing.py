"""The one timer. On a GPU: device events around the work, cold L2, warm-up outside; on a CPU: the host's clock.

Two ways to time a call on a GPU, and both are reported:

    eager   The device is idle when the call is made, so the time includes what the host needs to launch it.
    graph   The call is recorded in a CUDA graph and replayed behind work that keeps the device busy while the host
            launches: the time of the device alone.

The pytest-benchmark fixture keeps the rounds. Its timer is `device_now`, whose differences are device times, so its
statistics, and what `--benchmark-compare` compares, are device times too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FLUSH_FACTOR = 8
"""Size of the buffer that is read to empty the L2 cache, in L2 caches. Large also because it hides a graph's launch."""

MIN_FLUSH_BYTES = 2**29
"""Least size of that buffer: about 0.1 ms of reading."""

ENOUGH_ROUNDS = 50
"""Rounds that every case gets unless they take longer than its patience."""

MAX_ROUNDS = 200
"""Rounds after which more tell nothing."""

MIN_ROUNDS = 5
"""Rounds that even the slowest case gets."""

WARM_SECONDS = 0.02
"""Calls before the first round go on for this long, so that the clocks are up; at least MIN_WARM_CALLS of them."""

MIN_WARM_CALLS = 3

SLOW_SECONDS = 0.5
"""A call that takes longer is warm after two: the first one compiles."""

Call = Callable[[], Any]


class _Instant:
    """A point in the work of the current stream; a difference of two is in seconds of the device."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: _Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) * 1e-3


def device_now() -> _Instant:
    """Return the point that the current stream has been told to reach."""
    return _Instant()


def host_now() -> float:
    """Return the host's clock, in seconds."""
    return time.perf_counter()


class HostTimer:
    """Times calls on a CPU. Caches are as warm as the rounds before left them."""

    device = torch.device("cpu")
    now = staticmethod(host_now)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Run the block as measured code is run."""
        yield

    def idle(self) -> None:
        """Get ready for a call."""

    def behind(self) -> None:
        """Get ready for a replay; there are none here."""

    def record(self, call: Call) -> Call:
        """Refuse: a CPU records no graphs."""
        raise RuntimeError("a CPU records no graphs")

    def free(self) -> None:
        """Release what is not used any more."""
        gc.collect()


class GpuTimer:
    """Times calls on a GPU. Everything, the making of inputs included, runs on one stream of its own."""

    now = staticmethod(device_now)

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream()
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        num_words = max(FLUSH_FACTOR * l2_bytes, MIN_FLUSH_BYTES) // 4
        with self.current():
            self.buffer = torch.arange(num_words, dtype=torch.int32, device=self.device)
            self.largest = torch.empty((), dtype=torch.int32, device=self.device)
        torch.cuda.synchronize()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Run the block on the stream that is timed."""
        with torch.cuda.stream(self.stream):
            yield

    def behind(self) -> None:
        """Queue a read of the whole buffer: it evicts what the L2 holds, and leaves no dirty lines to write back."""
        torch.amax(self.buffer, dim=0, out=self.largest)

    def idle(self) -> None:
        """Evict what the L2 holds and wait until the device has nothing to do."""
        self.behind()
        torch.cuda.synchronize()

    def record(self, call: Call) -> Call:
        """Return the replay of a call recorded in a CUDA graph. The recording itself runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            kept = call()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay

    def free(self) -> None:
        """Release what is not used any more."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


Timer = HostTimer | GpuTimer


def warm_up(timer: Timer, call: Call) -> float:
    """Make calls until the clocks are up, and return the seconds that the fastest took."""
    fastest, began, calls = float("inf"), time.perf_counter(), 0
    while calls < MIN_WARM_CALLS or (time.perf_counter() - began < WARM_SECONDS and calls < 100):
        start = timer.now()
        call()
        fastest = min(fastest, timer.now() - start)
        calls += 1
        if calls == 2 and fastest > SLOW_SECONDS:
            break
    return fastest


def rounds_for(seconds: float, *, budget: float, patience: float) -> int:
    """Return how often to time a call that takes `seconds`.

    As often as the budget allows, up to MAX_ROUNDS. ENOUGH_ROUNDS where those fit into `patience`, else as many as do.
    """
    fit = int(budget / max(seconds, 1e-9))
    least = ENOUGH_ROUNDS if ENOUGH_ROUNDS * seconds <= patience else max(MIN_ROUNDS, int(patience / seconds))
    return min(max(fit, least), MAX_ROUNDS)


def sample(timer: Timer, call: Call, *, ready: Call, rounds: int) -> list[float]:
    """Return the seconds of `rounds` calls, each after `ready`."""
    seconds = []
    for _ in range(rounds):
        ready()
        start = timer.now()
        call()
        seconds.append(timer.now() - start)
    return seconds


def quantile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the values lie, between neighbours by their distance."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def quantiles_us(seconds: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80 in microseconds."""
    return {f"p{q}_us": round(quantile(seconds, q / 100) * 1e6, 3) for q in (20, 50, 80)}
