"""What torch.compile leaves alone: passes, steps and notes, which are no work on tensors, and the kernels of a whole model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from arbitor.reference.in_graphs import left_out

Method = TypeVar("Method", bound=Callable[..., Any])
Result = TypeVar("Result")

outside = left_out(
    "an ArbModel, and backward and step of any model with ternary layers, run outside of graphs of torch.compile: compile without "
    "fullgraph=True, or compile a module whose ternary layers are of arbitor.nn, and call its backward and step elsewhere"
)
"""Calls a function outside of graphs."""


def uncompiled(call: Callable[..., Result], *args: Any) -> Result:
    """Return `call(*args)`, run outside of torch.compile, which would not see the notes that a pass leaves."""
    return cast(Result, outside(call, *args)) if torch.compiler.is_compiling() else call(*args)


def out_of_graphs(method: Method) -> Method:
    """Return a method that torch.compile leaves alone."""

    @functools.wraps(method)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return outside(method, *args, **kwargs) if torch.compiler.is_compiling() else method(*args, **kwargs)

    return cast(Method, outer)
