"""One backward pass while it is open: its votes, its notes, and the copies by which it is undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference.constants import VOTED_IN
from arbitor.reference.graph.ranks import Gradient
from arbitor.reference.types import LaidOutWeight


class Average(Protocol):
    """A running mean of the gradients of a weight, as a vote sees it. `averages.GradientAverage` fits."""

    def lead(self, grad_NK: Tensor, rows: Tensor | None, rate: float | Tensor) -> Tensor:
        """Return what votes for a gradient of the weight, or of its rows, and change the mean in place."""

    def tables(self) -> dict[str, Tensor]:
        """Return the integers of the mean by name."""

    def leave(self) -> None:
        """Let another rank keep the mean."""


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
class Voter:
    """A weight that votes, and how.

    Fields:
        weight:    the weight.
        tensor_id: its place in definition order.
        uses:      how many gradients of it a pass gives.
        average:   the running mean that leads a gradient that is made orthogonal, or None.
        first_row: the row of a table that is the first one of the weight, where other ranks keep other rows.
        voted:     the method of a module that is told, with the next step, which rows voted on any rank (None: all); or None.
        shares:    for how many of the `uses` a vote stands, which is cast at its part of the rate.
        now:       returns the weight as it is by now, or None if it is frozen: a sum of several passes may vote after the model was
                   moved or the weight was frozen.
    """

    weight: LaidOutWeight
    tensor_id: int
    now: Callable[[], LaidOutWeight | None]
    uses: int = 1
    average: Average | None = None
    first_row: int = 0
    voted: Callable[[Tensor | None], None] | None = None
    shares: int = 1

    @property
    def part(self) -> float:
        """The part of the rate at which the weight votes."""
        return self.shares / self.uses


Sum = tuple[Voter, Gradient]
"""A sum of gradients, and who votes with it."""

Key = tuple[int, int]
"""A weight and a part of it: its tensor id, and `Gradient.part`."""


@dataclass(frozen=True)
class Sums:
    """The sums of gradients over the micro-batches of a step so far, which vote with the step.

    Fields:
        totals: the sums, by weight and part. There are none where weights vote in each pass, nor once the sums have voted.
        accum:  micro-batches of the step.
        count:  micro-batches that were taken.
        rate:   the rate of the last of them, at which the sums vote.
    """

    totals: dict[Key, Sum]
    accum: int
    count: int
    rate: float

    def on(self, change: Callable[[Tensor], Tensor]) -> Sums:
        """Return the sums with `change` applied to each tensor of a gradient."""
        return replace(
            self, totals={key: (voter, total.on(change)) for key, (voter, total) in self.totals.items()}
        )

    def without(self, module: object) -> Sums:
        """Return the sums of the weights of all other modules."""
        left = {
            key: each
            for key, each in self.totals.items()
            if getattr(each[0].voted, "__self__", None) is not module
        }
        return replace(self, totals=left)


@dataclass(frozen=True)
class Vote:
    """A vote of a weight with a gradient that was summed over ranks."""

    voter: Voter
    gradient: Gradient

    def of(self, grad_NK: Tensor) -> Vote:
        """Return the vote with another gradient of the same rows."""
        return replace(self, gradient=replace(self.gradient, grad_NK=grad_NK))

    @property
    def matrix(self) -> tuple[int, int, torch.device]:
        """Rows and columns of each matrix, and where it lies."""
        grad_NK = self.gradient.grad_NK
        return grad_NK.shape[0] // self.gradient.num_matrices, grad_NK.shape[1], grad_NK.device

    @property
    def kind(self) -> tuple[float, ...]:
        """What votes have in common whose weights can be counted in together: whether all rows vote, shape, format and rate."""
        weight = self.voter.weight
        all_rows = int(self.gradient.rows is None)
        return all_rows, *weight.shape, weight.group_size, weight.mantissa_bits, self.voter.part


class Pass:
    """One backward pass while it is open.

    Attributes:
        rate:     `rate` of `stochastic_votes`, a number or a 0-dim float32 tensor.
        accum:    how many micro-batches the step has, of which the pass takes one.
        step:     dither step of the micro-batch, a number or a 0-dim int64 tensor.
        size:     vote size of the `sign` rule, 1 .. 127.
        moves:    whether weights vote and tables count; False at rate 0.
        recorded: whether a CUDA graph records the whole pass, so that its replays vote.
        notes:    the notes of the pass so far.
        sums:     for each weight, or part of one, that a pass uses several times: how many of its gradients came, and their sum.
        lone:     how many gradients of such a weight, or part of one, voted by themselves.
        held:     the sums over the micro-batches of the step, those of this pass among them (`hold`).
        waiting:  votes whose gradients are still to be made orthogonal, in the order in which they came.
        reached:  whether the pass came through a weight of the model.
        wrote:    whether the pass has changed something that it may have to undo: a weight, a mean or a sum that is held.
    """

    def __init__(
        self,
        *,
        rate: float | Tensor,
        step: int | Tensor,
        size: int,
        moves: bool,
        recorded: bool,
        keeps: bool,
        accum: int = 1,
        held: Mapping[Key, Sum] = MappingProxyType({}),
    ) -> None:
        """Begin a pass.

        Args:
            rate, step, size, moves, recorded, accum: as the attributes.
            keeps: whether the pass keeps a copy of what votes change, for `undo`.
            held: the sums of the micro-batches before this one.
        """
        self.rate, self.step, self.size, self.moves, self.recorded = rate, step, size, moves, recorded
        self.accum, self.held = accum, dict(held)
        self.notes: list[Note] = []
        self.sums: dict[Key, tuple[int, Voter, Gradient]] = {}
        self.lone: Counter[Key] = Counter()
        self.waiting: list[Vote] = []
        self.reached = self.wrote = False
        self._keeps = keeps
        self._kept: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._kept_rows: dict[Any, int] = {}

    def summed(self, voter: Voter, gradient: Gradient) -> Sum | None:
        """Add a gradient to those of the other uses of its weight. Return the sum and who votes with it if it was the last one.

        The memory of the gradient becomes that of the sum.
        """
        key = voter.tensor_id, gradient.part
        count, _, so_far = self.sums.pop(key, (0, voter, None))
        total = (
            gradient if so_far is None else replace(gradient, grad_NK=so_far.grad_NK.add_(gradient.grad_NK))
        )
        count += 1
        if count == voter.uses:
            return replace(voter, shares=count), total
        self.sums[key] = count, voter, total
        return None

    def hold(self, voter: Voter, gradient: Gradient) -> None:
        """Add a gradient to the sum of its weight, or part of one, over the micro-batches of the step.

        The memory of the first gradient becomes that of the sum. A pass that can be undone makes a new sum of the others, and so
        leaves the old one to be found again. At a rate of 0 that is known to the device alone nothing is added.
        """
        key, grad_NK = (voter.tensor_id, gradient.part), gradient.grad_NK
        if isinstance(self.rate, Tensor):
            # A product would not do, because the gradients of a loss that is not finite are not either.
            grad_NK = torch.where((self.rate != 0).to(grad_NK.device), grad_NK, 0.0)
        if key in self.held:
            # It has the same rows, which lie in no graph.
            before, gradient = self.held[key]
            voter = replace(voter, shares=max(voter.shares, before.shares))
            if self._keeps:
                grad_NK = gradient.grad_NK + grad_NK
            else:
                self.wrote = True
                grad_NK = gradient.grad_NK.add_(grad_NK)
        elif self.recorded:
            raise RuntimeError(
                "a recorded pass came to a weight of which no sum is held, but must have been launched before it is recorded"
            )
        self.held[key] = voter, replace(gradient, grad_NK=grad_NK)

    def rest(self) -> Iterator[Sum]:
        """Return the sums to which not every use of a weight has added, in the order of weights, and who votes with each.

        A sum has the part of the rate that the gradients left which voted by themselves.
        """
        for key in sorted(self.sums):
            _, voter, total = self.sums.pop(key)
            # Several backward passes may have run, each with all uses.
            yield replace(voter, shares=voter.uses - self.lone[key] % voter.uses), total

    def keep(self, tensor: Tensor, rows: Tensor | None = None) -> None:
        """Copy a tensor, or some of its rows, before it is written to. For a row of -1, which stands for none, row 0 is copied."""
        if self._keeps:
            rows = None if rows is None else rows.clamp(min=0)
            self._kept.append((tensor, rows, tensor.clone() if rows is None else tensor[rows]))

    def keep_counts(self, vote: Vote) -> None:
        """Copy the counts that a vote is about to change, unless all of its weight were copied before."""
        weight = vote.voter.weight
        tensors = weight.tensors()
        counts = [tensors[name] for name in VOTED_IN if name in tensors]
        self.keep_rows(vote.voter.tensor_id, counts, weight.shape[0], vote.gradient.rows)

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
