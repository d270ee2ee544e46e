"""The process that compiles ahead: what it is asked for, when it is started, and what became of it.

A full cache costs next to nothing. Beside the CUDA C++ kernels lies a list of files for each order that was carried out. While
all of them are there, no process is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized import settings
from arbitor.optimized.cuda.compiler import waiting
from arbitor.optimized.distributed.world import code_sha256
from arbitor.optimized.training.runtime import Runtime, versions

MOST_AT_A_TIME = 16
"""Kernels that are compiled at a time at most."""

MOST_SECONDS = 600
"""Seconds after which nobody waits for the process any more."""

LAUNCHER = "__triton_launcher"
"""How the file of a launcher in C begins, which some releases of Triton compile for each signature. Nobody waits for others."""

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
        sums:     whether the gradients of these are summed, and the sums vote with the step.
        adapters: rank, alpha and targets of float adapters, which learn instead of the weights; or None.
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

    def to_json(self) -> str:
        """Return the order as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Return the order that `to_json` wrote."""
        values = json.loads(text)
        gpu = values["gpu"]
        values["gpu"] = Gpu(**{**gpu, "capability": tuple(gpu["capability"])})
        return cls(**{**values, "windows": tuple(values["windows"])})

    def files(self) -> Path:
        """Return where the list of the files of this order is kept, by all that decides what they are."""
        triton = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TRITON_")}
        known = (self.to_json(), code_sha256(), versions(), torch.version.cuda, settings.path(), triton)
        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        return settings.cache_folder() / "ahead" / f"{digest}.json"

    def is_done(self) -> bool:
        """Return whether all that the order asks for lies in the caches."""
        try:
            return all(map(os.path.exists, json.loads(self.files().read_text())))
        except (OSError, ValueError):
            return False


class Ahead:
    """A process that compiles kernels. It ends with the process that has started it, or when nobody holds this object."""

    def __init__(self, order: Order) -> None:
        """Start the process.

        Raises:
            OSError: it cannot be started.
        """
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
        )
        self._said: str | None = None
        self._deadline = time.monotonic() + MOST_SECONDS
        self._stop = weakref.finalize(self, _stop, self._process)
        assert self._process.stdin is not None
        # Who has died already is found out by `finish`.
        with contextlib.suppress(OSError):
            self._process.stdin.write(order.to_json())
            self._process.stdin.close()
        self._process.stdin = None

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Let launches in the block wait for kernels that are not in the caches yet, while the process is at work."""
        from triton import knobs
        from triton.runtime.cache import FileCacheManager

        before = knobs.cache.manager_class
        base: Any = before or FileCacheManager
        wait = self._wait

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

    def has_ended(self) -> bool:
        """Return whether the process has ended, so that `finish` does not wait."""
        return self._process.poll() is not None

    def finish(self) -> str | None:
        """Wait until the process has compiled what it found, and say what it has done; None if nothing was to do.

        A later call says it again.
        """
        if self._stop.alive:
            self._said = self._report()
        return self._said

    def _wait(self, look: Callable[[], Any]) -> Any:
        """Return what a look at a cache finds, when it finds something or the process has ended."""
        while not (found := look()) and not self.has_ended() and time.monotonic() < self._deadline:
            time.sleep(BETWEEN_LOOKS)
        # It may have ended right after the look.
        return found or look()

    def _report(self) -> str | None:
        try:
            told, _ = self._process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
            report = json.loads(told)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._stop()
            ended = f"ended with status {self._process.returncode}"
            return f"kernels: compiled where they are launched, since the process that compiles them ahead {ended}"
        self._stop()
        if not report["compiled"]:
            return None
        compiled, seconds, most = report["compiled"], report["seconds"], report["at_a_time"]
        failed = f"; {report['failed']:,} failed" if report["failed"] else ""
        return f"kernels: {compiled:,} compiled in {seconds:.1f} s, up to {most} at a time{failed}"


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process, if it has not ended. What it has forked ends with the kernel that it compiles."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


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
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not settings.compiles_ahead() or not on_gpu or interpreted or cores() == 1:
        return None
    asked = Order(dtype=str(runtime.dtype).removeprefix("torch."), gpu=Gpu.here(), **order)
    if asked.is_done():
        return None
    try:
        return Ahead(asked)
    except OSError:
        return None
