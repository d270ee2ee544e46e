"""Bits per byte of a model: on the fixed windows that a run is judged by, and on every byte of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import IO, TYPE_CHECKING

import torch

from arbitor.reference.config import NGRAM

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.graph.ranks import Ranks

NATS_PER_BIT = math.log(2)
"""One bit is this many nats; losses are nats per byte, reports bits per byte."""


def validation_bpb(model: ArbModel, windows_WT: torch.Tensor, *, batch: int, device: str) -> float | None:
    """Return the mean bits per predicted byte over all windows.

    Args:
        model: its weights are only read.
        windows_WT: int64 [W, T], on the CPU; places 3 to T - 1 of each window are predicted.
        batch: windows at a time, over all ranks. Each rank of the model takes a part of the windows.
        device: where the model is.

    Returns:
        Bits per byte, or None where a loss is not finite.
    """
    ranks = model.voting.ranks
    pieces = windows_WT.split(max(1, batch // ranks.count))

    def nats_of(turn: Sequence[int]) -> dict[str, float]:
        piece = pieces[turn[ranks.number]]
        return {"nats": model.loss(piece.to(device)).item() * len(piece)}

    found = in_turns(ranks, [len(piece) for piece in pieces], nats_of)
    # Exact, whatever the release of Python makes of `sum`.
    all_nats = math.fsum(each["nats"] for each in found)
    bpb = all_nats / windows_WT.shape[0] / NATS_PER_BIT
    return bpb if math.isfinite(bpb) else None


def in_turns(
    ranks: Ranks, sizes: Sequence[int], measure: Callable[[Sequence[int]], Mapping[str, float]]
) -> list[dict[str, float]]:
    """Return the numbers of some pieces, in the order of the pieces. Each rank measures some pieces, and all ranks return the same.

    Args:
        ranks: the ranks of a model. Every rank must call this with the same sizes.
        sizes: of the pieces, at least one, as in `turns`.
        measure: is given the pieces of a turn. It measures the piece of its rank, and returns numbers of the same names each time.
            It runs without gradients.
    """
    own: dict[int, Mapping[str, float]] = {}
    with torch.no_grad():
        for turn in turns(sizes, ranks.count):
            numbers, i = measure(turn), turn[ranks.number]
            if turn.index(i) == ranks.number:
                own[i] = numbers
    names, nothing = list(numbers), [0.0] * len(numbers)
    rows = [[*own[i].values()] if i in own else nothing for i in range(len(sizes))]
    found = ranks.total(torch.tensor(rows, dtype=torch.float64)).tolist()
    return [dict(zip(names, row, strict=True)) for row in found]


def turns(sizes: Sequence[int], count: int) -> Iterator[list[int]]:
    """Yield which of some pieces each of `count` ranks reads in a turn.

    In a turn all ranks read pieces of one size. Ranks that keep rows for each other exchange in every pass, and the shape of its
    input decides how a pass computes. A rank for which none is left reads one that another rank has. Each piece has one rank that
    reads it before others.

    Args:
        sizes: of the pieces. Those of one size stand next to each other.
        count: ranks.
    """
    for _, group in groupby(range(len(sizes)), key=lambda i: sizes[i]):
        alike = list(group)
        for first in range(0, len(alike), count):
            turn = alike[first : first + count]
            yield turn + turn[-1:] * (count - len(turn))


@dataclass(frozen=True)
class Measured:
    """What a model makes of some bytes.

    Attributes:
        nats: the sum of the losses of the bytes that were predicted.
        predicted: how many these are.
    """

    nats: float = 0.0
    predicted: int = 0

    @property
    def bpb(self) -> float | None:
        """Bits per predicted byte; None where no byte was predicted, or a loss is not finite."""
        return (
            self.nats / self.predicted / NATS_PER_BIT if self.predicted and math.isfinite(self.nats) else None
        )

    def __add__(self, other: Measured) -> Measured:
        """Return what the model makes of both."""
        return Measured(self.nats + other.nats, self.predicted + other.predicted)


def file_bpb(
    model: ArbModel,
    file: IO[bytes],
    *,
    batch: int,
    context: int,
    device: str,
    note: Callable[[int], object] | None = None,
) -> Measured:
    """Return what a model makes of a file. Every byte but the first three is predicted, once.

    A window begins three bytes before the end of the window before it, as three bytes are read before one is predicted. The last
    window is as long as what is left. No more than a batch of windows is in memory.

    Args:
        model: its weights are only read.
        file: open for reading.
        batch: windows at a time, at least 1.
        context: bytes of a window, at least 4.
        device: where the model is.
        note: is told after each batch how many bytes of the file were predicted; None: nobody is.
    """
    measured = Measured()
    with torch.no_grad():
        for windows_BT in file_windows(file, batch=batch, context=context):
            count = windows_BT.shape[0] * (windows_BT.shape[1] - NGRAM)
            measured += Measured(model.loss(windows_BT.to(device)).item() * count, count)
            if note is not None:
                note(measured.predicted)
    return measured


def file_windows(file: IO[bytes], *, batch: int, context: int) -> Iterator[torch.Tensor]:
    """Yield the windows of a file, int64 [B, T] with T the context; the last may be one that is shorter, of at least 4 bytes."""
    stride = context - NGRAM
    held = b""
    while True:
        wanted = batch * stride + NGRAM - len(held)
        piece = file.read(wanted)
        held += piece
        count = max(0, (len(held) - NGRAM) // stride)
        if count:
            bytes_N = torch.frombuffer(bytearray(held), dtype=torch.uint8).to(torch.int64)
            yield bytes_N[: count * stride + NGRAM].unfold(0, context, stride)
            held = held[count * stride :]
        if len(piece) < wanted:
            if len(held) > NGRAM:
                yield torch.tensor([list(held)])
            return
