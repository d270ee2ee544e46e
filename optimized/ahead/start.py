"""The process that compiles ahead: what it is asked for, when it is started, and what became of it.

A full cache costs next to nothing. Beside the CUDA C++ kernels lies a list of files for each order that was carried out. While
all of them are there, no process is started. Of several processes of a machine with one order, as ranks have, one starts it, and
the launches of all wait for what it compiles. It keeps a lock on a file meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from arbitor.optimized import settings
from arbitor.optimized.cuda.compiler import waiting
from arbitor.optimized.distributed.world import code_sha256
from arbitor.optimized.training.options import EXCHANGES
from arbitor.optimized.training.runtime import Runtime, versions

MOST_AT_A_TIME = 16
"""Kernels that are compiled at a time at most."""

MOST_SECONDS = 600
"""Seconds after which nobody waits for the process any more."""

LAUNCHER = "__triton_launcher"
"""How the file of a launcher in C begins, which some releases of Triton compile for each signature. Nobody waits for others."""

COMPILER = ("cuda-core", "cuda-bindings")
"""Packages without which no kernel in CUDA C++ is compiled."""

BETWEEN_LOOKS = 0.005
"""Seconds between two looks for a kernel that a launch waits for."""


@dataclass(frozen=True)
class Gpu:
    """What decides how kernels are chosen and compiled for a GPU.

    Fields:
        capability:      compute capability.
        multiprocessors: how many it has.
        shared_bytes:    bytes of shared memory that a block can have.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @classmethod
    def here(cls) -> Gpu:
        """Return the current GPU of this process."""
        # Torch does not tell type checkers of all properties.
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(
            capability=(properties.major, properties.minor),
            multiprocessors=properties.multi_processor_count,
            shared_bytes=properties.shared_memory_per_block_optin,
        )


@dataclass(frozen=True)
class Order:
    """The passes whose kernels are compiled.

    Fields:
        config:   of the model, as `ArbConfig.to_json` writes it.
        dtype:    of activations, by torch's name.
        context:  bytes of a window.
        windows:  numbers of windows of a pass, each of which is walked through.
        passes:   `smoke` for those of `training.smoke`, `run` for those of a run.
        backward: whether they have a backward pass and a step.
        recorded: whether they are recorded once they have run, for which rates and steps are tensors.
        accum:    passes of a step.
        sums:     whether the gradients of these passes are summed, and vote once.
        adapters: rank, alpha and targets of float adapters, which learn instead of the weights; or None.
        ranks:    numbers of the ranks that take the passes on this machine, each of which is walked through.
        of_ranks: how many ranks there are in all.
        exchange: how ranks send gradients, one of `EXCHANGES`.
        gpu:      that they run on.
    """

    config: str
    dtype: str
    context: int
    windows: tuple[int, ...]
    passes: str
    gpu: Gpu
    backward: bool = True
    recorded: bool = False
    accum: int = 1
    sums: bool = False
    adapters: dict[str, Any] | None = None
    ranks: tuple[int, ...] = (0,)
    of_ranks: int = 1
    exchange: str = EXCHANGES[0]

    def to_json(self) -> str:
        """Return the order as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Return the order that `to_json` wrote."""
        values = json.loads(text)
        gpu = values["gpu"]
        values["gpu"] = Gpu(**{**gpu, "capability": tuple(gpu["capability"])})
        return cls(**{**values, **{name: tuple(values[name]) for name in ("windows", "ranks")}})

    def files(self) -> Path:
        """Return where the list of the files of this order is kept, by all that decides what they are."""
        triton = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TRITON_")}
        # Triton's cache lies in the user's folder, unless one of its variables says where.
        place, compiler = os.path.expanduser("~"), [_version(name) for name in COMPILER]
        known = (
            self.to_json(),
            code_sha256(),
            versions(),
            torch.version.cuda,
            settings.path(),
            triton,
            place,
            compiler,
        )
        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        return settings.cache_folder() / "ahead" / f"{digest}.json"

    def claim(self) -> Path:
        """Return the file that a process of this machine locks while it compiles for this order.

        A folder may be shared by machines whose caches are not.
        """
        machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:16]
        return self.files().with_suffix(f".{machine}.lock")

    def is_done(self) -> bool:
        """Return whether all that the order asks for lies in the caches."""
        try:
            paths = json.loads(self.files().read_text())
        # A user who has no folder has no cache there.
        except (OSError, ValueError, RuntimeError):
            return False
        return isinstance(paths, list) and all(
            isinstance(path, str) and os.path.exists(path) for path in paths
        )


