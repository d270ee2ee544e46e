"""Texts that stay on disk: a run reads the pages that its windows lie in, so that a text may be larger than memory."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from arbitor.optimized.training.data import Corpus, load_corpus
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.texts import STDLIB, find_texts

PIECE_BYTES = 2**24
"""Bytes that are held at a time while a text is read once from its start to its end."""


def open_corpus(source: str, scratch: Path | None = None) -> Corpus:
    """Return the corpus that `load_corpus` returns, with its bytes mapped from a file.

    A file is mapped where it is, and must not be made shorter while it is in use. The files of a folder are copied, one after the
    other, into one file that has no name any more once it is mapped, so that its place is free when the program ends.

    Args:
        source: as for `load_corpus`.
        scratch: folder for that copy; None is the folder for temporary files.

    Raises:
        TrainingError: as `load_corpus`, or the copy cannot be written.
    """
    if source == STDLIB:
        return load_corpus(source)
    texts, left_out = find_texts(source)
    digest, lengths = hashlib.sha256(), [0] * len(texts)
    is_folder = Path(source).is_dir()

    def pieces() -> Iterator[bytes]:
        for number, text in enumerate(texts):
            with text.opened() as file:
                for piece in _pieces_of(file):
                    digest.update(piece)
                    lengths[number] += len(piece)
                    yield piece

    if is_folder:
        data_N = _copied(pieces(), scratch)
    else:
        for _ in pieces():
            pass
        data_N = _mapped(source, sum(lengths))
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


def _pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _copied(pieces: Iterator[bytes], scratch: Path | None) -> torch.Tensor:
    """Return pieces one after the other, uint8 [N], mapped from a file without a name."""
    try:
        with tempfile.NamedTemporaryFile(dir=scratch) as copy:
            size = sum(copy.write(piece) for piece in pieces)
            copy.flush()
            return _mapped(copy.name, size)
    except OSError as error:
        raise TrainingError(f"cannot copy the data to {scratch}: {error.strerror or error}") from error


def _mapped(path: str, size: int) -> torch.Tensor:
    if not size:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
