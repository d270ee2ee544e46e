"""Streams: documents of a Hugging Face dataset as data of a run, `hf:NAME[/CONFIG][:SPLIT]`, in the streaming mode of `datasets`.

A stream has no places to draw windows from, and its library restores no shuffled order. So the beginning of the stream is written
into one file, document by document, and the run draws from the file as from any other. The file is mapped, and may be larger than
memory. It is kept in a folder that runs share, so that a resumed run reads no stream. If the file is gone, the stream is read
again, and the digest in the checkpoint says whether it still gives the same bytes.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from arbitor.optimized import settings
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.whole_file import told, write_whole
from arbitor.sidecars.libraries import library

PREFIX = "hf:"
"""What the source of a stream begins with."""

TEXT_FIELDS = ("text", "content", "code")
"""Fields of a document that hold its text. The first of them that the document has counts."""

BETWEEN = b"\n\n"
"""What stands behind each document."""

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""What reads a local file, by the end of its name."""

_PART = r"[A-Za-z0-9][\w.-]*"
_ON_HUB = re.compile(rf"({_PART}/{_PART})(?:/({_PART}))?", re.ASCII)


@dataclass(frozen=True)
class Stream:
    """Documents of a dataset.

    Attributes:
        name: OWNER/NAME on a hub, or the path of a `.jsonl`, `.json` or `.parquet` file or of a folder of such files.
        config: of a dataset on a hub that has several, or None.
        split: name of the split.
        is_local: whether the name is a path.
    """

    name: str
    config: str | None
    split: str
    is_local: bool

    def source(self) -> str:
        """Return what asks for this stream, with the whole path of a local one."""
        name = os.path.abspath(self.name) if self.is_local else self.name
        return f"{PREFIX}{name}{'' if self.config is None else f'/{self.config}'}:{self.split}"


def is_stream(source: str) -> bool:
    """Return whether a source of data is a stream."""
    return source.startswith(PREFIX)


def stream_of(source: str) -> Stream:
    """Return the stream that `hf:NAME[/CONFIG][:SPLIT]` names.

    Raises:
        ValueError: it names none.
    """
    name, colon, split = source.removeprefix(PREFIX).partition(":")
    split = split if colon else "train"
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise ValueError(
            f"the stream {source!r} has the split {split!r}, but must name one in letters, digits and _"
        )
    path = Path(name)
    # What is no path of a system is no local file.
    if name and os.path.exists(name):
        if path.is_file() and path.suffix.lower() not in BUILDERS:
            raise ValueError(
                f"the stream {source!r} names the file {name!r}, but a file must end in {', '.join(BUILDERS)}"
            )
        if path.is_dir() and glob.has_magic(name):
            raise ValueError(
                f"the stream {source!r} names the folder {name!r}, but the library would take *, ? or [ in a folder's name for a "
                "pattern: rename it, or name a file"
            )
        return Stream(name, None, split, is_local=True)
    found = _ON_HUB.fullmatch(name)
    if found is None:
        raise ValueError(
            f"the stream {source!r} is refused: there is no file or folder {name!r}, and on a hub it must be "
            "hf:OWNER/NAME[/CONFIG][:SPLIT]"
        )
    return Stream(found[1], found[2], split, is_local=False)


def documents(stream: Stream) -> Iterator[bytes]:
    """Yield the texts of a stream, document by document; documents without a text are left out.

    Raises:
        TrainingError: the dataset cannot be read, or its documents have no text.
        SidecarError: the library is missing.
    """
    datasets = library("datasets")
    with _broken_off(stream, datasets):
        suffix = Path(stream.name).suffix.lower()
        if stream.is_local and suffix in BUILDERS:
            # The library takes a name for a pattern.
            files = {stream.split: glob.escape(stream.name)}
            named: dict[str, Any] = {"path": BUILDERS[suffix], "data_files": files}
        else:
            named = {"path": stream.name, "name": stream.config}
        rows = iter(datasets.load_dataset(**named, split=stream.split, streaming=True))
    while True:
        with _broken_off(stream, datasets):
            row = next(rows, None)
        if row is None:
            return
        field = next((name for name in TEXT_FIELDS if name in row), None)
        if field is None or not isinstance(row[field], str | None):
            raise TrainingError(
                f"the documents of {stream.source()!r} have the fields {', '.join(map(repr, row))}, but must have a text in one of "
                f"{', '.join(TEXT_FIELDS)}"
            )
        text = (row[field] or "").encode("utf-8", errors="surrogatepass")
        if text.strip():
            yield text


@contextmanager
def _broken_off(stream: Stream, datasets: Any) -> Iterator[None]:
    """Turn whatever the library raises within the block into one sentence."""
    try:
        yield
    # This comes of files that hold nothing. As the cause of a RuntimeError it would take its place again.
    except StopIteration:
        raise TrainingError(f"cannot read the stream {stream.source()!r}: it has no documents") from None
    # Network, rights, names, formats: the library has an error of its own for each, and its first line says it best.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TrainingError(f"cannot read the stream {stream.source()!r}: {shown(reason)}") from error


def written(source: str, most: int) -> Path:
    """Return the file that holds the beginning of a stream, and write it first where it is not there.

    Documents are taken until the file has `most` bytes, and the last one is cut. Processes that ask for the same stream at the same
    time wait for the one that writes.

    Args:
        source: the stream.
        most: bytes of the file, at most.

    Raises:
        TrainingError: the stream or the file cannot be had, or the stream has no text.
        SidecarError: the library is missing.
        ValueError: as `stream_of`.
    """
    stream = stream_of(source)
    folder = settings.cache_folder() / "streams"
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(stream.name).name).strip("-") or "stream"
    path = folder / f"{label}-{_key(stream, most)}.bin"

    def write(file: IO[bytes]) -> None:
        left = most
        for document in documents(stream):
            part = (document + BETWEEN)[:left]
            file.write(part)
            left -= len(part)
            if not left:
                break
        if left == most:
            raise TrainingError(f"the stream {source!r} has no text")

    with told(f"the stream {source!r} to {str(path)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write_whole(path, write)
    return path


def _key(stream: Stream, most: int) -> str:
    """Return what tells files of streams apart: the name, the bound, and the state of local files."""
    states: list[tuple[str, int, int]] = []
    if stream.is_local:
        root = Path(stream.name)
        for path in sorted(filter(Path.is_file, root.rglob("*"))) if root.is_dir() else [root]:
            status = path.stat()
            states.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps([stream.source(), most, states]).encode()).hexdigest()[:16]


def mapped(path: Path, size: int | None = None) -> torch.Tensor:
    """Return the bytes of a file, uint8 [N], which stay on disk until they are read. The file must not change meanwhile.

    Args:
        path: of the file, which has at least one byte.
        size: N, at most as many as the file has; None: all of them.
    """
    size = path.stat().st_size if size is None else size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
