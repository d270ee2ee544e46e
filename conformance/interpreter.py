"""Triton's interpreter, without pieces of its work that change no result and took most of its time.

Each piece is replaced where it stands in Triton. A version of Triton without the piece runs as it is, only slower.
`test_interpreter.py` says so, and compares every op with the interpreter that Triton ships.

One piece is mended for good: the interpreter of Triton 3.6 does not run with NumPy 2.4 and later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class PatchOncePerLaunch:
    """`_patch_lang`, which makes `triton.language` run on NumPy while a kernel is launched.

    Triton looks through all of the language again at each call of a device function, of which a program makes dozens. The modules
    that the launch around the call has patched are left out here. Triton also leaves patched what a device function patched. Here
    the end of the launch restores it.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.scopes: list[Any] = []
        self.patched: set[str] = set()
        self.seen: dict[Any, frozenset[str]] = {}

    def __call__(self, fn: Any) -> PatchOncePerLaunch:
        """Patch the modules of the language that a function sees. Triton calls `restore` at the end of a launch alone."""
        seen = self.seen.get(fn)
        if seen is None:
            modules = (value for value in fn.__globals__.values() if value is tl or value is tl.core)
            seen = self.seen[fn] = frozenset(module.__name__ for module in modules)
        if not self.scopes or not seen <= self.patched:
            self.scopes.append(self.patch(fn))
            self.patched |= seen
        return self

    def restore(self) -> None:
        """Undo what the launch and its device functions have patched, the last first."""
        while self.scopes:
            self.scopes.pop().restore()
        self.patched.clear()


def by_name(dtype_of: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Return `_get_np_dtype` with a memory. Triton builds a table of all types at each call, and a type's name is unique."""
    known: dict[str, np.dtype] = {}

    def remembered(kind: Any) -> np.dtype:
        if kind.name not in known:
            known[kind.name] = dtype_of(kind)
        return known[kind.name]

    return remembered


def one_of_each_block(init: Callable[..., None]) -> Callable[..., None]:
    """Return `block_type.__init__` with a memory: what a type of blocks holds follows from its elements and its shape."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if key in known:
            self.__dict__.update(known[key])
        else:
            init(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    return remembered


def all_but_the_handle(init: Callable[..., None]) -> Callable[..., None]:
    """Return `tensor.__init__` with a memory: what a tensor holds follows from its type, but for its handle."""
    known: dict[str, dict[str, Any]] = {}

    def remembered(self: Any, handle: Any, type: Any) -> None:
        if type.name in known:
            self.__dict__.update(known[type.name])
            self.handle = handle
        else:
            init(self, handle, type)
            known[type.name] = dict(self.__dict__)
            del known[type.name]["handle"]

    return remembered


def equal_shapes_stay(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Return `broadcast_impl_value`, which looks at tensors of one shape no further."""

    def looked(self: Any, lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if blocks == (False, False) or (
            blocks == (True, True) and list(lhs.type.shape) == list(rhs.type.shape)
        ):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return looked


def one_of_each_pair(computed: Callable[..., Any]) -> Callable[..., Any]:
    """Return `computation_type_impl` with a memory: in which type two types are added and multiplied."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(self: Any, one: Any, one_is_scalar: bool, other: Any, *more: bool) -> Any:
        key = (one.name, one_is_scalar, other.name, *more)
        if key not in known:
            known[key] = computed(self, one, one_is_scalar, other, *more)
        return known[key]

    return remembered


def without_overflow_checks(options: Any) -> Any:
    """Return the interpreter's options. They compute a check at each sum and product of integers, and ask `debug` to look at it."""
    return options if options.debug else replace(options, sanitize_overflow=False)


def integers_by_item(patch: Callable[..., None]) -> Callable[..., None]:
    """Return `_patch_lang_tensor`, with an integer for a tensor of one element. NumPy no longer makes one of an array with axes."""

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return mended


interpreter._patch_lang_tensor = integers_by_item(interpreter._patch_lang_tensor)

PIECES: dict[tuple[Any, str], Callable[[Any], Any]] = {
    (interpreter, "_patch_lang"): PatchOncePerLaunch,
    (interpreter, "_get_np_dtype"): by_name,
    (interpreter.interpreter_builder, "options"): without_overflow_checks,
    (tl.block_type, "__init__"): one_of_each_block,
    (tl.tensor, "__init__"): all_but_the_handle,
    (TritonSemantic, "broadcast_impl_value"): equal_shapes_stay,
    (TritonSemantic, "computation_type_impl"): one_of_each_pair,
}
"""What is replaced: by (owner, name), how its replacement follows from it."""

SHIPPED = {(owner, name): getattr(owner, name) for owner, name in PIECES if hasattr(owner, name)}
"""The pieces as this version of Triton ships them."""


def spare() -> None:
    """Leave the work out from now on."""
    for (owner, name), shipped in SHIPPED.items():
        setattr(owner, name, PIECES[owner, name](shipped))


@contextmanager
def as_shipped() -> Iterator[None]:
    """Do all of the work until the block ends."""
    for (owner, name), shipped in SHIPPED.items():
        setattr(owner, name, shipped)
    try:
        yield
    finally:
        spare()
