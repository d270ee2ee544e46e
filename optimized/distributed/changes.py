"""Bytes that changed, as the owner of a weight sends them: few of its trits and levels change in a step.

A piece is a run of bytes that all ranks have. It is sent as a whole, or as its changes: how many bytes of each block of BLOCK
changed, the place of each in its block, and its value. The number of bytes that arrive tells which of the two it is.
Legend: P bytes of a piece, S blocks, C changed bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 255
"""Bytes of a block, so that a place in it is a byte, and so is the number of its changes."""


def num_blocks(num_bytes: int) -> int:
    """Return S, the blocks of a piece of P bytes. The last one may be shorter."""
    return -(-num_bytes // BLOCK)


def changes_bytes(num_bytes: int, num_changed: int) -> int:
    """Return how many bytes are sent for a piece of P bytes of which C differ."""
    return min(num_blocks(num_bytes) + 2 * num_changed, num_bytes)


class Changed:
    """A piece before and after the steps of its owner.

    Attributes:
        number: int64 [], on the device of the piece: the bytes that differ.
    """

    def __init__(self, before_P: Tensor, after_P: Tensor) -> None:
        """Find what changed. The host does not wait for the device."""
        self._after_P = after_P
        ends_S = _counts(before_P, after_P).cumsum(0)
        self.number = ends_S[-1]
        # Written before the host knows how many changes there are, so that they are there when it does.
        self._changes = _written(before_P, after_P, ends_S)

    def sent(self, num_changed: int) -> Tensor:
        """Return what makes the one into the other: uint8 counts [S], places [C], values [C]; or the piece [P] if it is no longer.

        Args:
            num_changed: C, as the host knows it.
        """
        size = changes_bytes(self._after_P.numel(), num_changed)
        return self._after_P if size == self._after_P.numel() else self._changes[:size]


def _counts(before_P: Tensor, after_P: Tensor) -> Tensor:
    """Return how many bytes of each block differ, int32 [S]."""
    size = before_P.numel()
    if before_P.is_cuda:
        from arbitor.optimized.kernels.changes import counted

        return counted(before_P, after_P, num_blocks(size), BLOCK)
    blocks_SB = torch.nn.functional.pad(before_P != after_P, (0, -size % BLOCK)).view(-1, BLOCK)
    return blocks_SB.sum(dim=1, dtype=torch.int32)


def _written(before_P: Tensor, after_P: Tensor, ends_S: Tensor) -> Tensor:
    """Return what `Changed.sent` returns of a piece that is not sent as it is, with anything behind it."""
    if before_P.is_cuda:
        from arbitor.optimized.kernels.changes import written

        return written(before_P, after_P, ends_S, BLOCK)
    changed_C = (before_P != after_P).nonzero().flatten()
    counts_S = ends_S.diff(prepend=ends_S.new_zeros(1)).to(torch.uint8)
    return torch.cat([counts_S, (changed_C % BLOCK).to(torch.uint8), after_P[changed_C]])


def change(piece_P: Tensor, sent: Tensor) -> None:
    """Make a piece what it is after its changes, in place.

    Args:
        piece_P: uint8 [P], the piece before.
        sent: uint8, what `Changed.sent` returned.
    """
    size = piece_P.numel()
    if sent.numel() == size:
        piece_P.copy_(sent)
        return
    counts_S, rest = sent[: num_blocks(size)], sent[num_blocks(size) :]
    if piece_P.is_cuda:
        from arbitor.optimized.kernels.changes import taken

        taken(piece_P, sent, counts_S.cumsum(0, dtype=torch.int64), BLOCK)
        return
    places_C, values_C = rest.chunk(2) if rest.numel() else (rest, rest)
    firsts_S = torch.arange(0, size, BLOCK, device=sent.device)
    piece_P[firsts_S.repeat_interleave(counts_S.to(torch.int64)) + places_C] = values_C


class Piece:
    """Trits and levels of weights of one owner, as bytes one after the other, which the owner steps and sends to all ranks.

    Attributes:
        size: bytes of the piece.
    """

    def __init__(self) -> None:
        self.size = 0
        self._tensor_ids: list[int] = []
        self._tensors: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._tensors[0].device

    def add(self, tensor_id: int, tensors: list[Tensor]) -> None:
        """Add tensors of bytes, which share memory with the weight of a tensor id."""
        self._tensor_ids.append(tensor_id)
        self._tensors += tensors
        self.size += sum(each.numel() for each in tensors)

    def step(self, apply: Callable[[Sequence[int]], None]) -> None:
        """Step the weights on their owner by `apply`, which takes their tensor ids."""
        apply(self._tensor_ids)

    def changed_by(self, apply: Callable[[Sequence[int]], None]) -> Changed:
        """Step the weights as `step` does; return what changed."""
        before = self.content()
        self.step(apply)
        return Changed(before, self.content())

    def content(self) -> Tensor:
        """Return a copy of the piece, uint8 [P]."""
        return torch.cat(self._tensors)

    def change(self, sent: Tensor) -> None:
        """Give the weights what their owner has sent: the piece, or its changes if these are shorter."""
        piece = sent
        if sent.numel() < self.size:
            piece = self.content()
            change(piece, sent)
        # One launch copies many tensors.
        torch._foreach_copy_(self._tensors, piece.split([len(each) for each in self._tensors]))
