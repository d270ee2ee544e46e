"""Files that are whole: a reader sees the old one or the new one, also after a crash, a kill or a full disk.

A file is written beside its place and flushed to the disk, then renamed over what was there, and the folder is flushed, so that
the new name survives a loss of power. What a killed process leaves beside the place is `partial_of` it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from arbitor.optimized.training.errors import TrainingError

Writer = Callable[[IO[bytes]], object]
"""What writes the content of a file that is open for writing."""


def partial_of(path: Path) -> Path:
    """Return where a file is written before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: bytes | Writer) -> None:
    """Write a file whole.

    Args:
        path: where it belongs.
        content: the bytes, or what writes them.

    Raises:
        OSError: the disk is full or cannot be written; ``path`` is as before, and nothing is left beside it.
    """
    rename(write_beside(path, content), path)


def write_beside(path: Path, content: bytes | Writer) -> Path:
    """Write a file beside its place, and flush it to the disk.

    Args:
        path, content: as for `write_whole`.

    Returns:
        The file written, for `rename`.

    Raises:
        OSError: as `write_whole`.
    """
    partial = partial_of(path)
    with _nothing_left(partial), open(partial, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())
    return partial


def rename(source: Path, target: Path) -> None:
    """Rename a file over another, and flush the folder.

    Raises:
        OSError: it cannot be done; a ``source`` that is partial is removed.
    """
    with _nothing_left(source):
        os.replace(source, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def told(what: str, otherwise: str = "") -> Iterator[None]:
    """Turn what a full or broken disk raises within the block into one sentence.

    Args:
        what: what cannot be written then.
        otherwise: what the sentence says after the reason.

    Raises:
        TrainingError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {what}: {error.strerror or error}{otherwise}") from error


@contextlib.contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """Remove a partial file where the block fails."""
    try:
        yield
    except OSError:
        if path.name.endswith(".partial"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
