"""The settings that come from the environment. No other file reads an `ARB_*` variable.

`ARB_VALUE_CHECKS` is 1 or 0. With 1, ops check values (packed bytes above 242, ids and rows out of range) before they run, and wait
for the device to do so. With 0, the caller vouches for the values: a bad id then reads outside of the table, and a bad row writes
outside of it. If the variable is not set, ops check values, except inside of `values_vouched_for`. The trainer enters it, because
its ids are bytes, its rows and experts come from ops, and the values of a checkpoint are checked when it is read.
`ARB_BACKEND` is `reference` or `triton`. It names the op set to use where `--backend` is not given.
`ARB_PATH` is `cuda` or `triton`. It names the kernels of the optimized op set. With `cuda`, ops raise where CUDA C++ kernels cannot
be had. If the variable is not set, ops use CUDA C++ kernels where they can be had, and Triton's elsewhere. A product of the library
may take the place of a kernel, but not with `triton`.
`ARB_AHEAD` is 1 or 0. With 0, each kernel is compiled where it is first launched, by the process that launches it. If the
variable is not set, other processes compile the kernels of a training pass ahead of it (`optimized.ahead`).
`ARB_CACHE` is the folder that compiled CUDA C++ kernels are kept in. If it is not set, they are kept in `arbitor` within the user's
cache folder, which is `XDG_CACHE_HOME` or `~/.cache`.

Variables are read at each call, so a change made in a running process is seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BACKENDS = ("reference", "triton")
"""The op sets by name: ``arbitor.reference.ops`` and ``arbitor.optimized.ops``."""

PATHS = ("cuda", "triton")
"""The kernels of the optimized op set, by what they are written in."""


WITHOUT_VALUE_CHECKS = {"ARB_VALUE_CHECKS": "0"}
"""The environment of a process in which tensors have no values."""

_vouchers = 0
"""Number of `values_vouched_for` that are entered. It is no context variable, because autograd's threads must see it."""


@contextmanager
def values_vouched_for() -> Iterator[None]:
    """Keep ops from checking values inside of the block, so that they never wait. ``ARB_VALUE_CHECKS`` overrules this."""
    global _vouchers
    _vouchers += 1
    try:
        yield
    finally:
        _vouchers -= 1


def value_checks() -> bool:
    """Return whether ops check values as well as shapes and dtypes.

    ``ARB_VALUE_CHECKS`` decides. If it is not set, ops check values outside of `values_vouched_for`.

    Raises:
        ValueError: the variable is set to something other than 0 or 1.
    """
    asked = _switch("ARB_VALUE_CHECKS")
    return not _vouchers if asked is None else asked


def compiles_ahead() -> bool:
    """Return whether other processes compile the kernels of a training pass ahead of it.

    Raises:
        ValueError: ``ARB_AHEAD`` is set to something other than 0 or 1.
    """
    return _switch("ARB_AHEAD") is not False


def backend() -> str | None:
    """Return the op set named by ``ARB_BACKEND``, or None where it is not set.

    Raises:
        ValueError: the variable names no op set.
    """
    return _one_of("ARB_BACKEND", BACKENDS)


def path() -> str | None:
    """Return the path named by ``ARB_PATH``, or None where it is not set.

    Raises:
        ValueError: the variable names no path.
    """
    return _one_of("ARB_PATH", PATHS)


def cache_folder() -> Path:
    """Return the folder that compiled CUDA C++ kernels are kept in. It need not be there."""
    named = os.environ.get("ARB_CACHE", "").strip()
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache") / "arbitor"


def _switch(name: str) -> bool | None:
    """Return whether a variable is 1 and not 0, or None where it is not set."""
    value = _one_of(name, ("0", "1"))
    return None if value is None else value == "1"


def _one_of(name: str, allowed: tuple[str, ...]) -> str | None:
    """Return the value of a variable, or None where it is not set."""
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}")
    return value
