"""What Triton's interpreter lets pass and a GPU may not: memory that a kernel was not given, and hints that are not true.

The interpreter reads and writes whatever address a kernel computes. A GPU stops at such an address, or meets another tensor there.
So a mask that lets too much through would show on a GPU alone, and not on each run. Here the kernel raises an `OutOfReach`.

A kernel that is given addresses in a table (`TABLE`) is not watched, since no argument says what it may touch. A view counts as
all of its memory.

The compiler believes `tl.multiple_of`, and reads and writes so many bytes at once. The interpreter forgets the hint. Here a kernel
whose hint is not true raises a `FalseHint`.
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


class FalseHint(RuntimeError):
    """A kernel tells the compiler that a number is a multiple of another one, and it is not."""


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


def within(what: str, at: int, mask_at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what turns a function of the interpreter into one within reach.

    Args:
        what: what the function does with memory.
        at, mask_at: places of the addresses and of the mask among its arguments.
    """

    def piece(real: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Any, *arguments: Any, **named: Any) -> Any:
            REACH.check(what, arguments[at], arguments[mask_at])
            return real(self, *arguments, **named)

        return checked

    return piece


def believed(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return `set_attr` of a handle, to which hints come, with a look at those of divisibility.

    A hint on a block speaks of the first of neighbouring numbers, so that its first number is looked at. A pointer counts in bytes.
    """

    def checked(self: Any, key: str, value: Any) -> None:
        if key == "tt.divisibility":
            first = int(self.data.flat[0])
            for divisor in value:
                if first % divisor:
                    raise FalseHint(f"{first} is called a multiple of {divisor}")
        real(self, key, value)

    return checked


BUILDER = type(interpreter.interpreter_builder)

PIECES: dict[tuple[Any, str], Callable[[Any], Any]] = {
    (interpreter.GridExecutor, "_init_args_hst"): given,
    # Loads and stores without a mask, and those of descriptors, come by these too.
    (BUILDER, "create_masked_load"): within("load", 0, 1),
    (BUILDER, "create_masked_store"): within("store", 0, 2),
    (BUILDER, "create_atomic_rmw"): within("change", 1, 3),
    (interpreter.TensorHandle, "set_attr"): believed,
}
"""What is replaced: by (owner, name), how its replacement follows from it."""


def watch() -> None:
    """Refuse what is out of reach, and false hints, from now on. To be called once."""
    for (owner, name), piece in PIECES.items():
        setattr(owner, name, piece(getattr(owner, name)))
