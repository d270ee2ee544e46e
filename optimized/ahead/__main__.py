"""The process that walks through passes and compiles what they would launch: python -m arbitor.optimized.ahead < order.json

It prints one JSON object when all is compiled. Whatever ends the walk early, what was found until then is compiled.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key

from arbitor.optimized import ops
from arbitor.optimized.ahead.absent_gpu import DEVICE, StubDriver, absent
from arbitor.optimized.ahead.start import MOST_AT_A_TIME, Order, cores
from arbitor.optimized.cuda.compiler import Kernel, kept_at, machine_code
from arbitor.optimized.cuda.launch import noted
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.evaluate import validation_bpb
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.recording import LAUNCHED_FIRST
from arbitor.optimized.training.smoke import one_pass
from arbitor.optimized.training.whole_file import write_among_others
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.adapters import attach

Launches = Callable[[Any, str, dict[str, Any]], None]

STEPS = 2
"""Steps that are walked through: the second finds what the first has left."""


def walk(order: Order) -> None:
    """Walk through the passes of an order."""
    config, dtype = ArbConfig.from_json(order.config), getattr(torch, order.dtype)
    model = ArbModel(config, ops=ops, device=DEVICE, dtype=dtype)
    if order.adapters is not None:
        attach(model, **order.adapters)
    for windows in order.windows:
        ids_BT = torch.zeros(windows, order.context, dtype=torch.int64)
        if order.passes == "smoke":
            for step in range(STEPS):
                one_pass(model, ids_BT.to(DEVICE), torch.cuda.synchronize, backward=order.backward, step=step)
        else:
            _walk_run(model, ids_BT, order)


def _walk_run(model: ArbModel, ids_BT: Tensor, order: Order) -> None:
    """Walk through the beginning of a run: a checkpoint, a validation, and steps with what is reported of them."""
    model.state()
    validation_bpb(model, ids_BT, batch=len(ids_BT), device="cuda")
    kind, census = RecordedPasses if order.recorded else Passes, Census(model)
    passes = kind(model)
    for step in range(STEPS):
        if step * order.accum >= LAUNCHED_FIRST:
            # Others would be recorded, with the same kernels.
            passes = kind(model)
        for micro_step in range(step * order.accum, (step + 1) * order.accum):
            passes.take(ids_BT, rate=1.0, step=micro_step)
        if order.adapters is not None:
            continue
        if step:
            census.before_step()
        passes.step()
        if step:
            # In the end it counts codes by functions of torch whose results have no shape without the elements.
            with contextlib.suppress(NotImplementedError):
                census.after_step()


class Crew:
    """Processes that compile, each one kernel.

    Attributes:
        failed: how many of them have failed.
    """

    def __init__(self, most: int) -> None:
        """Begin with none; at most so many work at a time."""
        self.failed = 0
        self._most, self._at_work = most, 0

    def take(self, work: Callable[[], None]) -> None:
        """Fork a process that does some work, as soon as there is room for it."""
        while self._at_work >= self._most:
            self._wait()
        if os.fork():
            self._at_work += 1
            return
        status = 1
        try:
            work()
            status = 0
        finally:
            # Nothing of what this process was in the middle of goes on here.
            os._exit(status)

    def end(self) -> None:
        """Wait until all work is done."""
        while self._at_work:
            self._wait()

    def _wait(self) -> None:
        _, status = os.waitpid(-1, 0)
        self._at_work -= 1
        self.failed += status != 0


class Notes:
    """The kernels that are launched, each of which a process of a crew compiles.

    Attributes:
        count: how many there are.
    """

    def __init__(self, crew: Crew, files: IO[bytes], capability: tuple[int, int]) -> None:
        """Begin with none.

        Args:
            crew: that compiles them.
            files: that the processes write a line into for each kernel: whether it was compiled now, and its file.
            capability: compute capability that is compiled for.
        """
        self.count = 0
        self._crew, self._files, self._capability = crew, files, capability
        self._seen: set[Any] = set()

    def triton(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Note a kernel of Triton. Triton calls this as a hook, and stops where the hook returns True."""
        kernel, data = fn.jit_function, compile["specialization_data"]
        if self._is_new((fn.module, fn.name, compile["key"])):
            kinds = tuple(compile["signature"].values())
            # What a descriptor is made into is known after the kernel is compiled.
            launcher = self._is_new(kinds) or any(str(kind).startswith("tensordesc") for kind in kinds)
            self.count += 1
            self._crew.take(lambda: self._compile_triton(kernel, data, launcher))
        return True

    def cuda(self, kernel: Kernel) -> None:
        """Note a kernel in CUDA C++."""
        if self._is_new(kernel):
            self.count += 1
            self._crew.take(lambda: self._compile_cuda(kernel))

    def _is_new(self, what: Any) -> bool:
        is_new = what not in self._seen
        self._seen.add(what)
        return is_new

    def _compile_triton(self, kernel: Any, data: str, launcher: bool) -> None:
        def listen(*, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
            for path in metadata_group.values():
                if path.endswith((".json", ".cubin")):
                    self._write(path, compiled=not cache_hit and path.endswith(".json"))

        triton.knobs.runtime.jit_cache_hook = None
        triton.knobs.compilation.listener = listen
        compiled = kernel.preload(data)
        if launcher:
            # Some releases compile a launcher in C for each signature. Where that fails here, the first launch says why.
            with contextlib.suppress(Exception):
                CudaLauncher(compiled.src, compiled.metadata)

    def _compile_cuda(self, kernel: Kernel) -> None:
        architecture = kernel.architecture(self._capability)
        path = kept_at(kernel, architecture)
        missing = not path.exists()
        machine_code(kernel, architecture)
        self._write(str(path), compiled=missing)

    def _write(self, path: str, *, compiled: bool) -> None:
        # One call, as other processes write into the same file.
        os.write(self._files.fileno(), f"{int(compiled)} {path}\n".encode())


def carry_out(order: Order) -> dict[str, Any]:
    """Walk, compile, and keep the list of files if all of them are there. Return what became of it."""
    began = time.monotonic()
    at_a_time, ended = min(cores(), MOST_AT_A_TIME), None
    # What each compilation asks for and finds the same answer to, so that no process asks anew.
    triton_key()
    make_backend(StubDriver(order.gpu).get_current_target()).hash()
    with tempfile.TemporaryFile("a+b", buffering=0) as files:
        crew = Crew(at_a_time)
        notes = Notes(crew, files, order.gpu.capability)
        with triton.knobs.runtime.scope(), absent(order.gpu), noted(notes.cuda), values_vouched_for():
            triton.knobs.runtime.jit_cache_hook = notes.triton
            try:
                walk(order)
            # What the host reads of tensors that hold nothing may lead anywhere.
            except Exception as error:
                ended = f"{type(error).__name__}: {error}"
        crew.end()
        files.seek(0)
        lines = [line.split(" ", 1) for line in files.read().decode().splitlines()]
    if not crew.failed:
        # Then the next process walks again, and finds everything in the caches.
        with contextlib.suppress(OSError):
            write_among_others(order.files(), json.dumps(sorted({path for _, path in lines})).encode())
    return {
        "noted": notes.count,
        "compiled": sum(compiled == "1" for compiled, _ in lines),
        "failed": crew.failed,
        "ended": ended,
        "at_a_time": at_a_time,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Carry out the order on stdin."""
    torch.set_num_threads(1)
    report = carry_out(Order.from_json(sys.stdin.read()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