class Ahead(ABC):
    """A process that compiles kernels, whoever has started it."""

    def __init__(self) -> None:
        """Begin to wait."""
        self._deadline = time.monotonic() + MOST_SECONDS

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Let launches in the block wait for kernels that are not in the caches yet, while the process is at work."""
        wait = self._wait
        try:
            from triton import knobs
            from triton.runtime.cache import FileCacheManager

            before = knobs.cache.manager_class
        # Another release of Triton may have other names. Its kernels are compiled where they are launched.
        except (ImportError, AttributeError):
            with waiting(wait):
                yield
            return
        base: Any = before or FileCacheManager

        class Waiting(base):
            def get_group(self, filename: str) -> Any:
                return wait(partial(base.get_group, self, filename))

            def get_file(self, filename: str) -> Any:
                look = partial(base.get_file, self, filename)
                return wait(look) if filename.startswith(LAUNCHER) else look()

        knobs.cache.manager_class = Waiting
        try:
            with waiting(wait):
                yield
        finally:
            knobs.cache.manager_class = before

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether the process has ended, so that `finish` does not wait."""

    @abstractmethod
    def finish(self) -> str | None:
        """Wait until the process has compiled what it found, and say what it has done; None if nothing was to do.

        A later call says it again.
        """

    def _wait(self, look: Callable[[], Any]) -> Any:
        """Return what a look at a cache finds, when it finds something or the process has ended."""
        while not (found := look()) and not self.has_ended() and time.monotonic() < self._deadline:
            time.sleep(BETWEEN_LOOKS)
        # It may have ended right after the look.
        return found or look()


