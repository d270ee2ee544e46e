"""Corpora: bytes in, windows of byte ids out.

A model reads bytes, so a corpus is any bytes at all: text in any encoding, or no text. Nothing is decoded or
cleaned. Everything here is a pure function of its arguments, so a resumed run needs no sampler state.

Shape legend: B windows of a batch, W windows of validation, T bytes of a window (the context), N bytes of a
corpus.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized.training.errors import TrainingError
from arbitor.reference.config import NGRAM

BLOCK_BYTES = 64 * 1024
"""Length of a block of the split, in bytes, where the corpus is long enough."""

VALIDATION_EVERY = 10
"""One block in this many is kept for validation."""

BINARY_PROBE_BYTES = 8 * 1024
"""A file of a folder with a NUL in its first so many bytes is taken for binary and left out."""

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
    """

    source: str
    data_N: torch.Tensor
    sha256: str
    num_files: int


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


def load_corpus(source: str) -> Corpus:
    """Return a corpus, read.

    Args:
        source: ``stdlib`` for the Python sources that every Python carries (with the texts of
            ``pydoc_data.topics``), or the path of a file (its bytes as they are) or of a folder (every
            regular file in it, sorted by relative path, without links and without files that look binary).

    Raises:
        TrainingError: the path is missing, unreadable, neither file nor folder, or holds no text.
    """
    if source == "stdlib":
        chunks = _stdlib_files()
    else:
        path = Path(source)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise TrainingError(f"cannot read the data {source!r}: {error.strerror or error}") from error
        if stat.S_ISDIR(mode):
            chunks = _folder_files(path)
        elif stat.S_ISREG(mode):
            chunks = [_read(path)]
        else:
            raise TrainingError(f"the data {source!r} is neither a regular file nor a folder")
    data = bytearray().join(chunks)
    if not data:
        raise TrainingError(f"the data file {source!r} is empty: there is nothing to learn from")
    return Corpus(
        source=source,
        data_N=torch.frombuffer(data, dtype=torch.uint8),
        sha256=hashlib.sha256(data).hexdigest(),
        num_files=len(chunks),
    )


def check_same_data(corpus: Corpus, recorded: Mapping[str, Any] | None) -> None:
    """Refuse to go on with other bytes than the run was started with.

    Args:
        corpus: the bytes now.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError: the digests differ.
    """
    if recorded is not None and recorded["data_sha256"] != corpus.sha256:
        raise TrainingError(
            f"the run was started with data {recorded['data']!r} of {recorded['data_bytes']} bytes with SHA-256 "
            f"{recorded['data_sha256'][:12]}... and cannot go on with data {corpus.source!r} of "
            f"{corpus.data_N.numel()} bytes with SHA-256 {corpus.sha256[:12]}..."
        )


def split_corpus(corpus: Corpus, context: int) -> Split:
    """Return a corpus cut into training and validation bytes.

    Blocks of 64 KiB, every tenth of them for validation. A corpus of fewer than ten such blocks has blocks of
    a tenth of its length, or of one context where that is longer; the last block is then the validation. The
    remainder joins the last block.

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
    block = max(context, min(BLOCK_BYTES, total // VALIDATION_EVERY))
    num_blocks = total // block
    held_out = [i for i in range(num_blocks) if i % VALIDATION_EVERY == VALIDATION_EVERY - 1] or [
        num_blocks - 1
    ]
    train: list[tuple[int, int]] = []
    validation: list[tuple[int, int]] = []
    cursor = 0
    for i in held_out:
        start, end = i * block, total if i == num_blocks - 1 else (i + 1) * block
        if start > cursor:
            train.append((cursor, start))
        validation.append((start, end))
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
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read the data file {str(path)!r}: {error.strerror or error}") from error


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    """Return the regular files under a folder, sorted by the bytes of their relative path."""

    def refuse(error: OSError) -> None:
        raise TrainingError(
            f"cannot read the folder {error.filename!r}: {error.strerror or error}"
        ) from error

    found: list[tuple[bytes, Path]] = []
    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if name not in skipped]
        for name in files:
            path = Path(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                found.append((os.fsencode(path.relative_to(root).as_posix()), path))
    return [path for _, path in sorted(found)]


def _folder_files(root: Path) -> list[bytes]:
    chunks = [chunk for chunk in map(_read, _walk(root)) if chunk and b"\0" not in chunk[:BINARY_PROBE_BYTES]]
    if not chunks:
        raise TrainingError(
            f"the folder {str(root)!r} holds no text: it has no regular file that is neither empty nor binary"
        )
    return chunks


def _stdlib_files() -> list[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, _STDLIB_SKIPPED_FOLDERS) if path.suffix == ".py"]
    if not paths:
        raise TrainingError(
            "this Python carries no standard library sources: name a file or a folder with --data"
        )
    chunks = [_read(path) for path in paths]
    if root / "pydoc_data" / "topics.py" not in paths:
        import pydoc_data.topics

        chunks.append(
            "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()
        )
    return chunks
