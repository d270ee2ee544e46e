"""Texts: the files that a source of data names, and what of a folder is left out. Only the beginnings of files are read."""

from __future__ import annotations

import io
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import kind_of, open_regular
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.streams import is_stream

STDLIB = "stdlib"
"""How the Python sources that every Python carries are asked for."""

BINARY_PROBE_BYTES = 8 * 1024
"""A file of a folder with a NUL in its first so many bytes is taken for binary and left out."""

NAMED_LEFT_OUT = 3
"""How many of the files that are left out for the same reason are named."""

WEIGHTS_SUFFIXES = frozenset(
    {".pt", ".pth", ".ckpt", ".safetensors", ".npy", ".npz", ".pkl", ".gguf", ".onnx"}
)
"""How files of weights end, which are no data: their numbers would be learned as if they were text."""

VERSION_CONTROL = frozenset({".git", ".hg", ".svn"})
"""Folders of version control: their files are copies and hashes of the others."""

RUN_FILES = ("config.json", "metrics.jsonl")
"""What a folder holds that is the folder of a run."""

_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3"}
)


def in_words(left_out: Mapping[str, Sequence[str]]) -> str:
    """Return what was left out of a folder, by number and name, as the end of a sentence; nothing where all was taken."""
    parts = []
    for reason, paths in left_out.items():
        more = ", ..." if len(paths) > NAMED_LEFT_OUT else ""
        parts.append(f"{len(paths):,} {reason} ({', '.join(paths[:NAMED_LEFT_OUT])}{more})")
    return f"; left out: {', '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class Text:
    """A file of data, not yet read.

    Attributes:
        name: what it is called: its path in the folder it is of, or as it was asked for.
        path: where it is; None for a text that Python keeps elsewhere.
        content: that text.
    """

    name: str
    path: Path | None = None
    content: bytes = b""

    def num_bytes(self) -> int:
        """Return how many bytes it has.

        Raises:
            TrainingError: there is no such file.
        """
        if self.path is None:
            return len(self.content)
        with _reading(self.path):
            return self.path.stat().st_size

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open it to be read from its start, until the end of the block.

        Raises:
            TrainingError: it cannot be read.
        """
        if self.path is None:
            yield io.BytesIO(self.content)
            return
        with _reading(self.path), open_regular(self.path) as file:
            yield file


def find_texts(source: str, run: Path | None = None) -> tuple[list[Text], dict[str, list[str]]]:
    """Return the files of a source of data, of which no more than the beginnings were read, and what is left out.

    Args:
        source, run: as for `load_corpus`.

    Raises:
        TrainingError: as `load_corpus`.
    """
    if source == STDLIB:
        return _stdlib_texts(), {}
    if is_stream(source):
        raise TrainingError(
            f"the data {source!r} is a stream, but must be a file or a folder where each file counts"
        )
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise TrainingError(f"cannot read the data {source!r}: {error.strerror or error}") from error
    if run is not None and run.is_dir() and path.resolve().is_relative_to(run.resolve()):
        raise TrainingError(f"the data {source!r} lies in the run folder {str(run)!r}, which the run changes")
    if stat.S_ISDIR(mode):
        paths, left_out = _folder_files(path, run)
        return [Text(each.relative_to(path).as_posix(), each) for each in paths], left_out
    if stat.S_ISREG(mode):
        if path.suffix.lower() in WEIGHTS_SUFFIXES:
            raise TrainingError(
                f"the data {source!r} is a file of weights by its name, but must be bytes to learn from"
            )
        return [Text(source, path)], {}
    raise TrainingError(
        f"the data {source!r} is {kind_of(mode)}, but must be a regular file or a folder: "
        "a run that is resumed reads it again"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a file raises within the block into one sentence."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot read the data file {str(path)!r}: {error.strerror or error}") from error


def walk(
    root: Path, skips: Callable[[Path], str | None], left_out: dict[str, list[str]] | None = None
) -> list[Path]:
    """Return the regular files under a folder, sorted by the bytes of their relative path.

    Args:
        root: the folder.
        skips: says of a folder in it why it is left out, or None.
        left_out: is given the relative paths of what is left out, by the reason.
    """

    def refuse(error: OSError) -> None:
        raise TrainingError(
            f"cannot read the folder {error.filename!r}: {error.strerror or error}"
        ) from error

    def leave_out(path: Path, reason: str) -> None:
        if left_out is not None:
            left_out.setdefault(reason, []).append(shown(path.relative_to(root).as_posix()))

    found: list[tuple[bytes, Path]] = []
    for folder, names, files in os.walk(root, onerror=refuse):
        kept = []
        for name in sorted(names):
            path = Path(folder, name)
            reason = "linked" if path.is_symlink() else skips(path)
            if reason is None:
                kept.append(name)
            else:
                leave_out(path, reason)
        names[:] = kept
        for name in sorted(files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append((os.fsencode(path.relative_to(root).as_posix()), path))
            else:
                leave_out(path, "linked" if stat.S_ISLNK(mode) else "special")
    return [path for _, path in sorted(found)]


def no_data(run: Path | None) -> Callable[[Path], str | None]:
    """Return what says of a folder among data why it is left out, or None. The folder of the run itself is."""
    own = None if run is None else run.resolve()

    def skips(path: Path) -> str | None:
        if path.name in VERSION_CONTROL:
            return "of version control"
        if path.resolve() == own or all(path.joinpath(name).exists() for name in RUN_FILES):
            return "of runs"
        return None

    return skips


def _folder_files(root: Path, run: Path | None) -> tuple[list[Path], dict[str, list[str]]]:
    """Return the files of a folder that are texts, and what is left out of it."""
    left_out: dict[str, list[str]] = {}
    paths = []
    for path in walk(root, no_data(run), left_out):
        if path.suffix.lower() in WEIGHTS_SUFFIXES:
            reason = "of weights"
        else:
            probe, size = _probed(path)
            reason = "empty" if not size else "binary" if looks_binary(probe, size) else ""
        if reason:
            left_out.setdefault(reason, []).append(shown(path.relative_to(root).as_posix()))
        else:
            paths.append(path)
    if not paths:
        raise TrainingError(
            f"the folder {str(root)!r} holds no text: it has no regular file that is neither empty nor binary"
        )
    return paths, left_out


def _probed(path: Path) -> tuple[bytes, int]:
    """Return the beginning of a file, and its size."""
    with _reading(path), open_regular(path) as file:
        return file.read(BINARY_PROBE_BYTES), os.fstat(file.fileno()).st_size


def looks_binary(probe: bytes, size: int) -> bool:
    """Whether a file looks binary: it has a NUL near its beginning, and is no UTF-16, of whose letters each has one."""
    if b"\0" not in probe:
        return False
    return size % 2 == 1 or not (_is_utf16(probe, "le") or _is_utf16(probe, "be"))


def _is_utf16(probe: bytes, order: Literal["le", "be"]) -> bool:
    """Whether the beginning of a file is a text in UTF-16 of this byte order: with its mark, or most of it ASCII."""
    text = probe.decode(f"utf-16-{order}", errors="replace")
    has_mark = text.startswith("\ufeff")
    # The end of the probe may have torn one character of two units.
    letters = text.removeprefix("\ufeff").removesuffix("\N{REPLACEMENT CHARACTER}")
    ascii_letters = sum(letter.isascii() for letter in letters)
    return shown(letters, allowed="\n\r\t\f") == letters and (has_mark or 2 * ascii_letters > len(letters))


def _stdlib_texts() -> list[Text]:
    root = Path(sysconfig.get_path("stdlib"))

    def skips(path: Path) -> str | None:
        return path.name if path.name in _STDLIB_SKIPPED_FOLDERS else None

    paths = [path for path in walk(root, skips) if path.suffix == ".py"]
    if not paths:
        raise TrainingError(
            "this Python carries no standard library sources: name a file or a folder with --data"
        )
    texts = [Text(path.relative_to(root).as_posix(), path) for path in paths]
    if root / "pydoc_data" / "topics.py" not in paths:
        import pydoc_data.topics

        topics = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
        texts.append(Text("pydoc_data/topics", content=topics.encode()))
    return texts