class Own(Ahead):
    """A process that this one has started. It ends when this process has, or when nobody holds this object.

    The pipe that its order comes from stays open. Where it closes, whatever closes it, nobody waits for the kernels any more.
    """

    def __init__(self, order: Order, claim: IO[bytes] | None = None) -> None:
        """Start the process. It keeps the lock of a claim until it and all that it has forked have ended.

        Raises:
            OSError: it cannot be started.
        """
        super().__init__()
        paths = (path or os.getcwd() for path in sys.path)
        environment = {
            **os.environ,
            **settings.WITHOUT_VALUE_CHECKS,
            "PYTHONPATH": os.pathsep.join(paths),
            # It has no use for a GPU, and it must have no threads, as it forks.
            "CUDA_VISIBLE_DEVICES": "",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }
        self._process = subprocess.Popen(
            # Nothing is imported from the folder that the user is in, unless this process does so.
            [sys.executable, "-P", "-m", "arbitor.optimized.ahead"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            # Ctrl-C asks the run to end after its step, which still waits for kernels.
            process_group=0,
            pass_fds=() if claim is None else (claim.fileno(),),
        )
        self._said: str | None = None
        self._stop = weakref.finalize(self, _stop, self._process, self._process.stdin)
        stdin = self._process.stdin
        assert stdin is not None
        # Who has died already is found out by `finish`.
        with contextlib.suppress(OSError):
            stdin.write(f"{order.to_json()}\n")
            stdin.flush()
        # `communicate` would close it.
        self._process.stdin = None

    def has_ended(self) -> bool:
        """See `Ahead`."""
        return self._process.poll() is not None

    def finish(self) -> str | None:
        """See `Ahead`."""
        if self._stop.alive:
            self._said = self._report()
        return self._said

    def _report(self) -> str | None:
        try:
            told, _ = self._process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
            # What is imported before the walk may print too.
            report = json.loads(told.rstrip("\n").rpartition("\n")[2])
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._stop()
            ended = f"ended with status {self._process.returncode}"
            return f"kernels: compiled where they are launched, since the process that compiles them ahead {ended}"
        self._stop()
        if not report["compiled"] and not report["failed"]:
            return None
        compiled, seconds, most = report["compiled"], report["seconds"], report["at_a_time"]
        failed = f"; {report['failed']:,} failed" if report["failed"] else ""
        return f"kernels: {compiled:,} compiled in {seconds:.1f} s, up to {most} at a time{failed}"


class Others(Ahead):
    """A process that another one of this machine has started for the same order: another rank, or another run.

    If it ends before all is compiled, one of those that wait for it starts one in its place.
    """

    def __init__(self, order: Order, claim: IO[bytes]) -> None:
        """Begin to wait for the lock of a claim, which the process keeps."""
        super().__init__()
        self._order, self._claim = order, claim
        self._own: Own | None = None

    def has_ended(self) -> bool:
        """See `Ahead`."""
        if not self._claim.closed and claimed(self._claim):
            self._own = taken_over(self._order, self._claim)
        return self._claim.closed and (self._own is None or self._own.has_ended())

    def finish(self) -> str | None:
        """See `Ahead`."""
        self._wait(lambda: False)
        if self._own is not None:
            return self._own.finish()
        return (
            "kernels: compiled by a process of another run, or of another rank"
            if self._order.is_done()
            else None
        )


def claimed(claim: IO[bytes]) -> bool:
    """Lock the file of a claim, unless another process has, and return whether nobody is to be waited for.

    Where files have no locks, nobody is.
    """
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def taken_over(order: Order, claim: IO[bytes] | None) -> Own | None:
    """Start the process of an order, which keeps the lock of a claim; or return None where nothing is left to do.

    The file of the claim is closed here. So whoever is forked later does not have it.
    """
    with claim or contextlib.nullcontext():
        # Another process may have compiled all of it since somebody looked.
        if not order.is_done():
            with contextlib.suppress(OSError):
                return Own(order, claim)
        if claim is not None:
            # Who was forked meanwhile has the lock, too.
            with contextlib.suppress(OSError):
                fcntl.flock(claim, fcntl.LOCK_UN)
    return None


def _stop(process: subprocess.Popen[str], order: IO[str] | None) -> None:
    """End a process, if it has not ended. What it has forked ends with the kernel that it compiles."""
    process.kill()
    process.wait()
    for pipe in (order, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def can_start() -> bool:
    """Return whether this process has a Python to start another with, on a system where that can fork and share CPU cores.

    The executable of a frozen program is the program itself.
    """
    is_python = bool(sys.executable) and not getattr(sys, "frozen", False)
    return is_python and hasattr(os, "fork") and hasattr(os, "sched_getaffinity")


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def _is_set(name: str) -> bool:
    """Return whether Triton takes a variable for true."""
    return os.environ.get(name, "").lower() in ("1", "true", "on", "yes", "y")


def _version(package: str) -> str | None:
    """Return which release of a package is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def awaited(ahead: Ahead | None) -> contextlib.AbstractContextManager[None]:
    """Return `Ahead.awaited`, or a context that does nothing where nothing is compiled ahead."""
    return contextlib.nullcontext() if ahead is None else ahead.awaited()


def compiled_ahead(runtime: Runtime, **order: Any) -> Ahead | None:
    """Start to compile what some passes launch, or return None where that would gain nothing.

    Args:
        runtime: where they run.
        order: fields of `Order` but `dtype` and `gpu`.
    """
    on_gpu = runtime.device == "cuda" and runtime.backend == "triton"
    # Triton runs kernels without a compiler, or looks into no cache.
    in_vain = _is_set("TRITON_INTERPRET") or _is_set("TRITON_ALWAYS_COMPILE")
    if not settings.compiles_ahead() or not on_gpu or in_vain or not can_start() or cores() == 1:
        return None
    asked = Order(dtype=str(runtime.dtype).removeprefix("torch."), gpu=Gpu.here(), **order)
    if asked.is_done():
        return None
    try:
        place = asked.claim()
        place.parent.mkdir(parents=True, exist_ok=True)
        # Some systems lock a file to read it and to write it.
        claim = place.open("a+b")
    # Who has no folder shares with nobody.
    except (OSError, RuntimeError):
        claim = None
    if claim is not None and not claimed(claim):
        return Others(asked, claim)
    return taken_over(asked, claim)
