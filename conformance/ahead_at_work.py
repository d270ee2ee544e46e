"""What `test_ahead` runs where kernels are compiled and not interpreted. Each line of stdin is an order, and each of stdout JSON.

python -m conformance.ahead_at_work walks      # what walks note, with memory and without
python -m conformance.ahead_at_work launches   # what launches find in the caches while an order is carried out
python -m conformance.ahead_at_work crew       # what becomes of work that fails; takes no order
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from arbitor.optimized.ahead.__main__ import Crew, walk
from arbitor.optimized.ahead.absent_gpu import StubDriver, absent
from arbitor.optimized.ahead.start import Order, Own, awaited
from arbitor.optimized.cuda import compiler
from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.cuda.launch import noted
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training import census
from conformance.pretend_cuda import H200, pretended


def walked(order: Order, gpu: AbstractContextManager[None]) -> list[str]:
    """Return the kernels that a walk notes on a GPU of some kind."""
    kernels: set[str] = set()

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernels.add(f"{fn.module}.{fn.name} {compile['specialization_data']}")
        return True

    def note(kernel: Kernel) -> None:
        kernels.add(str(kernel))

    with (
        triton.knobs.runtime.scope(),
        gpu,
        noted(note),
        values_vouched_for(),
        # Kernels that are not launched count no groups, and there is no mean of none.
        mock.patch.object(census, "summed_up", return_value={}),
    ):
        triton.knobs.runtime.jit_cache_hook = hook
        walk(order)
    return sorted(kernels)


class LoadsNothing(StubDriver):
    """A driver whose kernels are loaded and launched without effect, so that all that comes before is what it is on a GPU."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": H200.shared_bytes},
        load_binary=lambda *_: (None, None, 0, 0, 1024),
        unload_module=lambda module: None,
    )

    @staticmethod
    def launcher_cls(src: Any, metadata: Any) -> Any:
        return lambda *_: None


@contextmanager
def launching() -> Iterator[dict[str, list[str]]]:
    """Launch kernels without effect in the block. Yield where they came from: `found` in the caches, or `compiled`."""
    seen: dict[str, list[str]] = {"found": [], "compiled": []}

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        seen["found" if cache_hit else "compiled"].append(src.name)

    def note(kernel: Kernel) -> None:
        with mock.patch.object(compiler, "_compile", return_value=b"") as compile:
            compiler.machine_code(kernel, kernel.architecture(H200.capability))
        seen["compiled" if compile.called else "found"].append(str(kernel))

    with (
        triton.knobs.compilation.scope(),
        pretended(),
        noted(note),
        values_vouched_for(),
        mock.patch.object(CompiledKernel, "__del__", lambda self: None, create=True),
    ):
        driver.set_active(LoadsNothing(H200))
        triton.knobs.compilation.listener = listen
        yield seen


def survived() -> dict[str, Any]:
    """Return which messages a crew has worked off, where some work raises and one process is killed, and whether all may be."""

    def work(message: bytes) -> None:
        if message == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if message == b"raise":
            raise RuntimeError("the compiler has no good day")
        os.write(done.fileno(), message)

    with tempfile.TemporaryFile("a+b", buffering=0) as done:
        crew = Crew(2, work, lambda: True)
        for message in (b"a", b"raise", b"kill", b"b", b"raise", b"c"):
            crew.give(message)
        crew.end()
        done.seek(0)
        worked_off = sorted(done.read().decode())
        lost = Crew(2, work, lambda: True)
        try:
            for _ in range(10_000):
                lost.give(b"kill")
                time.sleep(0.001)
            is_refused = False
        except OSError:
            is_refused = True
        lost.end()
        return {"done": worked_off, "refused": is_refused, **left()}


def left() -> dict[str, Any]:
    """Return how much is worked off of 40 messages: after the process that sent them was killed, and when nobody waits for it.

    The third crew is of a process that ignores how others end.
    """
    with tempfile.TemporaryFile("a+b", buffering=0) as done:

        def work(message: bytes) -> None:
            os.write(done.fileno(), message)
            time.sleep(0.05)

        def of_crew(goes_on: bool) -> None:
            crew = Crew(2, work, lambda: goes_on)
            with suppress(OSError):
                for _ in range(40):
                    crew.give(b"a")
            if goes_on:
                os.kill(os.getpid(), signal.SIGKILL)
            crew.end()

        if (process := os.fork()) == 0:
            of_crew(True)
        os.waitpid(process, 0)
        # As long as the two would take for all.
        time.sleep(1.5)
        orphaned = os.fstat(done.fileno()).st_size
        of_crew(False)
        unawaited = os.fstat(done.fileno()).st_size - orphaned
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ignoring = Crew(2, lambda message: None, lambda: True)
    ignoring.end()
    signal.signal(signal.SIGCHLD, before)
    return {"orphaned": orphaned, "unawaited": unawaited}


def main() -> None:
    """Do what the command line says."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what, orders = sys.argv[1], [Order.from_json(line) for line in sys.stdin]
    if what == "crew":
        print(json.dumps(survived()))
    for order in orders:
        if what == "walks":
            found = {"real": walked(order, pretended()), "absent": walked(order, absent(order.gpu))}
        else:
            ahead = None if order.is_done() else Own(order)
            with launching() as seen, awaited(ahead):
                walk(order)
            said = None if ahead is None else ahead.finish()
            found = {**seen, "said": said, "done": order.is_done()}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
