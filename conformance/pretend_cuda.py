"""A GPU that is not there: ops go the way that they go on CUDA, and their kernels are noted instead of run.

Tensors stay in the memory of the host, which begins as zeros. Nothing that a kernel would write is written, so results mean
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import driver

from arbitor.optimized.ahead.absent_gpu import DEVICE, HOST, StubDriver, backward_within, placed, said_of
from arbitor.optimized.ahead.start import Gpu

H200 = Gpu(capability=(9, 0), multiprocessors=132, shared_bytes=227 * 1024)
"""The GPU that is pretended."""

EMPTY = (torch.empty, torch.empty_like, Tensor.new_empty)
"""Functions that make tensors of whatever memory held before."""

PRODUCTS = (torch.mm, torch.bmm)
"""Products of the library that kernels of ours stand beside. Those of a preset's sizes take a host minutes, and mean nothing."""


class TensorsSayCuda(TorchFunctionMode):
    """Tensors say that they are on the GPU, and what is made there is made on the host."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            return DEVICE
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        # The host's memory is pinned by a driver that is not there.
        if func == Tensor.pin_memory:
            return args[0]
        if func == Tensor.backward:
            return backward_within(self, args[0])
        kwargs = {name: placed(value, HOST) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        # A product on the host has no `out_dtype`.
        wanted = kwargs.pop("out_dtype", None)
        if func in PRODUCTS and "out" not in kwargs and not any(each.requires_grad for each in args):
            result = torch.zeros_like(func(*(each.to("meta") for each in args)), device=HOST)
        else:
            result = func(*(placed(value, HOST) for value in args), **kwargs)
        # What a kernel would write is not written, and no walk may follow from what memory held before.
        if func in EMPTY:
            result.detach().zero_()
        return result if wanted is None else result.to(wanted)


@contextmanager
def pretended() -> Iterator[None]:
    """Pretend that there is a GPU, until the block ends. Triton compiles for it from then on."""
    driver.set_active(StubDriver(H200))
    with mock.patch.multiple(torch.cuda, **said_of(H200)), TensorsSayCuda():
        yield
