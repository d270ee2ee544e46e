"""The promises of every op beside its own rule. `@op` stands above each definition in `arbitor.reference.ops` and keeps them.

An op works in the dtypes that its docstring names, whatever mode the caller is in. `torch.autocast` is a mode that would give a
matrix product bfloat16 where the rule says float32. So autocast is off inside of an op, on every device that ops run on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

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
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call
