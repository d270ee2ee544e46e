"""The process that walks through passes and compiles what they would launch: python -m arbitor.optimized.ahead

The first line of stdin is its order. It prints one JSON object when all is compiled. Whatever ends the walk early, what was found
until then is compiled. Where stdin ends before that, nothing more is.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import select
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any, NoReturn

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.cache import triton_key

from arbitor.optimized import ops
from arbitor.optimized.ahead.absent_gpu import DEVICE, StubDriver, absent, exchanged_at_once
from arbitor.optimized.ahead.start import MOST_AT_A_TIME, Gpu, Order, cores
from arbitor.optimized.cuda.compiler import Kernel, kept_at, machine_code
from arbitor.optimized.cuda.launch import noted
from arbitor.optimized.distributed.run import train_together, whole_state
from arbitor.optimized.distributed.world import World
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

STEPS = 2
"""Steps that are walked through: the second finds what the first has left."""

ORDER, REPORT = 0, 1
"""File descriptors that the order comes from, and that the report goes to."""

MOST_BYTES = 2**20
"""Bytes of a message to a process that compiles, at most. It has some thousands."""


def walk(order: Order) -> None:
    """Walk through the passes of an order."""
    for number in order.ranks:
        with exchanged_at_once() if order.of_ranks > 1 else contextlib.nullcontext():
            _walk_rank(World(number, order.of_ranks), order)


def _walk_rank(world: World, order: Order) -> None:
    """Walk through the passes of a rank of an order."""
    config, dtype = ArbConfig.from_json(order.config), getattr(torch, order.dtype)
    # Whole, also where ranks keep codes or experts for each other: how many rows they exchange is known by the rows alone.
    model = ArbModel(config, ops=ops, device=DEVICE, dtype=dtype)
    if order.adapters is not None:
        attach(model, **order.adapters)
    train_together(model, world, exchange=order.exchange)
    for windows in order.windows:
        ids_BT = torch.zeros(windows, order.context, dtype=torch.int64)
        if order.passes == "smoke":
            for step in range(STEPS):
                one_pass(model, ids_BT.to(DEVICE), torch.cuda.synchronize, backward=order.backward, step=step)
        else:
            _walk_run(model, ids_BT, order)


def _walk_run(model: ArbModel, ids_BT: Tensor, order: Order) -> None:
    """Walk through the beginning of a run: a checkpoint, a validation, and steps with what is reported of them."""
    whole_state(model)
    validation_bpb(model, ids_BT, batch=len(ids_BT), device="cuda")
    kind, census = RecordedPasses if order.recorded else Passes, Census(model)
    summed = order.accum if order.sums else 1
    passes = kind(model, accum=summed)
    for step in range(STEPS):
        if step * order.accum >= LAUNCHED_FIRST:
            # Others would be recorded, with the same kernels.
            passes = kind(model, accum=summed)
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
    """Processes that work off messages. Each message is for whoever is free, and is lost with the process that it ends."""

    def __init__(self, number: int, work: Callable[[bytes], None], goes_on: Callable[[], bool]) -> None:
        """Fork so many processes that do some work for each message, as long as this process lives and `goes_on`."""
        parent = os.getpid()
        # Of several readers one gets a message, and gets the whole of it.
        self._messages, read = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for _ in range(number):
            if os.fork() == 0:
                self._messages.close()
                # Messages outlive the process that has sent them.
                _work_off(read, work, lambda: os.getppid() == parent and goes_on())
        # Where nobody is left to read, a message is refused.
        read.close()
        self._number = number

    def give(self, message: bytes) -> None:
        """Send a message, as soon as there is room for it.

        Raises:
            OSError: nobody is left.
        """
        self._messages.sendall(message)

    def end(self) -> None:
        """Wait until all work is done."""
        self._messages.close()
        for _ in range(self._number):
            # Where the user ignores the ends of processes, the last wait finds none, and none is left.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


def _work_off(read: socket.socket, work: Callable[[bytes], None], goes_on: Callable[[], bool]) -> NoReturn:
    """Work until no message can come. This process ends here, and nothing of what it was forked in goes on."""
    status = 1
    try:
        while (message := read.recv(MOST_BYTES)) and goes_on():
            # What fails here fails where it is launched, and says why.
            with contextlib.suppress(Exception):
                work(message)
        status = 0
    finally:
        os._exit(status)


class Compiler:
    """What a process of the crew does: it compiles the kernel that a message is about, unless it is in the caches.

    It writes lines into a file that all of them share: the number of the kernel, whether it was compiled now, and a file of it.
    """

    def __init__(self, files: IO[bytes], gpu: Gpu) -> None:
        """Begin with the file, and the GPU to compile for."""
        self._files, self._gpu = files, gpu
        self._number = 0

    def __call__(self, message: bytes) -> None:
        """Compile the kernel of a message."""
        self._number, kernel, *more = pickle.loads(message)
        if isinstance(kernel, Kernel):
            self._compile_cuda(kernel)
        else:
            self._compile_triton(*kernel, *more)

    def _compile_triton(self, module: str, name: str, data: str, launcher: bool) -> None:
        triton.knobs.compilation.listener = self._listen
        compiled = getattr(importlib.import_module(module), name).preload(data)
        if launcher:
            # Some releases compile a launcher in C for each signature. Where that fails here, the first launch says why.
            with contextlib.suppress(Exception):
                CudaLauncher(compiled.src, compiled.metadata)

    def _listen(self, *, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        """Note the files of a kernel. Triton calls this when it has them."""
        for path in metadata_group.values():
            if path.endswith((".json", ".cubin")):
                self._write(path, compiled=not cache_hit)

    def _compile_cuda(self, kernel: Kernel) -> None:
        architecture = kernel.architecture(self._gpu.capability)
        path = kept_at(kernel, architecture)
        missing = not os.path.exists(path)
        machine_code(kernel, architecture)
        self._write(str(path), compiled=missing)

    def _write(self, path: str, *, compiled: bool) -> None:
        # One call, as other processes write into the same file.
        os.write(self._files.fileno(), f"{self._number} {int(compiled)} {path}\n".encode())


class Notes:
    """The kernels that are launched, which a crew compiles.

    Attributes:
        count: how many there are.
    """

    def __init__(self, crew: Crew) -> None:
        """Begin with none."""
        self.count = 0
        self._crew = crew
        self._seen: set[Any] = set()

    def triton(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Note a kernel of Triton. Triton calls this as a hook, and stops where the hook returns True."""
        if self._is_new((fn.module, fn.name, compile["key"])):
            kinds = tuple(compile["signature"].values())
            # What a descriptor is made into is known after the kernel is compiled.
            launcher = self._is_new(kinds) or any(str(kind).startswith("tensordesc") for kind in kinds)
            self._give((fn.module, fn.name), compile["specialization_data"], launcher)
        return True

    def cuda(self, kernel: Kernel) -> None:
        """Note a kernel in CUDA C++."""
        if self._is_new(kernel):
            self._give(kernel)

    def _is_new(self, what: Any) -> bool:
        is_new = what not in self._seen
        self._seen.add(what)
        return is_new

    def _give(self, *kernel: Any) -> None:
        self._crew.give(pickle.dumps((self.count, *kernel)))
        self.count += 1


