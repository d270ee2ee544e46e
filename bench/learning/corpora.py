"""Texts that stay on disk: a run reads the pages that its windows lie in, so that a text may be larger than memory."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from arbitor.optimized.training.data import Corpus, load_corpus
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.streams import is_stream
from arbitor.optimized.training.texts import STDLIB, find_texts

PIECE_BYTES = 2**24
"""Bytes that are held at a time while a text is read once from its start to its end. A multiple of BLOCK_BYTES."""

BLOCK_BYTES = 32
"""Bytes that are compared at once where copies are looked for."""


def open_corpus(source: str, scratch: Path | None = None) -> Corpus:
    """Return the corpus that `load_corpus` returns, with its bytes mapped from a file.

    A file is mapped where it is, and must not be made shorter while it is in use. The files of a folder are copied, one after the
    other, into one file that has no name any more once it is mapped, so that its place is free when the program ends. A stream is
    written into the file that `load_corpus` maps.

    Args:
        source: as for `load_corpus`.
        scratch: folder for that copy; None is the folder for temporary files.

    Raises:
        TrainingError: as `load_corpus`, or the copy cannot be written.
    """
    if source == STDLIB or is_stream(source):
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


def copied(windows_WT: Tensor, data_N: Tensor) -> Tensor:
    """Return which windows another text has a copy of, bool [W].

    The text is cut into blocks of 32 bytes. Wherever a copy of a window begins in it, the window holds whole blocks of the text. So
    a window counts as copied if, from one of its first 32 bytes on, each of its runs of 32 bytes is a block of the text. No copy
    is missed, and what is put together from several places may be counted too. Windows of fewer than 63 bytes are never counted:
    they need not hold a whole block, and short runs stand in every text.

    Args:
        windows_WT: int64 [W, T], values 0 to 255.
        data_N: uint8 [N].
    """
    num_windows, length = windows_WT.shape
    found_W = torch.zeros(num_windows, dtype=torch.bool)
    if length < 2 * BLOCK_BYTES - 1 or data_N.numel() < BLOCK_BYTES:
        return found_W
    runs_WO = _hashes(windows_WT.to(torch.uint8).unfold(1, BLOCK_BYTES, 1))
    is_block_WO = torch.zeros_like(runs_WO, dtype=torch.bool)
    for piece_N in data_N[: data_N.numel() // BLOCK_BYTES * BLOCK_BYTES].split(PIECE_BYTES):
        is_block_WO |= torch.isin(runs_WO, _hashes(piece_N.view(-1, BLOCK_BYTES)))
    for first in range(BLOCK_BYTES):
        found_W |= is_block_WO[:, first::BLOCK_BYTES].all(dim=1)
    return found_W


def _hashes(blocks: Tensor) -> Tensor:
    """Return a hash of each block, int64 [...], of uint8 [..., 32]. Sums wrap around."""
    words = blocks.contiguous().view(torch.int64)
    # Odd numbers, so that each word alone decides its part.
    odd = torch.tensor([0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB, 0x2545F4914F6CDD1D])
    mixed = words * odd
    return ((mixed ^ (mixed >> 29)) * odd.flip(0)).sum(dim=-1)


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
