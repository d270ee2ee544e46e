"""What a large text takes of memory, for test_streams.py: a process that has nothing else to do says how much it grew.

python -m conformance.training.texts_at_work FOLDER blocks|one-run
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import baselines, data
from arbitor.optimized.training.baselines import baseline_bpb
from arbitor.optimized.training.data import (
    Segments,
    Split,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)

SIZE = 2**23
"""Bytes of a file. The folder has three."""

WAYS = ("blocks", "one-run")
"""How a text is split: blocks are held out of it, or it is all there is."""


def write(folder: Path, size: int = SIZE) -> None:
    """Write a folder of three files, of two characters each."""
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_bytes(bytes([65 + number, 10]) * (size // 2))


def own_memory() -> int:
    """Return the bytes that this process holds itself, without pages of files, which the system takes back when it likes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def grown(folder: Path, way: str) -> int:
    """Return by how many bytes this process grows at most while it reads, splits, counts and draws from a folder."""
    before = own_memory()
    corpus = load_corpus(str(folder))
    whole = Segments(((0, corpus.data_N.numel()),))
    split = split_corpus(corpus, 64) if way == WAYS[0] else Split(whole, whole)
    windows_WT = validation_windows(corpus, split, count=32, context=64)
    peak = own_memory()
    bincount = torch.bincount

    def watched(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal peak
        peak = max(peak, own_memory())
        return bincount(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bincount", watched)
        baseline_bpb(corpus, split.train, windows_WT)
    for micro_step in range(50):
        windows_BT = training_batch(corpus, split, batch=4, context=64, seed=0, micro_step=micro_step)
        assert set(windows_BT.unique().tolist()) <= {10, 65, 66, 67}
    return max(peak, own_memory()) - before


def main(folder: Path, way: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARB_CACHE", str(folder / "cache"))
        patch.setattr(data, "MAPPED_BYTES", 3 * SIZE)
        patch.setattr(data, "PIECE_BYTES", 2**20)
        patch.setattr(baselines, "PIECE_BYTES", 2**16)
        patch.setattr(baselines, "COUNTED_BYTES", 2**21)
        # What is imported and allocated once, whatever the text, belongs to the process.
        write(folder / "small", 2**12)
        grown(folder / "small", way)
        write(folder / "large")
        print(grown(folder / "large", way))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