def carry_out(order: Order) -> dict[str, Any]:
    """Walk, compile, and keep the list of files if all of them are there. Return what became of it."""
    began = time.monotonic()
    at_a_time, ended = min(cores(), MOST_AT_A_TIME), None
    stub = StubDriver(order.gpu)
    driver.set_active(stub)
    # What each compilation asks for, and finds the same answer to, is asked for once.
    triton_key()
    make_backend(stub.get_current_target()).hash()
    with tempfile.TemporaryFile("a+b", buffering=0) as files:
        crew = Crew(at_a_time, Compiler(files, order.gpu), is_awaited)
        notes = Notes(crew)
        with triton.knobs.runtime.scope(), absent(order.gpu), noted(notes.cuda), values_vouched_for():
            triton.knobs.runtime.jit_cache_hook = notes.triton
            try:
                walk(order)
            # What the host reads of tensors that hold nothing may lead anywhere.
            except Exception as error:
                ended = f"{type(error).__name__}: {error}"
        crew.end()
        files.seek(0)
        lines = [line.split(" ", 2) for line in files.read().decode().splitlines()]
    failed = notes.count - len({number for number, _, _ in lines})
    if not failed:
        # Without a list the next process walks again, and finds everything in the caches.
        with contextlib.suppress(OSError, RuntimeError):
            write_among_others(order.files(), json.dumps(sorted({path for _, _, path in lines})).encode())
    return {
        "noted": notes.count,
        "compiled": len({number for number, compiled, _ in lines if compiled == "1"}),
        "failed": failed,
        "ended": ended,
        "at_a_time": at_a_time,
        "seconds": time.monotonic() - began,
    }


def is_awaited() -> bool:
    """Return whether the process that sent the order lives. Nothing comes after the order but the end of the file, when it ends."""
    return not select.select([ORDER], [], [], 0)[0]


def main() -> None:
    """Carry out the order that is the first line of stdin."""
    torch.set_num_threads(1)
    order = Order.from_json(sys.stdin.readline())
    # Nobody reads what compilers print, and a full pipe would stop them.
    with os.fdopen(os.dup(REPORT), "w") as told:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, REPORT)
        os.close(nowhere)
        print(json.dumps(carry_out(order)), file=told)


if __name__ == "__main__":
    main()
