"""Files as a stranger may have left them: only regular files are read, and no more of them than was said.

A pipe would wait for ever, a device may never end, and a sparse file is larger than memory. A link is followed where something is
read, as its target has to be a regular file too. Nothing is ever written through a link, see `whole_file`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from arbitor.optimized.training.errors import TrainingError
from arbitor.reference.json_text import parsed_object

JSON_BYTES = 2**20
"""Bytes that a file of JSON has at most: a configuration has two thousand."""

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link to no folder",
}
"""What a file is called, by its type."""


def open_regular(path: Path, *, most: int | None = None) -> IO[bytes]:
    """Return a regular file, open for reading from its start.

    Args:
        path: the file, or a link to it.
        most: bytes that it has at most; None: any number.

    Raises:
        OSError: it is missing, not a regular file, or larger; the reason is a clause after a colon.
    """
    _check(path, os.stat(path), most)
    # What it has become since then is looked at again. A pipe would wait here for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(descriptor), most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, most: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path, most: as for `open_regular`.

    Raises:
        OSError: as `open_regular`, or it cannot be read.
    """
    with open_regular(path, most=most) as file:
        content = file.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise _too_large(path, most)
    return content


def regular_lines(path: Path, *, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number of each line of a regular file, from 1 on, and the line without its end.

    Args:
        path: as for `open_regular`.
        most: bytes of a line at most. A longer one is None, and is not kept in memory.

    Raises:
        OSError: as `open_regular`, or the file cannot be read.
    """
    with open_regular(path) as file:
        number = 0
        while part := file.readline(most + 1):
            number += 1
            line = part.removesuffix(b"\n")
            yield number, line if len(line) <= most else None
            while len(part) > most and not part.endswith(b"\n"):
                part = file.readline(most + 1)


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a regular file of at most `JSON_BYTES`.

    Raises:
        TrainingError: the file cannot be read, or holds no JSON object.
    """
    try:
        return parsed_object(read_regular(path, most=JSON_BYTES))
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise TrainingError(f"{str(path)!r} cannot be used: {error}") from error


def kind_of(mode: int) -> str:
    """Return what a file that is not regular is called, from its mode."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def _check(path: Path, status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        sentence = f"it is {kind_of(status.st_mode)}, but must be a regular file"
        raise OSError(errno.EINVAL, sentence, str(path))
    if most is not None and status.st_size > most:
        raise _too_large(path, most)


def _too_large(path: Path, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than the {most:,} bytes allowed", str(path))
