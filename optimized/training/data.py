"""Corpora: bytes in, windows of byte ids out.

A model reads bytes, so a corpus is any bytes at all: text in any encoding, or no text. Nothing is decoded or
cleaned. Everything here is a pure function of its arguments, so a resumed run needs no sampler state.

Shape legend: B windows of a batch, W windows of validation, T bytes of a window (the context), N bytes of a
corpus.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from arbitor.optimized import settings
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.options import STREAM_BYTES
from arbitor.optimized.training.streams import is_stream, mapped, written
from arbitor.optimized.training.texts import BINARY_PROBE_BYTES, STDLIB, find_texts, in_words, looks_binary
from arbitor.optimized.training.whole_file import told
from arbitor.reference.config import NGRAM

BLOCK_BYTES = 64 * 1024
"""Length of a block of the split, in bytes, where the corpus is long enough."""

VALIDATION_EVERY = 10
"""One block in this many is kept for validation."""

MAPPED_BYTES = 2**30
"""Data of so many bytes stay on disk, and are mapped."""

PIECE_BYTES = 2**24
"""Bytes that are held at a time while data are read from their start to their end."""

MIN_CONTEXT = NGRAM + 1
"""The shortest window, in bytes: three are read to predict the fourth."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from.

    Attributes:
        source: what was asked for: ``stdlib``, the path of a file or folder, or a stream.
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
        if is_stream(self.source):
            return f"a stream, of which {self.data_N.numel():,} bytes are read"
        files = f"{self.num_files:,} file{'' if self.num_files == 1 else 's'}"
        described = f"{files}, {self.data_N.numel():,} bytes{in_words(self.left_out)}"
        # Of a folder such a file is left out.
        probe = (
            bytes(self.data_N[:BINARY_PROBE_BYTES].tolist()) if self.num_files == 1 and not self.ends else b""
        )
        if looks_binary(probe, self.data_N.numel()):
            described += (
                "; it looks like no text (NUL bytes in its first 8 KiB), and is learned from as it is"
            )
        return described


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
    """A corpus cut in two: what the model learns from and what it is judged by. They share no byte.

    Attributes:
        train, validation: the bytes of each.
        by_file: whether the validation is the ends of files.
    """

    train: Segments
    validation: Segments
    by_file: bool = False

    def description(self) -> str:
        """Return which bytes are the validation."""
        runs = self.validation.runs
        size = f"{self.validation.num_bytes():,} bytes"
        if len(runs) == 1:
            where = f"{runs[0][0]:,} to {runs[0][1]:,}"
        else:
            where = f"{len(runs):,} pieces from {runs[0][0]:,} to {runs[-1][1]:,}"
        if self.by_file:
            pieces = f"{len(runs):,} piece{'' if len(runs) == 1 else 's'}"
            return f"{size}, the last tenth of files ({pieces}); --val-data names other bytes"
        return f"{size}, {where}"

    def validation_sha256(self) -> str:
        """Return the hex digest of where the validation bytes are."""
        return hashlib.sha256(repr(self.validation.runs).encode()).hexdigest()


def load_corpus(source: str, run: Path | None = None, *, stream_bytes: int = STREAM_BYTES) -> Corpus:
    """Return a corpus, read.

    Args:
        source: ``stdlib`` for the Python sources that every Python carries (with the texts of
            ``pydoc_data.topics``), or the path of a file (its bytes as they are) or of a folder (every
            regular file in it, sorted by relative path). Of a folder are left out: links, empty files, files that look binary
            and files of weights, version control, and the folders of runs. Or a stream, see `streams`. Data of MAPPED_BYTES or
            more, and a stream, stay on disk until their bytes are needed, so that they may be larger than memory. A file must not
            change meanwhile. The files of a folder are copied, one after the other, into a file without a name in the folder of
            caches, whose place is free when the process ends.
        run: the folder of the run that reads them, which is never data.
        stream_bytes: bytes of a stream that are read, at most.

    Raises:
        TrainingError: the path is missing, unreadable, neither file nor folder, holds no text, is a file of weights, or lies in
            the folder of the run; or the stream cannot be read, or the files of a folder cannot be copied.
    """
    if is_stream(source):
        data_N = mapped(written(source, stream_bytes))
        return Corpus(source, data_N, hashlib.sha256(data_N.numpy().data).hexdigest(), num_files=1)
    texts, left_out = find_texts(source, run)
    is_folder = source != STDLIB and Path(source).is_dir()
    digest, lengths = hashlib.sha256(), [0] * len(texts)

    def pieces() -> Iterator[bytes]:
        for number, text in enumerate(texts):
            with text.opened() as file:
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
                    lengths[number] += len(piece)
                    yield piece

    if sum(text.num_bytes() for text in texts) < MAPPED_BYTES:
        data = bytearray()
        for piece in pieces():
            data += piece
        data_N = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    elif is_folder or source == STDLIB:
        data_N = _copied(pieces())
    else:
        size = sum(map(len, pieces()))
        data_N = mapped(Path(source), size)
    if not data_N.numel():
        raise TrainingError(f"the data file {source!r} is empty: there is nothing to learn from")
    return Corpus(
        source=source,
        data_N=data_N,
        sha256=digest.hexdigest(),
        num_files=len(texts),
        left_out=left_out,
        ends=tuple(itertools.accumulate(lengths)) if is_folder else (),
    )


def _copied(pieces: Iterator[bytes]) -> torch.Tensor:
    """Return pieces one after the other, uint8 [N], mapped from a file without a name, which a kill leaves nothing of."""
    folder = settings.cache_folder()
    with told(f"a copy of the data to {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as copy:
            size = sum(copy.write(piece) for piece in pieces)
            copy.flush()
            return mapped(Path(f"/proc/self/fd/{copy.fileno()}"), size)


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
    return replace(_cut(total, validation), by_file=True) if validation else split_by_block(corpus, context)


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
