"""The settings that come from the environment. No other file reads an `ARB_*` variable.

`ARB_VALUE_CHECKS`, 1 or 0: whether ops look at values (packed bytes above 242, ids and rows out of range) before they run, for
which they wait for the device. With 0 it is the caller who vouches for them: a bad id then reads, and a bad row writes, outside of
the table. Not set, they look, except where `values_vouched_for` is entered, as the trainer does: its ids are bytes, its rows and
experts come from ops, and what a checkpoint holds was checked when it was read.
`ARB_BACKEND`, `reference` or `triton`: the op set to use where `--backend` is not given.

Variables are read at each call, so a change made in a running process is seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("reference", "triton")
"""The op sets by name: ``arbitor.reference.ops`` and ``arbitor.optimized.ops``."""


_vouchers = 0
"""How many `values_vouched_for` are entered. Not a context variable: autograd's threads must see it."""


@contextmanager
def values_vouched_for() -> Iterator[None]:
    """Keep ops from looking at values within, so that they never wait for the device; ``ARB_VALUE_CHECKS`` overrules it."""
    global _vouchers
    _vouchers += 1
    try:
        yield
    finally:
        _vouchers -= 1


def value_checks() -> bool:
    """Return whether ops check values as well as shapes and dtypes.

    ``ARB_VALUE_CHECKS`` says so. Where it is not set, ops check values unless somebody vouches for them.

    Raises:
        ValueError: the variable is set to something other than 0 or 1.
    """
    value = os.environ.get("ARB_VALUE_CHECKS", "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"ARB_VALUE_CHECKS is {value!r}: it must be 0 or 1")
    return value == "1" if value else not _vouchers


def backend() -> str | None:
    """Return the op set named by ``ARB_BACKEND``, or None where it is not set.

    Raises:
        ValueError: the variable names no op set.
    """
    value = os.environ.get("ARB_BACKEND", "").strip()
    if not value:
        return None
    if value not in BACKENDS:
        raise ValueError(f"ARB_BACKEND is {value!r}: it must be one of {', '.join(BACKENDS)}")
    return value
