"""The lines of ``metrics.jsonl``: a JSON object each, of the numbers of a step. Damage costs the lines that it falls on only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arbitor.optimized.training.regular import regular_lines
from arbitor.optimized.training.whole_file import write_whole
from arbitor.reference.json_text import parsed_object

LINE_BYTES = 2**24
"""Bytes of a line at most: one with the loads of a hundred thousand experts has a few million."""


def cut_metrics(path: Path, step: int) -> None:
    """Drop every line of a metrics file about a step after ``step``, and every line that is torn or damaged.

    Args:
        path: the file; nothing happens where there is none.
        step: last step to keep.

    Raises:
        OSError: the file is no regular file, or cannot be read or written; it is replaced at once or not at all.
    """
    if not os.path.lexists(path):
        return
    kept = (line for line, values in _lines(path) if values["step"] <= step)
    write_whole(path, lambda file: file.writelines(line + b"\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, in order, without those that are torn or damaged; none where there is no file.

    Raises:
        OSError: the file is no regular file, or cannot be read.
    """
    return [values for _, values in _lines(path)] if os.path.lexists(path) else []


def thinned_metrics(path: Path, most: int) -> list[dict[str, Any]]:
    """Return lines of a metrics file for a picture: evenly spaced, so many of all and so many with a validation, and the last.

    Args:
        path: the file.
        most: how many of each at most; the memory taken does not grow with the file.

    Raises:
        OSError: as `read_metrics`.
    """
    if not os.path.lexists(path):
        return []
    counts = [0, 0]
    for line in _raw_lines(path):
        counts = [count + belongs for count, belongs in zip(counts, _belongs(line), strict=True)]
    strides = [max(1, -(-count // most)) for count in counts]
    kept, seen = [], [0, 0]
    for line in _raw_lines(path):
        chosen = False
        for i, belongs in enumerate(_belongs(line)):
            # Counted from the end, so that the last is there.
            chosen |= belongs and (counts[i] - 1 - seen[i]) % strides[i] == 0
            seen[i] += belongs
        if chosen and (values := _values(line)) is not None:
            kept.append(values)
    return kept


def last_step(path: Path) -> int:
    """Return the largest step that a metrics file has a line about; -1 where it has none, or where there is no file.

    Raises:
        OSError: as `read_metrics`.
    """
    if not os.path.lexists(path):
        return -1
    return max((values["step"] for _, values in _lines(path)), default=-1)


def _belongs(line: bytes) -> tuple[bool, bool]:
    """Whether a line is one of all, and whether it is one with a validation."""
    return True, b'"val_bpb"' in line


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Yield each line of at most LINE_BYTES as it is, sound or not, without its end."""
    return (line for _, line in regular_lines(path, most=LINE_BYTES) if line is not None)


def _values(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, or None where it is torn or damaged."""
    try:
        values = parsed_object(line)
    except ValueError:
        return None
    return values if type(values.get("step")) is int else None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each sound line and what it says."""
    for line in _raw_lines(path):
        if (values := _values(line)) is not None:
            yield line, values
