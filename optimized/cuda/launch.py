"""Launches of the kernels of this folder: on the current stream of the tensors' device, so that CUDA graphs record them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arbitor.optimized.cuda.compiler import Kernel, loaded

UNASKED_BYTES = 47 * 1024
"""Bytes of shared memory that a launch may have unasked, beside the little that a kernel declares."""

Argument = Tensor | np.generic | None
"""An argument of a kernel: a tensor stands for its address, None for no address, and a number of NumPy has a type of C."""

_note: Callable[[Kernel], None] | None = None
"""What is told of each launch in the place of it."""


@contextmanager
def noted(note: Callable[[Kernel], None]) -> Iterator[None]:
    """Tell `note` of the kernels that are launched in the block, and launch none of them."""
    global _note
    before, _note = _note, note
    try:
        yield
    finally:
        _note = before


def launch(
    kernel: Kernel,
    arguments: Sequence[Argument],
    *,
    blocks: int,
    threads: int,
    device: torch.device,
    shared_bytes: int = 0,
    starts_early: bool = False,
    waits: bool = False,
) -> None:
    """Launch a kernel.

    Args:
        kernel: which; it is compiled if it never was.
        arguments: in the order of its parameters.
        blocks: of the grid, 1 .. 2^31 - 1.
        threads: of a block.
        device: of the tensors. It must be torch's current device, as it is inside of an op.
        shared_bytes: of shared memory for a block, beside what the kernel declares; 48 KiB in all at most on GPUs before Hopper.
        starts_early: blocks may start when all of the launch before have. The kernel waits for that launch where it must
            (`griddepcontrol.wait`), and that launch says when they may (`griddepcontrol.launch_dependents`).
        waits: blocks wait for one another, so that all of them must be on the GPU at once.
    """
    if _note is not None:
        _note(kernel)
        return
    core = importlib.import_module("cuda.core")
    # Torch's context is the one that cuda-core takes for a device, so nothing changes but what cuda-core knows of this thread.
    core.Device(device.index).set_current()
    function = loaded(kernel, kernel.architecture(_capability(device)))
    _allow_shared(kernel, device, shared_bytes)
    stream = core.Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
    options = {"programmatic_stream_serialization": True} if starts_early and _can_start_early() else {}
    if waits:
        options["is_cooperative"] = True
    config = core.LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes, **options)
    core.launch(stream, config, function, *map(_as_passed, arguments))


def aligned(tensor: Tensor, num_bytes: int) -> bool:
    """Return whether a tensor starts at a multiple of a number of bytes."""
    return tensor.data_ptr() % num_bytes == 0


def _as_passed(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


@functools.cache
def _can_start_early() -> bool:
    """Return whether this release of cuda-core launches kernels that start early. Without it they start later."""
    return hasattr(importlib.import_module("cuda.core").LaunchConfig, "programmatic_stream_serialization")


_ALLOWED: dict[tuple[Kernel, torch.device], int] = {}
"""Most bytes of shared memory that were asked for, of each kernel on each device."""


def _allow_shared(kernel: Kernel, device: torch.device, num_bytes: int) -> None:
    """Ask for more shared memory than a block gets unasked. A limit is never lowered, as a larger block may come again."""
    if num_bytes > _ALLOWED.get((kernel, device), UNASKED_BYTES):
        _set_limit(kernel, device, num_bytes)
        _ALLOWED[kernel, device] = num_bytes


def _set_limit(kernel: Kernel, device: torch.device, num_bytes: int) -> None:
    """Set the limit of a kernel, which is one for all of its launches."""
    driver = importlib.import_module("cuda.bindings.driver")
    function = loaded(kernel, kernel.architecture(_capability(device)))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    place = driver.CUdevice(device.index)
    (status,) = driver.cuKernelSetAttribute(
        attribute, num_bytes, driver.CUkernel(int(function.handle)), place
    )
    if int(status) != 0:
        raise RuntimeError(f"{kernel} gets no {num_bytes} bytes of shared memory on {device}: {status}")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
