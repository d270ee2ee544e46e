"""The processes of a run: how they find each other, what they must agree on, and what happens if one of them ends.

A process that torchrun did not start is a world of its own, and touches nothing of torch.distributed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the group of the moment at which they are imported for a default, and AdamW imports them. With the group they
# would keep its threads, and a thread that is busy when Python ends aborts the process.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from arbitor.optimized.training.errors import TrainingError

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits in an exchange for the others. A rank may be writing a checkpoint meanwhile."""

BEAT_SECONDS = 2.0
"""Seconds between two signs of life of a rank."""

SILENT_SECONDS = 20.0
"""Seconds without a sign of life after which a rank is taken for ended. torchrun ends what is left 30 seconds after a rank was
killed, and a GPU that waits in NCCL learns of nothing by itself."""

SOURCES = (".py", ".cu", ".cuh")
"""How the names of sources of Python and of CUDA C++ end."""

ENDED = "ended"
"""The last sign of life of a rank that is done."""

LOST = "another rank ended or no longer answers, so this run ends; with --resume it goes on from its newest checkpoint"
"""What is told if a rank is gone."""


class RankLost(TrainingError):
    """Another rank ended, or no longer answers."""


class World:
    """The processes of one run.

    Attributes:
        number:   the number of this rank, 0 .. count - 1. Rank 0 alone prints and writes.
        count:    how many ranks there are.
        restarts: how often torchrun has started the ranks again.
    """

    def __init__(self, number: int = 0, count: int = 1, store: Store | None = None) -> None:
        """Describe the processes. Without a `store`, the first rank tells what goes wrong."""
        self.number, self.count = number, count
        self.restarts = _from_environment("TORCHELASTIC_RESTART_COUNT", 0)
        self._store = store

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.number == 0

    @property
    def exchanges_over_nccl(self) -> bool:
        """Whether tensors on GPUs are exchanged by NCCL."""
        return dist.is_initialized() and "cuda:nccl" in dist.get_backend_config()

    @property
    def of_host(self) -> range:
        """The numbers of the ranks of this host, as torchrun deals them."""
        # What stands in the environment of a process alone is nobody's rank.
        if self.count == 1:
            return range(1)
        first = max(self.number - _from_environment("LOCAL_RANK", self.number), 0)
        last = first + _from_environment("LOCAL_WORLD_SIZE", self.count)
        return range(first, min(max(last, self.number + 1), self.count))

    def tells(self) -> bool:
        """Return whether this rank is the first that asks: of all ranks that end with an error one tells the user."""
        if self._store is None:
            return self.is_first
        try:
            return self._store.add("told", 1) == 1
        except RuntimeError:
            # The store ended with the process that held it, which therefore told nothing.
            return True

    def share(self, ids_BT: Tensor) -> Tensor:
        """Return the windows of this rank: of a micro-batch, rank r of N has the r-th of N equal parts."""
        return ids_BT if self.count == 1 else ids_BT.chunk(self.count)[self.number]

    def check_batch(self, batch: int) -> None:
        """Refuse a micro-batch that cannot be cut into equal parts; a ValueError says so."""
        if batch % self.count:
            raise ValueError(f"batch is {batch}, but must be a multiple of the {self.count} ranks")

    def take_device(self, device: str) -> None:
        """Make the GPU of this rank the current one, unless the run is on the CPU or its process is alone.

        Raises:
            TrainingError: this host has fewer GPUs than ranks.
        """
        if self.count == 1 or device != "cuda":
            return
        local, gpus = _from_environment("LOCAL_RANK", self.number), torch.cuda.device_count()
        if local >= gpus:
            raise TrainingError(
                f"rank {self.number} is number {local} on its host, but must be below the number of GPUs there, {gpus}"
            )
        torch.cuda.set_device(local)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in the order of their numbers. All have one shape and dtype."""
        if self.count == 1:
            return [tensor]
        parts = self.begin_gather(tensor)()
        assert parts is not None
        return list(parts.unbind(0))

    def begin_gather(self, tensor: Tensor, owner: int | None = None) -> Callable[[], Tensor | None]:
        """Begin to send a tensor to its owner, or to all ranks.

        Returns:
            What waits for the tensors of all, stacked in the order of the ranks' numbers; or for None where they do not arrive.
        """
        arrives = owner is None or owner == self.number
        stacked = (self.count, *tensor.shape)
        if not tensor.numel():
            return lambda: tensor.new_empty(stacked) if arrives else None
        sent = as_bytes(tensor)
        arrived = sent.new_empty(self.count, sent.numel()) if arrives else None
        parts = None if arrived is None else list(arrived.unbind(0))
        with answered():
            if owner is None:
                work = dist.all_gather(parts, sent, async_op=True)
            else:
                work = dist.gather(sent, parts, dst=owner, async_op=True)

        def wait() -> Tensor | None:
            with answered():
                work.wait()
            return None if arrived is None else arrived.view(tensor.dtype).reshape(stacked)

        return wait

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.count > 1:
            self.gathered(torch.zeros(1))

    def signal(self, number: int | None) -> int | None:
        """Return the signal that asked any of the ranks to stop, the largest number of all; None if none did."""
        if self.count == 1:
            return number
        signals = self.gathered(torch.tensor(number or 0))
        return max(int(each) for each in signals) or None

    def told(self, facts: Any) -> list[Any]:
        """Return the facts of all ranks, JSON data, in the order of the ranks' numbers. Every rank must call this."""
        text = json.dumps(facts, sort_keys=True).encode()
        longest = max(int(size) for size in self.gathered(torch.tensor(len(text))))
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        return [json.loads(bytes(part.tolist())) for part in self.gathered(padded)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse ranks that are about to do different things.

        Args:
            facts: what must be the same on all ranks, as JSON data.

        Raises:
            TrainingError: a fact differs; every rank raises the same sentence, which names the first such fact.
        """
        if self.count == 1:
            return
        theirs = self.told(facts)
        for rank, other in enumerate(theirs):
            for name in sorted(theirs[0].keys() | other.keys()):
                if other.get(name) != theirs[0].get(name):
                    raise other_facts(rank, name, other.get(name), theirs[0].get(name))


def other_facts(rank: int, name: str, fact: Any, of_first: Any) -> TrainingError:
    """Return the error that says that a rank has another fact of some name than rank 0."""
    return TrainingError(
        f"rank {rank} has {fact!r} for {name}, but rank 0 has {of_first!r}, and all ranks must have the same"
    )


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun has started with this one, until the end of the block.

    A process group that the caller has made is used as it is. A process that is alone joins nothing.

    Raises:
        TrainingError: the other processes cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        yield _joined or World(dist.get_rank(), dist.get_world_size())
        return
    count = _from_environment("WORLD_SIZE", 1)
    if count == 1:
        yield World()
        return
    with _group(_from_environment("RANK", 0), count) as world:
        yield world


_joined: World | None = None
"""The world that this process has joined."""


@contextlib.contextmanager
def _group(number: int, count: int) -> Iterator[World]:
    global _joined
    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        # Ranks that were started again would find what the ranks before them left in the store.
        start = f"start {_from_environment('TORCHELASTIC_RESTART_COUNT', 0)}"
        dist.init_process_group(
            # Each tensor goes by the backend of its device, so that a run on CPUs needs no NCCL.
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"{start}/group", store),
            rank=number,
            world_size=count,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise TrainingError(f"rank {number} of {count} cannot reach the others: {reason}") from error
    world = World(number, count, PrefixStore(f"{start}/arb", store))
    heart = _Heart(PrefixStore(f"{start}/heart", store.clone()), world)
    _joined, is_done = world, False
    try:
        yield world
        # Who is done waits for the others, as one of them may hold the store.
        with contextlib.suppress(RankLost):
            world.wait()
        is_done = True
    finally:
        _joined = None
        heart.stop(is_done)
        # After an error the others may wait in NCCL, and so would this.
        if is_done:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


class _Heart:
    """Gives signs of life of this rank, and looks for those of the others. Where one stays silent it ends the process."""

    def __init__(self, store: Store, world: World) -> None:
        """Start to beat, in a thread of its own."""
        self._store, self._world = store, world
        self._beats, self._silent, self._seen = 0, [0.0] * world.count, [b""] * world.count
        self._stopped, self._is_done = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    def stop(self, is_done: bool) -> None:
        """Beat no more. A rank that is done says so; of another one the others notice that it is silent."""
        self._is_done = is_done
        self._stopped.set()
        self._thread.join()

    def beat(self) -> bool:
        """Give a sign of life and look for those of the others. Return whether all are alive, for all that is known."""
        self._beats += 1
        self._store.set(str(self._world.number), str(self._beats))
        for rank in range(self._world.count):
            now = self._store.get(str(rank)) if self._store.check([str(rank)]) else b""
            is_new = now != self._seen[rank] or now == ENDED.encode()
            self._silent[rank] = 0.0 if is_new else self._silent[rank] + BEAT_SECONDS
            self._seen[rank] = now
        return max(self._silent) <= SILENT_SECONDS

    def _run(self) -> None:
        try:
            while not self._stopped.wait(BEAT_SECONDS):
                if not self.beat():
                    self._end()
                    return
            if self._is_done:
                self._store.set(str(self._world.number), ENDED)
        except RuntimeError:
            if not self._stopped.is_set():
                self._end()

    def _end(self) -> None:
        """End the process at once: its main thread may wait in NCCL for ever."""
        if self._world.tells():
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"arb: {LOST}.\n".encode())
        os._exit(1)


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Turn what torch.distributed raises in the block into a RankLost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError):
            raise
        raise RankLost(LOST) from error


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8 [bytes]; of a contiguous one without a copy. Every backend can send bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@functools.cache
def code_sha256() -> str:
    """Return the hex digest of the sources that compute: `arbitor.reference` and `arbitor.optimized`."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("reference", "optimized"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCES:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _from_environment(name: str, default: int) -> int:
    """Return a number that torchrun has set.

    Raises:
        ValueError: it is no number of at least 0.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment, but must be a number, as torchrun sets it")
    return int(text)
