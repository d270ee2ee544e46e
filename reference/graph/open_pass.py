"""One backward pass while it is open: its votes, its notes, and the copies by which it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference.types import LaidOutWeight

VOTED_IN = ("trit_accum", "exponent_accum")
"""The tensors of a weight that a vote changes."""


class Average(Protocol):
    """A running mean of the gradients of a weight, as a vote sees it. `averages.GradientAverage` fits."""

    def lead(self, grad_NK: Tensor, rows: Tensor | None, rate: float | Tensor) -> Tensor:
        """Return what votes for a gradient of the weight, or of its rows, and change the mean in place."""

    def tables(self) -> dict[str, Tensor]:
        """Return the integers of the mean by name."""


@dataclass(frozen=True)
class Note:
    """A message from a backward pass to the next step.

    Fields:
        tell: the method of a module that receives the message.
        seen: arguments of the method; None stands for a whole weight.
    """

    tell: Callable[..., None]
    seen: tuple[Tensor | None, ...]

    def on(self, change: Callable[[Tensor], Tensor]) -> Note:
        """Return the note with `change` applied to each tensor."""
        return Note(self.tell, tuple(None if tensor is None else change(tensor) for tensor in self.seen))


@dataclass(frozen=True)
class Vote:
    """A gradient of a weight, and how it votes.

    Fields:
        weight:       the weight that votes.
        grad_NK:      its gradient, or that of its `rows`.
        tensor_id:    the place of the weight in definition order.
        rows:         int64 [N], the rows of the weight that vote, or None for all.
        num_matrices: matrices that are stacked in the gradient and are made orthogonal, or 0.
        uses:         how often a pass uses the weight.
        average:      the running mean that leads a gradient that is made orthogonal, or None.
        first_row:    the row of a table that is the first one of the weight, where other ranks keep other rows.
    """

    weight: LaidOutWeight
    grad_NK: Tensor
    tensor_id: int
    rows: Tensor | None
    num_matrices: int
    uses: int
    average: Average | None
    first_row: int

    @property
    def matrix(self) -> tuple[int, int, torch.device]:
        """Rows and columns of each matrix, and where it lies."""
        return self.grad_NK.shape[0] // self.num_matrices, self.grad_NK.shape[1], self.grad_NK.device

    @property
    def kind(self) -> tuple[int, ...]:
        """What votes have in common whose weights can be counted in together: all rows or some, shape, format and uses."""
        weight = self.weight
        return int(self.rows is None), *weight.shape, weight.group_size, weight.mantissa_bits, self.uses


class Pass:
    """One backward pass while it is open.

    Attributes:
        rate:    `rate` of `stochastic_votes`, a number or a 0-dim float32 tensor.
        step:    dither step of the micro-batch, a number or a 0-dim int64 tensor.
        size:    vote size of the `sign` rule, 1 .. 127.
        moves:   whether weights vote and tables count; False at rate 0.
        notes:   the notes of the pass so far.
        waiting: votes whose gradients are still to be made orthogonal, in the order in which they came.
        reached: whether the pass came through a weight of the model.
        wrote:   whether a weight has voted.
    """

    def __init__(
        self, *, rate: float | Tensor, step: int | Tensor, size: int, moves: bool, keeps: bool
    ) -> None:
        """Begin a pass. `keeps` says whether the pass keeps a copy of what votes change, for `undo`."""
        self.rate, self.step, self.size, self.moves = rate, step, size, moves
        self.notes: list[Note] = []
        self.waiting: list[Vote] = []
        self.reached = self.wrote = False
        self._keeps = keeps
        self._kept: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._kept_rows: dict[Any, int] = {}

    def keep(self, tensor: Tensor, rows: Tensor | None = None) -> None:
        """Copy a tensor, or some of its rows, before it is written to. For a row of -1, which stands for none, row 0 is copied."""
        if self._keeps:
            rows = None if rows is None else rows.clamp(min=0)
            self._kept.append((tensor, rows, tensor.clone() if rows is None else tensor[rows]))

    def keep_weight(self, tensor_id: int, weight: LaidOutWeight, rows: Tensor | None) -> None:
        """Copy the counts that a vote of a weight, or of its `rows`, is about to change, unless all were copied before."""
        tensors = weight.tensors()
        self.keep_rows(
            tensor_id, [tensors[name] for name in VOTED_IN if name in tensors], weight.shape[0], rows
        )

    def keep_rows(self, key: Any, tensors: Iterable[Tensor], num_rows: int, rows: Tensor | None) -> None:
        """Copy `rows` of tensors of `num_rows` rows, or all of them, unless all were copied under the key before.

        If the copied rows would outnumber the rows, whole tensors are copied. So a pass holds at most two copies.
        """
        kept = self._kept_rows.get(key, 0)
        if not self._keeps or kept > num_rows:
            return
        kept += num_rows + 1 if rows is None else rows.numel()
        self._kept_rows[key] = kept
        for tensor in tensors:
            self.keep(tensor, None if kept > num_rows else rows)

    def undo(self) -> None:
        """Write the copies back, the newest first."""
        for tensor, rows, copy in reversed(self._kept):
            if rows is None:
                tensor.copy_(copy)
            else:
                tensor[rows] = copy
