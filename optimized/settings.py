"""The settings that come from the environment. No other file reads an `ARB_*` variable.

`ARB_VALUE_CHECKS`, 1 (default) or 0: whether ops look at values (packed bytes above 242, ids and rows out of range) before they
run, for which they wait for the device. With 0 it is the caller who vouches for them: a bad id then reads, and a bad row writes,
outside of the table.
`ARB_BACKEND`, `reference` or `triton`: the op set to use where `--backend` is not given.

Variables are read at each call, so a change made in a running process is seen.
"""

from __future__ import annotations

import os

BACKENDS = ("reference", "triton")
"""The op sets by name: ``arbitor.reference.ops`` and ``arbitor.optimized.ops``."""


def value_checks() -> bool:
    """Whether ops check values as well as shapes and dtypes (``ARB_VALUE_CHECKS``, on by default).

    Raises:
        ValueError: the variable is set to something other than 0 or 1.
    """
    value = os.environ.get("ARB_VALUE_CHECKS", "").strip() or "1"
    if value not in ("0", "1"):
        raise ValueError(f"ARB_VALUE_CHECKS is {value!r}: it must be 0 or 1")
    return value == "1"


def backend() -> str | None:
    """The op set named by ``ARB_BACKEND``, or None where it is not set.

    Raises:
        ValueError: the variable names no op set.
    """
    value = os.environ.get("ARB_BACKEND", "").strip()
    if not value:
        return None
    if value not in BACKENDS:
        raise ValueError(f"ARB_BACKEND is {value!r}: it must be one of {', '.join(BACKENDS)}")
    return value
