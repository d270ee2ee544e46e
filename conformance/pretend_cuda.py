"""A GPU that is not there: ops go the way that they go on CUDA, and their kernels are noted instead of run.

Tensors stay in the memory of the host. Nothing that a kernel would write is written, so results mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGET = GPUTarget("cuda", 90, 32)
"""What kernels are compiled for: Hopper, in the words of Triton."""

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")

PROPERTIES: dict[str, Any] = {
    "is_current_stream_capturing": lambda: False,
    # What is copied to the GPU is there at once.
    "current_stream": lambda *_: SimpleNamespace(record_event=lambda: None),
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=227 * 1024
    ),
}
"""What `torch.cuda` says of the GPU."""


class StubDriver:
    """What Triton asks of a driver before it launches something."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class TensorsSayCuda(TorchFunctionMode):
    """Tensors say that they are on the GPU, and what is made there is made on the host."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            return DEVICE
        # The host's memory is pinned by a driver that is not there.
        if func == Tensor.pin_memory:
            return args[0]
        kwargs = {name: on_host(value) for name, value in (kwargs or {}).items()}
        # A product on the host has no `out_dtype`.
        wanted = kwargs.pop("out_dtype", None)
        result = func(*map(on_host, args), **kwargs)
        return result if wanted is None else result.to(wanted)


def on_host(value: Any) -> Any:
    """Return the host for a device, anything else as it is."""
    return HOST if isinstance(value, torch.device) else value


@contextmanager
def pretended() -> Iterator[None]:
    """Pretend that there is a GPU, until the block ends. Triton compiles for it from then on."""
    driver.set_active(StubDriver())
    with mock.patch.multiple(torch.cuda, **PROPERTIES), TensorsSayCuda():
        yield
