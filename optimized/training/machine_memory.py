"""Main memory: how much there is, and how much is free, of the machine and of the container that this process runs in."""

from __future__ import annotations

import os
import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what memory a container may have."""

VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of the limit, of what is used and of its parts, and the part that gives way: by the second version of cgroups, and the
first."""


def total_bytes() -> int:
    """Return the bytes of main memory that this process could have if nothing else ran."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(limit) for limit, *_ in VERSIONS]
    return min([there, *(limit for limit in limits if limit is not None)])


def free_bytes() -> int:
    """Return the bytes of main memory that this process can still take."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    lines = text_of(Path("/proc/meminfo")).splitlines()
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    if found:
        free = int(found[0][1]) * 1024
    for names in VERSIONS:
        limit, used = _number(names[0]), _number(names[1])
        if limit is not None and used is not None:
            # Files that were read count as used, and stay only until their memory is needed.
            cached = re.search(rf"^{names[3]} (\d+)$", text_of(CGROUP / names[2]), re.M)
            free = min(free, max(0, limit - used + (int(cached[1]) if cached else 0)))
    return free


def is_full(error: BaseException) -> bool:
    """Return whether an error says that main memory is full: that of Python, or that of torch, which has no class of its own."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def text_of(path: Path) -> str:
    """Return a file of the system, or nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(name: str) -> int | None:
    """Return the number in a file of the container; None where there is none, or no limit."""
    text = text_of(CGROUP / name).strip()
    return int(text) if text.isdecimal() else None
