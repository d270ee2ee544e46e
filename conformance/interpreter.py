"""Triton's interpreter, without three pieces of its work that change no result and took half of its time.

Each piece is replaced where it stands in `triton.runtime.interpreter`. A version of Triton without the piece runs as it is, only
slower. `test_interpreter.py` says so, and compares every op with the interpreter that Triton ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
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

    def __call__(self, fn: Any) -> PatchOncePerLaunch:
        """Patch the modules of the language that a function sees. Triton calls `restore` at the end of a launch alone."""
        seen = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
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


def without_overflow_checks(options: Any) -> Any:
    """Return the interpreter's options. They compute a check at each sum and product of integers, and ask `debug` to look at it."""
    return options if options.debug else replace(options, sanitize_overflow=False)


PIECES: dict[tuple[Any, str], Callable[[Any], Any]] = {
    (interpreter, "_patch_lang"): PatchOncePerLaunch,
    (interpreter, "_get_np_dtype"): by_name,
    (interpreter.interpreter_builder, "options"): without_overflow_checks,
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
