"""Ranks: the processes that train one model together. docs/spec/distributed.md has the rule, this file the places where ranks meet.

The rank of this file trains alone. Each method says what holds for any number of ranks, and does what that comes to for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from arbitor.reference.types import LaidOutWeight


@dataclass(frozen=True)
class Gradient:
    """A gradient of a weight that is about to vote.

    Fields:
        grad_NK:      the gradient of the weight, or of its `rows`.
        rows:         int64 [N], the rows of the weight, each once, and -1 for unused slots, which stand last; None for all rows.
        num_matrices: matrices that are stacked in the gradient and are made orthogonal; 0 if the rows vote as they are.
        chosen:       whether the batch chose the rows, so that each rank may name others. A matrix of a stack is chosen as a whole.
        part:         where the gradient of a large weight is made in parts, the first row of a matrix in this one.
    """

    grad_NK: Tensor
    rows: Tensor | None = None
    num_matrices: int = 0
    chosen: bool = False
    part: int = 0

    def on(self, change: Callable[[Tensor], Tensor]) -> Gradient:
        """Return the gradient with `change` applied to its tensors."""
        rows = None if self.rows is None else change(self.rows)
        return replace(self, grad_NK=change(self.grad_NK), rows=rows)


class Ranks:
    """The ranks of a model. This rank trains alone; `arbitor.optimized.distributed` has the ranks of torch.distributed.

    Every rank calls the same methods in the same order, with tensors of the same shapes.

    Attributes:
        number: the number of this rank, 0 .. count - 1.
        count:  how many ranks train the model.
    """

    number = 0
    count = 1

    def part(self, loss: Tensor) -> Tensor:
        """Return the mean loss of this rank's windows as a part of the mean over the windows of all ranks: divided by `count`."""
        return loss

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, added in the order of their numbers. Each rank has the same bits."""
        return values

    def everyone(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield, for each of some tensors, those of all ranks: one after the other along the first dimension, by their numbers.

        Ranks may exchange as the caller asks for more, so the caller takes all of them.
        """
        yield from tensors

    def dealt(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Give a tensor to each rank, and return what each rank gave to this one, in the order of their numbers.

        The tensors have one dtype, and one shape but for the first dimension, which may be 0.

        Args:
            parts: what each rank is given, in the order of their numbers.
        """
        return list(parts)

    def whole(self, tensor_id: int, counts: Tensor) -> Tensor:
        """Return counts over all rows of a weight, for counts over the rows that this rank has of it."""
        return counts

    def divisor(self, chosen: Tensor) -> Tensor:
        """Return what the sum over the chosen terms of this rank is divided by, [].

        It is the number of chosen terms over all ranks, divided by `count`, so that the mean of the ranks' quotients is the mean of
        all chosen terms. It is 1 if nothing is chosen on any rank.

        Args:
            chosen: bool, the terms that this rank chose.
        """
        return chosen.sum().clamp(min=1)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over ranks of a value."""
        return values

    def answers_for(self, tensor_id: int) -> bool:
        """Return whether this rank counts what is to be counted once of a weight, such as faults, or of its rows of the weight."""
        return True

    def exchange(self, tensor_id: int, gradient: Gradient, cast: Callable[[Gradient | None], None]) -> None:
        """Sum the gradients of a weight over ranks, and give the sum to `cast`; ranks that do not step the weight give it None.

        Where several ranks keep rows of a weight, or their accumulators, each rank is given the sums of its rows, and their places
        among these. `cast` may run later, at the latest in `finish`. The sums of one weight are cast in the order in which they
        were exchanged.
        """
        cast(gradient)

    def step(self, weights: Mapping[int, LaidOutWeight], apply: Callable[[Sequence[int]], None]) -> None:
        """Step weights by `apply`, each on the rank that steps it. The other ranks are given its trits and exponents.

        They have them at the latest after `finish`.

        Args:
            weights: by tensor id, the same on every rank.
            apply: steps the weights of some tensor ids. No step depends on another one.
        """
        apply(list(weights))

    def finish(self) -> None:
        """End what `exchange` and `step` have begun."""

    def abandon(self) -> None:
        """Forget what `exchange` and `step` have begun."""
