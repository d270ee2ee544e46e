"""Corpora: bytes in, windows of byte ids out.

A model reads bytes, so a corpus is any bytes at all: text in any encoding, or no text. Nothing is decoded or
cleaned. Everything here is a pure function of its arguments, so a resumed run needs no sampler state.

Shape legend: B windows of a batch, W windows of validation, T bytes of a window (the context), N bytes of a
corpus.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import torch

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import kind_of, open_regular, read_regular
from arbitor.optimized.training.shown import shown
from arbitor.reference.config import NGRAM

STDLIB = "stdlib"
"""How the Python sources that every Python carries are asked for."""

BLOCK_BYTES = 64 * 1024
"""Length of a block of the split, in bytes, where the corpus is long enough."""

VALIDATION_EVERY = 10
"""One block in this many is kept for validation."""

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

MIN_CONTEXT = NGRAM + 1
"""The shortest window, in bytes: three are read to predict the fourth."""

_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3"}
)


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from.

    Attributes:
        source: what was asked for: ``stdlib``, or the path of a file or folder.
        data_N: uint8 [N].
        sha256: hex digest of the N bytes.
        num_files: how many files they came from.
        left_out: what a folder holds that is no data: paths in it, by the reason.
        ends: where each file of a folder ends in the bytes; empty for what is no folder.
    """

    source: str
    data_N: torch.Tensor
    sha256: str
    num_files: int
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ends: tuple[int, ...] = ()

    def description(self) -> str:
        """Return how many files and bytes these are, and what was left out, by number and name."""
        files = f"{self.num_files:,} file{'' if self.num_files == 1 else 's'}"
        parts = []
        for reason, paths in self.left_out.items():
            more = ", ..." if len(paths) > NAMED_LEFT_OUT else ""
            parts.append(f"{len(paths):,} {reason} ({', '.join(paths[:NAMED_LEFT_OUT])}{more})")
        left_out = f"; left out: {', '.join(parts)}" if parts else ""
        return f"{files}, {self.data_N.numel():,} bytes{left_out}"


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive bytes of a corpus, in order: (start, end) offsets, end not included."""

    runs: tuple[tuple[int, int], ...]

    def num_bytes(self) -> int:
        """Return how many bytes the runs hold together."""
        return sum(end - start for start, end in self.runs)

    def num_windows(self, context: int) -> int:
        """Return how many windows of ``context`` bytes lie inside a run, at any offset."""
        return sum(max(0, end - start - context + 1) for start, end in self.runs)

    def window_starts(self, index_B: torch.Tensor, context: int) -> torch.Tensor:
        """Return the offset in the corpus of each numbered window.

        Args:
            index_B: int64 [B], each in [0, ``num_windows(context)``).
            context: bytes of a window.

        Returns:
            int64 [B].
        """
        counts = torch.tensor(
            [max(0, end - start - context + 1) for start, end in self.runs], dtype=torch.int64
        )
        ends = counts.cumsum(0)
        run_B = torch.searchsorted(ends, index_B, right=True)
        starts = torch.tensor([start for start, _ in self.runs], dtype=torch.int64)
        return starts[run_B] + index_B - (ends - counts)[run_B]


@dataclass(frozen=True)
class Split:
    """A corpus cut in two: what the model learns from and what it is judged by. They share no byte."""

    train: Segments
    validation: Segments

    def description(self) -> str:
        """Return which bytes are the validation."""
        runs = self.validation.runs
        size = f"{self.validation.num_bytes():,} bytes"
        if len(runs) == 1:
            return f"{size}, {runs[0][0]:,} to {runs[0][1]:,}"
        return f"{size} in {len(runs):,} runs, from {runs[0][0]:,} to {runs[-1][1]:,}"

    def validation_sha256(self) -> str:
        """Return the hex digest of where the validation bytes are."""
        return hashlib.sha256(repr(self.validation.runs).encode()).hexdigest()


def load_corpus(source: str, run: Path | None = None) -> Corpus:
    """Return a corpus, read.

    Args:
        source: ``stdlib`` for the Python sources that every Python carries (with the texts of
            ``pydoc_data.topics``), or the path of a file (its bytes as they are) or of a folder (every
            regular file in it, sorted by relative path). Of a folder are left out: links, empty files, files that look binary
            and files of weights, version control, and the folders of runs.
        run: the folder of the run that reads them, which is never data.

    Raises:
        TrainingError: the path is missing, unreadable, neither file nor folder, holds no text, is a file of weights, or lies in
            the folder of the run.
    """
    files, left_out = find_texts(source, run)
    is_folder = source != STDLIB and Path(source).is_dir()
    chunks = [file.read() for file in files]
    data = bytearray().join(chunks)
    if not data:
        raise TrainingError(f"the data file {source!r} is empty: there is nothing to learn from")
    return Corpus(
        source=source,
        data_N=torch.frombuffer(data, dtype=torch.uint8),
        sha256=hashlib.sha256(data).hexdigest(),
        num_files=len(chunks),
        left_out=left_out,
        ends=tuple(itertools.accumulate(map(len, chunks))) if is_folder else (),
    )


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

    def read(self) -> bytes:
        """Return all of its bytes."""
        return self.content if self.path is None else _read(self.path)

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


def split_corpus(corpus: Corpus, context: int) -> Split:
    """Return a corpus cut into training and validation bytes.

    Blocks of 64 KiB, every tenth of them for validation. A corpus of fewer than ten such blocks has blocks of
    a tenth of its length, or of one context where that is longer; the last block is then the validation. The
    remainder joins the last block.

    A folder of fewer than ten such blocks is cut file by file: the validation is the end of every file, a tenth of it. A file
    whose tenth is shorter than a context lends it to the next one, so that of many short files some give a context.

    Args:
        corpus: the bytes.
        context: bytes of a window, at least 4.

    Raises:
        ValueError: ``context`` is below 4.
        TrainingError: the corpus is too short for one window in each part.
    """
    if context < MIN_CONTEXT:
        raise ValueError(f"context is {context}: it must be at least {MIN_CONTEXT} bytes")
    total = corpus.data_N.numel()
    if total < 2 * context:
        raise TrainingError(
            f"the data {corpus.source!r} has {total} bytes, too few for a context of {context}: "
            f"training and validation need a window each, {2 * context} bytes together"
        )
    validation = []
    if len(corpus.ends) > 1 and total < VALIDATION_EVERY * BLOCK_BYTES:
        validation = _ends_of_files(corpus.ends, context)
    return _cut(total, validation) if validation else split_by_block(corpus, context)


def split_apart(train: Corpus, validation: Corpus, context: int) -> Split:
    """Return the split of a run that learns from one corpus, all of it, and is judged by another. Offsets are each corpus's own.

    Raises:
        TrainingError: one of them has no window, they are the same bytes, or one lies in the other.
    """
    for name, corpus in (("data", train), ("val_data", validation)):
        if corpus.data_N.numel() < context:
            raise TrainingError(
                f"the {name} {corpus.source!r} has {corpus.data_N.numel()} bytes, too few for a context of {context}"
            )
    paths = [Path(corpus.source).resolve() for corpus in (train, validation)]
    nested = STDLIB not in (train.source, validation.source) and (
        paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])
    )
    if nested or train.sha256 == validation.sha256:
        raise TrainingError(
            f"the val_data {validation.source!r} has bytes of the data {train.source!r}, but a run is judged by what it does not "
            "learn from"
        )
    return Split(Segments(((0, train.data_N.numel()),)), Segments(((0, validation.data_N.numel()),)))


def _ends_of_files(ends: Sequence[int], context: int) -> list[tuple[int, int]]:
    """Return a tenth of the bytes at the ends of files that also keep a window for training; none where no file has room."""
    runs = []
    owed = start = 0
    for end in ends:
        length = end - start
        owed += length
        size = min(owed // VALIDATION_EVERY, length // 2)
        if size >= context:
            runs.append((end - size, end))
            owed -= size * VALIDATION_EVERY
        start = end
    return runs


def split_by_block(corpus: Corpus, context: int) -> Split:
    """Return a corpus cut by blocks alone, whatever its files are; see `split_corpus`."""
    total = corpus.data_N.numel()
    block = max(context, min(BLOCK_BYTES, total // VALIDATION_EVERY))
    num_blocks = total // block
    held_out = [i for i in range(num_blocks) if i % VALIDATION_EVERY == VALIDATION_EVERY - 1] or [
        num_blocks - 1
    ]
    return _cut(total, [(i * block, total if i == num_blocks - 1 else (i + 1) * block) for i in held_out])


def _cut(total: int, validation: Sequence[tuple[int, int]]) -> Split:
    """Return the split of so many bytes with these for validation, in order, and what lies between them for training."""
    train = []
    cursor = 0
    for start, end in validation:
        if start > cursor:
            train.append((cursor, start))
        cursor = end
    if cursor < total:
        train.append((cursor, total))
    return Split(Segments(tuple(train)), Segments(tuple(validation)))


def training_batch(
    corpus: Corpus, split: Split, *, batch: int, context: int, seed: int, micro_step: int
) -> torch.Tensor:
    """Return the windows of one micro-batch, drawn with replacement from every offset of the training bytes.

    A pure function of (seed, micro_step): the offsets are SHAKE-256 of the two, 63 bits a window.

    Args:
        corpus, split: the bytes and how they are cut.
        batch: B, windows.
        context: T, bytes of a window.
        seed: the run's seed.
        micro_step: number of micro-batches before this one.

    Returns:
        int64 [B, T], values 0 to 255, on the CPU.
    """
    key = f"arb training batch: seed {seed}, micro-step {micro_step}".encode()
    draws = torch.frombuffer(bytearray(hashlib.shake_256(key).digest(8 * batch)), dtype=torch.int64)
    index_B = (draws & 0x7FFF_FFFF_FFFF_FFFF) % split.train.num_windows(context)
    return _gather(corpus.data_N, split.train.window_starts(index_B, context), context)


def validation_windows(corpus: Corpus, split: Split, *, count: int, context: int) -> torch.Tensor:
    """Return the fixed windows that a run is judged by, spread evenly over the validation bytes; the same for every seed.

    Args:
        corpus, split: the bytes and how they are cut.
        count: how many windows at most; fewer where the validation bytes hold fewer without overlap.
        context: T, bytes of a window.

    Returns:
        int64 [W, T], values 0 to 255, on the CPU.
    """
    disjoint = [
        start + i * context for start, end in split.validation.runs for i in range((end - start) // context)
    ]
    count = min(count, len(disjoint))
    starts_W = torch.tensor([disjoint[i * len(disjoint) // count] for i in range(count)], dtype=torch.int64)
    return _gather(corpus.data_N, starts_W, context)


def _gather(data_N: torch.Tensor, starts_B: torch.Tensor, context: int) -> torch.Tensor:
    return data_N[starts_B[:, None] + torch.arange(context)].to(torch.int64)


def _read(path: Path) -> bytes:
    with _reading(path):
        return read_regular(path)


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
            reason = "empty" if not size else "binary" if _is_binary(probe, size) else ""
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


def _is_binary(probe: bytes, size: int) -> bool:
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
