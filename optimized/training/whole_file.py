"""Files that are whole: a reader sees the old one or the new one, also after a crash, a kill or a full disk.

A file is written beside its place and flushed to the disk, then renamed over what was there, and the folder is flushed, so that
the new name survives a loss of power. Nothing is written through a link: one in the place of the file is replaced. A device
or a folder in its place is refused, and stays. What a killed process leaves beside the place is `partial_of` it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import kind_of

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a file is opened that is not there yet: where something is in its place, link or not, nothing is opened."""

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
        OSError: the disk is full or cannot be written, or ``path`` is a device or a folder; ``path`` is as before, and nothing
            is left beside it.
    """
    rename(write_beside(path, content), path)


def write_among_others(path: Path, content: bytes) -> None:
    """Write a file of a cache whole. Other processes may write the same file now, and its folder need not be there.

    Each process writes it in a folder of its own, and puts it in place.

    Raises:
        OSError: as `write_whole`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as own:
        write_whole(Path(own) / path.name, content)
        os.replace(Path(own) / path.name, path)


def write_beside(path: Path, content: bytes | Writer) -> Path:
    """Write a file beside its place, and flush it to the disk.

    Args:
        path, content: as for `write_whole`.

    Returns:
        The file written, for `rename`.

    Raises:
        OSError: as `write_whole`.
    """
    _check_place(path)
    partial = partial_of(path)
    # A link that somebody left in its place is removed, and what it points to is not touched.
    partial.unlink(missing_ok=True)
    with _nothing_left(partial), os.fdopen(os.open(partial, _NEW_FILE, 0o666), "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())
    return partial


@contextlib.contextmanager
def made_folder(path: Path, files: Iterable[str] = ()) -> Iterator[bool]:
    """Make a folder, and those above it. If the block raises, what is new is removed again.

    Args:
        path: the folder, which may be there.
        files: names of the files that the block writes. One that was there before stays.

    Yields:
        Whether the folder was not there.

    Raises:
        OSError: the folder cannot be made.
    """
    made: list[Path] = []
    new: list[Path] = []
    try:
        for each in (*reversed(path.parents), path):
            if not each.is_dir():
                with contextlib.suppress(FileExistsError):
                    each.mkdir()
                    made.append(each)
        if not path.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        new.extend(path / name for name in files if not os.path.lexists(path / name))
        yield path in made
    except BaseException:
        with contextlib.suppress(OSError):
            for file in new:
                file.unlink(missing_ok=True)
            # A folder in which something else has been put stays.
            for each in reversed(made):
                each.rmdir()
        raise


def append_to(path: Path) -> IO[str]:
    """Return a text file to write at its end. It is made where it is missing.

    Raises:
        OSError: it is a link or no regular file, or cannot be written.
    """
    # A pipe would wait for a reader.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, but must be a regular file", str(path))
    return os.fdopen(descriptor, "a", encoding="utf-8")


def rename(source: Path, target: Path) -> None:
    """Rename a file over another, and flush the folder.

    Raises:
        OSError: it cannot be done, or ``target`` is a device or a folder; a ``source`` that is partial is removed.
    """
    with _nothing_left(source):
        _check_place(target)
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


def _check_place(path: Path) -> None:
    """Refuse to put a file in the place of a device or a folder. A pipe that somebody left in a run is replaced, as a link is."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, but must be a regular file", str(path))


@contextlib.contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """Remove a partial file where the block fails."""
    try:
        yield
    except BaseException:
        if path.name.endswith(".partial"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
