"""The rule of docs/spec/distributed.md, computed by one process: what each rank would exchange is kept, and summed here.

Legend: B windows of all ranks, T bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from arbitor.reference.graph import ArbModel, mxint8
from arbitor.reference.graph.model import LOSS_REFERENCE
from arbitor.reference.graph.open_pass import Note, Voter
from arbitor.reference.graph.ranks import Gradient, Ranks
from arbitor.reference.graph.voting import Voting

Exchange = tuple[Gradient, Callable[[Gradient | None], None]]


class OneOfMany(Ranks):
    """A rank whose gradients are kept instead of sent. Losses whose means need other ranks are none of its business."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: list[Exchange] = []
        self.losses: list[Tensor] = []

    def part(self, loss: Tensor) -> Tensor:
        return loss / self.count

    def total(self, values: Tensor) -> Tensor:
        """Keep the loss, the one value that these models sum."""
        self.losses.append(values)
        return values

    def exchange(self, tensor_id: int, gradient: Gradient, cast: Callable[[Gradient | None], None]) -> None:
        self.kept.append((gradient, cast))

    def divisor(self, chosen: Tensor) -> Tensor:
        raise NotImplementedError("the oracle takes models whose losses are means over all positions")


def take_pass(
    model: ArbModel, ids_BT: Tensor, *, count: int, rate: float, step: int, exchange: str = "full"
) -> None:
    """Do to a model what a pass of `count` ranks does, each with its part of the windows."""
    voting, ranks = model.voting, OneOfMany(count)
    voting.ranks = ranks
    kept, notes, notes_before = [], [], voting.notes
    for part_BT in ids_BT.chunk(count):
        ranks.kept, voting.notes = [], []
        assert model.backward(model.losses(part_BT), rate=rate, step=step)
        kept.append(ranks.kept)
        notes.append(voting.notes)
    voting.ranks, voting.notes = Ranks(), notes_before
    size, config = 1, model.config
    if config.vote_rule == "sign":
        loss = float(in_order(ranks.losses))
        size = model.ops.step_from_loss(loss, LOSS_REFERENCE, config.max_vote_step)
    with voting.taking(rate=rate, step=step, size=size) as taken:
        for exchanges in zip(*kept, strict=True):
            gradients = [sent(gradient, exchange, voting) for gradient, _ in exchanges]
            # The function knows its weight, which is the same in every pass.
            _, cast = exchanges[0]
            cast(summed(gradients))
        for of_ranks in zip(*notes, strict=True):
            seen = zip(*(note.seen for note in of_ranks), strict=True)
            taken.notes.append(Note(of_ranks[0].tell, tuple(torch.cat(each) for each in seen)))


def take_adapter_passes(model: ArbModel, batches: Sequence[Tensor], *, count: int, rate: float) -> None:
    """Leave with the adapters of a model the gradients that `count` ranks add up after a pass of each batch."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    of_ranks = []
    model.voting.ranks = OneOfMany(count)
    for number in range(count):
        for step, ids_BT in enumerate(batches):
            assert model.backward(model.losses(ids_BT.chunk(count)[number]), rate=rate, step=step)
        of_ranks.append([each.grad for each in parameters])
        for each in parameters:
            each.grad = None
    model.voting.ranks = Ranks()
    for each, *grads in zip(parameters, *of_ranks, strict=True):
        if grads[0] is not None:
            each.grad = in_order(grads)


def sent(gradient: Gradient, exchange: str, voting: Voting) -> Gradient:
    """Return a gradient as it arrives."""
    if exchange == "full" or gradient.chosen or not voting.makes_orthogonal(gradient.num_matrices):
        return gradient
    grad_NK = gradient.grad_NK
    return replace(gradient, grad_NK=mxint8.decoded(mxint8.encoded(grad_NK), *grad_NK.shape))


def in_order(terms: list[Tensor]) -> Tensor:
    """Return the sum of terms, the first two first."""
    total, *others = terms
    for other in others:
        total = total + other
    return total


def summed(gradients: list[Gradient]) -> Gradient:
    """Return the sum of gradients in the order of the ranks: in float32, or in float64, rounded once, if rows were chosen."""
    first = gradients[0]
    if not first.chosen:
        total = in_order([gradient.grad_NK.to(torch.float32) for gradient in gradients])
        return Gradient(total, first.rows, first.num_matrices, chosen=False)
    height = first.grad_NK.shape[0] // first.num_matrices if first.num_matrices else 1
    sums: dict[int, Tensor] = {}
    for gradient in gradients:
        assert gradient.rows is not None
        for row, block in zip(
            gradient.rows.reshape(-1, height)[:, 0].tolist(),
            gradient.grad_NK.to(torch.float64).reshape(-1, height, gradient.grad_NK.shape[1]),
            strict=True,
        ):
            if row >= 0:
                sums[row] = sums[row] + block if row in sums else block
    rows = [row + ahead for row in sums for ahead in range(height)]
    total = torch.cat(list(sums.values())).to(torch.float32) if sums else first.grad_NK[:0].to(torch.float32)
    return Gradient(
        total,
        torch.tensor(rows, dtype=torch.int64, device=total.device),
        len(sums) if first.num_matrices else 0,
        chosen=True,
    )


def watch_totals(model: ArbModel) -> dict[str, Tensor]:
    """Return a mapping that fills with the gradients that weights vote with, each use added up, by the name of the weight."""
    names = {module.tensor_id: name for name, module in model.ternary_modules().items()}
    found: dict[str, Tensor] = {}
    cast = model.voting._cast_total

    def watched(voter: Voter, total: Gradient | None) -> None:
        if total is not None:
            grad = total.grad_NK.to(torch.float64)
            dense = found.setdefault(names[voter.tensor_id], grad.new_zeros(voter.weight.shape))
            if total.rows is None:
                dense += grad
            else:
                dense.index_add_(0, total.rows.clamp(min=0), grad * (total.rows >= 0)[:, None])
        cast(voter, total)

    model.voting._cast_total = watched  # type: ignore[method-assign]
    return found
