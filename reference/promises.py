"""The promises of every op beside its own rule. `@op` stands above each definition in `arbitor.reference.ops` and keeps them.

- Dtypes: an op works in the dtypes that its docstring names. `torch.autocast` would hand a matrix product bfloat16 where the rule
  says float32. So autocast is off inside of an op, on every device that ops run on.
- Device: an op runs on the device of its tensors, whichever device is current. Some functions of torch do not: `torch.ldexp` of
  torch 2.11 gives zeros on another GPU. So the device of the tensors becomes the current one inside of an op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from arbitor.reference.types import StateTensors

P = ParamSpec("P")
R = TypeVar("R")

AUTOCAST_DEVICES = ("cpu", "cuda")
"""Kinds of devices that ops run on; each has an autocast of its own."""


def autocast_is_on() -> bool:
    """Return whether autocast would change a dtype on a device that ops run on."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off until the block ends, on the devices where it is on. Torch would warn of a device that is not there."""
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def op(function: Callable[P, R]) -> Callable[P, R]:
    """Return an op of the reference that keeps what every op promises; signature, docstring and module stay its own."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if autocast_is_on():
            with without_autocast():
                return call(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, StateTensors)))
        index = max(map(index_of, (kwargs.get("device"), *tensors)))
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def index_of(value: object) -> int:
    """Return the index of the CUDA device that an argument names or lies on, or -1 if there is no such device."""
    if isinstance(value, Tensor):
        return value.get_device()
    if isinstance(value, StateTensors):
        # Every layout has exponents. A look at all fields would take longer than the rest of a call's wrapping.
        exponents: Tensor = getattr(value, "exponents")  # noqa: B009
        return exponents.get_device()
    if isinstance(value, (str, torch.device)):
        device = torch.device(value)
        return device.index if device.type == "cuda" and device.index is not None else -1
    return -1
