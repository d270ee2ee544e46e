"""A GPU that is not there, for a walk through a pass: tensors have no memory, launches are noted, and no kernel runs.

Tensors are on torch's meta device, and say that they are on the GPU. They have shapes, strides, dtypes, and the alignment that
their place in a piece of memory gives them. Nothing else decides what Triton compiles. The host reads ones from them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from arbitor.optimized.ahead.start import Gpu

DEVICE, META, HOST = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")

SAID: dict[Any, Any] = {
    Tensor.device.__get__: DEVICE,
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: DEVICE.index,
}
"""What a tensor without memory says of its place."""

READ = (
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
)
"""Functions that hand the elements of a tensor to the host."""


class StubDriver:
    """What Triton asks of a driver before it launches something."""

    def __init__(self, gpu: Gpu) -> None:
        """Keep what kernels are compiled for."""
        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the index of the GPU."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the stream that nothing is launched on."""
        return 0


def said_of(gpu: Gpu) -> dict[str, Any]:
    """Return what `torch.cuda` says of a GPU, by the name of the function that says it."""
    properties = SimpleNamespace(
        multi_processor_count=gpu.multiprocessors, shared_memory_per_block_optin=gpu.shared_bytes
    )
    # What is copied to the GPU is there at once.
    stream = SimpleNamespace(record_event=lambda: None)
    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, query=lambda: True, elapsed_time=lambda end: 0.0
    )
    return {
        "Event": lambda **_: event,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "get_device_capability": lambda *_: gpu.capability,
        "get_device_properties": lambda *_: properties,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: None,
    }


class WithoutMemory(TorchFunctionMode):
    """Tensors of the GPU are made without memory. Tensors of the host stay what they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for the GPU, or run a function of torch."""
        first: Any = args[0] if args else None
        kwargs = dict(kwargs or {})
        if isinstance(first, Tensor) and first.is_meta:
            if func in SAID:
                return SAID[func]
            if func == Tensor.backward:
                return backward_within(self, first)
            to_host = func == Tensor.to and HOST.type in map(kind_named, (*args[1:], *kwargs.values()))
            if to_host or func in READ:
                return func(torch.ones_like(first, device=HOST), *args[1:], **kwargs)
            if func == torch.bincount:
                # Torch knows no shape for it without the elements.
                return first.new_empty(kwargs.get("minlength", 1), dtype=torch.int64)
        elif func == Tensor.copy_ and args[1].is_meta:
            return first.fill_(1)
        # The host's memory is pinned by a driver that is not there.
        if func == Tensor.pin_memory:
            return first
        kwargs.pop("pin_memory", None)
        # Torch for CPUs has no product with an `out_dtype`.
        wanted = kwargs.pop("out_dtype", None)
        kwargs = {name: placed(value, META) for name, value in kwargs.items()}
        result = func(*(placed(value, META) for value in args), **kwargs)
        return result if wanted is None else result.to(wanted)


def backward_within(mode: TorchFunctionMode, loss: Tensor) -> None:
    """Run a backward pass in a mode, which torch has left for `Tensor.backward` and would not enter again for what that calls."""
    ones = torch.ones_like(loss)
    with mode:
        torch.autograd.graph._engine_run_backward(
            (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def placed(value: Any, place: torch.device) -> Any:
    """Return another place for an argument that names the GPU, and any other argument as it is."""
    return place if kind_named(value) == DEVICE.type else value


def kind_named(value: Any) -> str | None:
    """Return the kind of the device that an argument names, or None if it names no device."""
    if isinstance(value, str):
        return value.partition(":")[0]
    return value.type if isinstance(value, torch.device) else None


@contextmanager
def absent(gpu: Gpu) -> Iterator[None]:
    """Pretend that there is a GPU, until the block ends. Triton compiles for it from then on."""
    driver.set_active(StubDriver(gpu))
    with mock.patch.multiple(torch.cuda, **said_of(gpu)), WithoutMemory(), without_compiler():
        yield


@contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch from importing its compiler in the block, which takes a second.

    Torch's rules for shapes ask the compiler not to look at them. They take what stands in its place here, and ask nothing else.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    stand_in.disable = lambda function, *_, **__: function  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        # Torch's package may have got it as an attribute.
        vars(torch).pop("_dynamo", None)


@contextmanager
def exchanged_at_once() -> Iterator[None]:
    """Let ranks that are not there exchange tensors in the block: each sends what this one sends, or as much of nothing."""

    def gathered(parts: Sequence[Tensor] | None, sent: Tensor) -> None:
        for part in parts or ():
            part.copy_(sent)

    def at_once(exchange: Callable[..., None]) -> Callable[..., Any]:
        def begun(*args: Any, async_op: bool = False, **_: Any) -> Any:
            exchange(*args)
            return SimpleNamespace(wait=lambda: None)

        return begun

    exchanges: dict[str, Callable[..., None]] = {
        "all_gather": gathered,
        "gather": lambda sent, parts: gathered(parts, sent),
        **dict.fromkeys(("all_to_all", "all_to_all_single", "broadcast", "send", "recv"), lambda *_: None),
    }
    here: dict[str, Any] = {name: at_once(exchange) for name, exchange in exchanges.items()}
    here["is_initialized"], here["get_backend_config"] = lambda: True, lambda: "cpu:gloo,cuda:nccl"
    with mock.patch.multiple(dist, **here):
        yield
