"""What a kernel can reach in Triton's interpreter: the memory of the tensors that it was given, and nothing else.

The interpreter reads and writes whatever address a kernel computes. A GPU stops at such an address, or meets another tensor there.
So a mask that lets too much through would show on a GPU alone, and not on each run. Here the kernel raises an `OutOfReach`.

A kernel that is given addresses in a table (`TABLE`) is not watched, since no argument says what it may touch. A view counts as
all of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from triton.runtime import interpreter

TABLE = "table_ptr"
"""The argument of kernels that find the addresses of their tensors in a table."""


class OutOfReach(RuntimeError):
    """A kernel touches memory that it was not given."""


class Reach:
    """The memory that the kernel which runs now was given.

    Attributes:
        begins, ends: uint64, where each piece of memory begins and where it has ended, in ascending order; empty where the kernel
            is not watched.
    """

    def __init__(self) -> None:
        self.kernel = ""
        self.begins = self.ends = np.empty(0, dtype=np.uint64)

    def give(self, kernel: str, arguments: Iterable[Any]) -> None:
        """Begin with a kernel and what it is given: tensors, descriptors of tensors, numbers and None."""
        pieces = {}
        for argument in arguments:
            tensor = interpreter._unwrap_tensor(getattr(argument, "base", argument))
            if hasattr(tensor, "untyped_storage"):
                memory = tensor.untyped_storage()
                pieces[memory.data_ptr()] = memory.data_ptr() + memory.nbytes()
        self.kernel = kernel
        self.begins = np.array(sorted(pieces), dtype=np.uint64)
        self.ends = np.array([pieces[begin] for begin in sorted(pieces)], dtype=np.uint64)

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Refuse addresses out of reach.

        Args:
            what: what is done with the memory.
            pointers: a handle of the interpreter, of addresses of any shape.
            mask: one of truth values, of a shape that can be broadcast to that of the addresses.
        """
        if not len(self.begins):
            return
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not places.size:
            return
        size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        piece = np.searchsorted(self.begins, places, side="right") - 1
        out = (piece < 0) | (places + size > self.ends[np.maximum(piece, 0)])
        if out.any():
            raise OutOfReach(
                f"{self.kernel} would {what} {out.sum()} of {places.size} elements out of its reach"
            )


REACH = Reach()
"""Of the kernel that runs now. The interpreter runs one at a time."""


def given(init: Callable[..., Any]) -> Callable[..., Any]:
    """Return `_init_args_hst`, which also says what the kernel was given, where the interpreter has it."""

    def noted(self: Any, *more: Any) -> Any:
        arguments, named = init(self, *more)
        is_watched = TABLE not in self.arg_names
        REACH.give(self.fn.__name__, [*arguments, *named.values()] if is_watched else ())
        return arguments, named

    return noted


def loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return `create_masked_load` within reach. Loads without a mask come here too."""

    def checked(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        REACH.check("load", pointers, mask)
        return load(self, pointers, mask, *more)

    return checked


def storing(store: Callable[..., Any]) -> Callable[..., Any]:
    """Return `create_masked_store` within reach. Stores without a mask come here too."""

    def checked(self: Any, pointers: Any, values: Any, mask: Any, *more: Any) -> Any:
        REACH.check("store", pointers, mask)
        return store(self, pointers, values, mask, *more)

    return checked


def changing(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return `create_atomic_rmw` within reach."""

    def checked(self: Any, kind: Any, pointers: Any, values: Any, mask: Any, *more: Any) -> Any:
        REACH.check("change", pointers, mask)
        return change(self, kind, pointers, values, mask, *more)

    return checked


PIECES: dict[tuple[Any, str], Callable[[Any], Any]] = {
    (interpreter.GridExecutor, "_init_args_hst"): given,
    (type(interpreter.interpreter_builder), "create_masked_load"): loading,
    (type(interpreter.interpreter_builder), "create_masked_store"): storing,
    (type(interpreter.interpreter_builder), "create_atomic_rmw"): changing,
}
"""What is replaced: by (owner, name), how its replacement follows from it."""


def watch() -> None:
    """Refuse what is out of reach from now on. To be called once."""
    for (owner, name), piece in PIECES.items():
        setattr(owner, name, piece(getattr(owner, name)))
