"""The ranks of a model: gradients summed to the rank that owns a weight, and trits and exponents given back to all.

All that is exchanged travels as bytes and is added by the receiver, in the order of the ranks' numbers. So no sum depends on a
backend, on a ring, or on who was first.
Legend: N rows of a gradient, K columns, S rows or matrices that one rank names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.distributed.changes import Changed, Piece, changes_bytes
from arbitor.optimized.distributed.gradients import TOGETHER_BYTES, GradientSums, Sending
from arbitor.optimized.distributed.owners import owned_rows
from arbitor.optimized.distributed.sums import in_order, sum_in_order
from arbitor.optimized.distributed.traffic import Recorded, Traffic
from arbitor.optimized.distributed.world import World, as_bytes
from arbitor.optimized.training.options import EXCHANGES
from arbitor.reference.constants import VOTED_IN
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.layers import TernaryEmbedding
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.ranks import Gradient, Ranks
from arbitor.reference.graph.spread import joined
from arbitor.reference.types import LaidOutWeight, TernaryWeight

FULL, MXINT8 = EXCHANGES
"""In the dtype of the activations, or in eight bits."""

WIDEST_BYTES = 8
"""Bytes of the widest element of a tensor that passes leave for tables."""

WHOLE_BYTES = 2**24
"""Most bytes of the trits and levels of an owner that are sent as they are. To wait for the number of those that changed would take
longer between GPUs of one host, where 16 MiB take 50 us."""

PIECE_BYTES, RUN_BYTES = 2**26, 2**28
"""Most bytes of the trits and levels of several weights that are sent as one, and of the pieces that an owner steps before it sends
what changed. A larger weight is sent alone."""


class GroupRanks(Ranks):
    """The ranks of a process group, which train one model.

    Every matrix has an owner, which alone keeps its accumulators and the running mean of its gradients. A stack of matrices is cut,
    so that each rank owns some of them. Tables have no owner: all ranks keep and step them alike.

    Attributes:
        owned: the rows of each matrix, or stack of matrices, that each rank owns, by tensor id.
    """

    def __init__(self, model: ArbModel, world: World, *, exchange: str = FULL) -> None:
        """Begin with a model that is the same on every rank. From here on a rank holds what votes change of its own matrices alone.

        Args:
            model, world: the model, and the ranks that train it.
            exchange: how the gradients of matrices travel that are made orthogonal, one of `EXCHANGES`.
        """
        self.number, self.count = world.number, world.count
        self._model = model
        self._traffic = Traffic(world, on_gpu=lambda: model.voting.faults.is_cuda)
        self._sums = GradientSums(self._traffic, self.number, self.count)
        self._in_eight_bits = exchange == MXINT8
        self.owned = owned_rows(model, self.count)
        self._num_rows = {each.tensor_id: each.weight.shape[0] for each in model.ternary_modules().values()}
        self._spreads = {
            each.tensor_id: each.spread
            for each in model.ternary_modules().values()
            if each.spread is not None
        }
        self._is_table = {
            each.tensor_id: isinstance(each, TernaryEmbedding) for each in model.ternary_modules().values()
        }
        for module in model.ternary_modules().values():
            kept = self._kept(module.tensor_id)
            if kept is not None:
                module.leave_votes(kept)
        # The host waits before it sends. So it sends as late as it can, when all else of a step is launched.
        self._unsent: Callable[[], None] | None = None
        # The weights of the last step, and their pieces by owner. To slice weights takes as long as a small backward pass. The
        # accumulators of weights that are gone are not held.
        self._pieces: tuple[dict[int, weakref.ref[LaidOutWeight]], list[list[Piece]]]
        self._pieces = {}, [[] for _ in range(self.count)]
        model.voting.ranks = self

    def part(self, loss: Tensor) -> Tensor:
        """See `Ranks`."""
        return loss / self.count

    def total(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        return in_order(self._traffic.gathered(values))

    def everyone(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `Ranks`. Small tensors travel together."""
        some: list[Tensor] = []
        for each in tensors:
            if some and sum(other.nbytes for other in (*some, each)) > TOGETHER_BYTES:
                yield from self._of_everyone(some)
                some = []
            some.append(each)
        if some:
            yield from self._of_everyone(some)

    def _of_everyone(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of all ranks for each of some, which travel as one."""
        # Elements of more bytes come first, so that each tensor begins at a multiple of its elements.
        order = sorted(range(len(tensors)), key=lambda each: -tensors[each].element_size())
        parts = [as_bytes(tensors[each]) for each in order]
        sizes, found = [len(part) for part in parts], list(tensors)
        arrived = self._traffic.gathered(torch.cat(parts))
        if sum(sizes) % WIDEST_BYTES:
            # The bytes of a rank begin behind those of the rank before, where an element may not begin.
            arrived = [of_rank.clone() for of_rank in arrived]
        for each, *of_ranks in zip(order, *(of_rank.split(sizes) for of_rank in arrived), strict=True):
            like = tensors[each]
            found[each] = torch.cat([part.view(like.dtype).view(like.shape) for part in of_ranks])
        return found

    def dealt(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See `Ranks`. The host waits for the parts."""
        return self._traffic.begin_deal(parts)()

    def whole(self, tensor_id: int, counts: Tensor) -> Tensor:
        """See `Ranks`."""
        return self.total(counts) if tensor_id in self._spreads else counts

    def divisor(self, chosen: Tensor) -> Tensor:
        """See `Ranks`."""
        return self.total(chosen.sum()).clamp(min=1) / self.count

    def mean(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        return self.total(values) / self.count

    def steps(self, tensor_id: int) -> bool:
        """Return whether this rank steps a weight, or rows of it. It is given the other rows after the step."""
        kept = self._kept(tensor_id)
        return kept is None or len(kept) > 0

    def answers_for(self, tensor_id: int) -> bool:
        """See `Ranks`."""
        kept = self._kept(tensor_id)
        return tensor_id in self._spreads or (self.number == 0 if kept is None else len(kept) > 0)

    def _kept(self, tensor_id: int) -> range | None:
        """Return the rows of a weight that this rank owns; None for a weight without owners."""
        return self.owned[tensor_id][self.number] if tensor_id in self.owned else None

    def _owner(self, tensor_id: int) -> int | None:
        """Return the rank that owns a weight; None if it has no owner, or several."""
        owners = [rank for rank, rows in enumerate(self.owned.get(tensor_id, ())) if rows]
        return owners[0] if len(owners) == 1 else None

    def _is_cut(self, tensor_id: int) -> bool:
        """Return whether several ranks own a weight."""
        return tensor_id in self.owned and self._owner(tensor_id) is None

    def exchange(self, tensor_id: int, gradient: Gradient, cast: Callable[[Gradient | None], None]) -> None:
        """See `Ranks`."""
        if tensor_id in self._spreads and not self._is_table[tensor_id]:
            # The slots of all ranks have met at the rank of their expert.
            cast(gradient)
            return
        if gradient.chosen:
            self._sums.send(tensor_id)
            if tensor_id in self._spreads:
                self._exchange_spread(tensor_id, gradient, cast)
            else:
                self._exchange_chosen(tensor_id, gradient, cast)
            return
        num_rows, most = len(gradient.grad_NK), self._num_rows[tensor_id]
        # Of each matrix of a stack the gradient has as many rows. A weight without owners is summed by all ranks.
        owned = self.owned.get(tensor_id, (range(most),))
        places = [range(*(each * num_rows // most for each in (rows.start, rows.stop))) for rows in owned]
        kept, own = (each[self.number if len(each) > 1 else 0] for each in (owned, places))
        num_matrices = gradient.num_matrices * len(kept) // most
        rows = None if gradient.rows is None else gradient.rows[own.start : own.stop] - kept.start

        def arrived(sum_NK: Tensor | None) -> None:
            of_all = None
            if sum_NK is not None:
                of_all = replace(gradient, grad_NK=sum_NK, rows=rows, num_matrices=num_matrices)
            cast(of_all)

        voting = self._model.voting
        self._sums.begin(
            tensor_id,
            Sending(gradient.grad_NK, places, arrived),
            compact=self._in_eight_bits and voting.makes_orthogonal(gradient.num_matrices),
        )

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over ranks in the place of each tensor, float32. They travel as one, in pieces if there are many bytes.

        Every rank has the same shapes, in the same order. The host waits for the sums.
        """
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        for piece in flat.split(max(self._traffic.most_pending // flat.element_size(), 1)):
            parts = self._traffic.begin_gather(piece, None)()
            assert parts is not None
            sum_in_order(parts, piece)
        for tensor, total in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def step(self, weights: Mapping[int, LaidOutWeight], apply: Callable[[Sequence[int]], None]) -> None:
        """See `Ranks`."""
        by_all = [tensor_id for tensor_id in weights if tensor_id not in self.owned]
        if by_all:
            apply(by_all)
        pieces = self._pieces_of(weights)
        for places in _runs(pieces):
            self._send_changes()
            own = pieces[self.number][places.start : places.stop]
            if self._go_whole(pieces):
                for piece in own:
                    piece.step(apply)
                self._spread_whole(pieces, places)
            else:
                changed = [piece.changed_by(apply) for piece in own]
                self._unsent = partial(self._spread, pieces, places, changed)

    def _pieces_of(self, weights: Mapping[int, LaidOutWeight]) -> Sequence[Sequence[Piece]]:
        """Return the pieces of each owner. They are made anew only for other weights than those of the step before."""
        before, pieces = self._pieces
        if before.keys() != weights.keys() or any(before[each]() is not weights[each] for each in weights):
            pieces = [[] for _ in range(self.count)]
            for tensor_id, weight in weights.items():
                for of_owner, rows in zip(pieces, self.owned.get(tensor_id, ()), strict=False):
                    if rows:
                        _add_to_pieces(of_owner, tensor_id, weight.part(rows))
            self._pieces = {tensor_id: weakref.ref(weight) for tensor_id, weight in weights.items()}, pieces
        return pieces

    def _go_whole(self, pieces: Sequence[Sequence[Piece]]) -> bool:
        """Return whether pieces are sent as they are, so that the host need not wait. Every rank finds the same.

        Eight bits are for networks on which each byte counts more than the host.
        """
        return (
            not self._in_eight_bits and max(sum(each.size for each in own) for own in pieces) <= WHOLE_BYTES
        )

    def finish(self) -> None:
        """See `Ranks`."""
        self._send_changes()
        self._sums.send()
        self._traffic.end_all()

    def abandon(self) -> None:
        """See `Ranks`."""
        self._unsent = None
        self._sums.forget()
        self._traffic.forget()

    def _send_changes(self) -> None:
        """Begin to send what the last pieces that were stepped have changed, if they were not sent yet."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            unsent()

    def recording(self) -> AbstractContextManager[Recorded]:
        """See `Traffic`."""
        return self._traffic.recording()

    def state(self) -> dict[str, TernaryWeight | Tensor] | None:
        """Return all that training changes, on the CPU of rank 0, as `ArbModel.state` does for one process; None on other ranks."""
        found: dict[str, TernaryWeight | Tensor] = {}
        owners_of_means: dict[object, int] = {}
        for name, module in self._model.ternary_modules().items():
            weight = module.weight
            owner = owners_of_means[module.average] = self._owner(module.tensor_id) or 0
            if self._is_cut(module.tensor_id):
                arrived = self._put_together(module)
            else:
                voted = {part: each for part, each in weight.tensors().items() if part in VOTED_IN}
                arrived = self._brought(voted, owner)
            weight = weight.with_tensors(**{part: each.to(module.device) for part, each in arrived.items()})
            canonical = self._model.ops.to_spec(weight)
            if module.spread is not None:
                parts = {part: self._parts_of(each) for part, each in canonical.tensors().items()}
                if self.number == 0:
                    found[name] = joined(
                        [
                            replace(
                                canonical, shape=tuple(accum.shape), **dict(zip(parts, each, strict=True))
                            )
                            for accum, *each in zip(parts["trit_accum"], *parts.values(), strict=True)
                        ]
                    )
            elif self.number == 0:
                found[name] = canonical.to("cpu")
        for name, keeper in self._model.table_modules().items():
            for table, content in self._brought(keeper.tables(), owners_of_means.get(keeper, 0)).items():
                contents = [content] if keeper.spread is None else self._parts_of(content)
                if self.number == 0:
                    found[f"{name}.{table}"] = torch.cat([each.to("cpu") for each in contents])
        return None if self.number else found

    def measured(self) -> tuple[float, int]:
        """Return seconds that this rank has waited for others and the bytes that it received, since the last call."""
        return self._traffic.measured()

    def seconds(self) -> float:
        """Return seconds of this rank since the last call of `measured`."""
        return self._traffic.seconds()

    def _exchange_chosen(
        self, tensor_id: int, gradient: Gradient, cast: Callable[[Gradient | None], None]
    ) -> None:
        """Exchange the gradients of rows, or of matrices of a stack, that each rank has chosen."""
        owner, num_matrices, most = self._owner(tensor_id), gradient.num_matrices, self._num_rows[tensor_id]
        assert gradient.rows is not None
        # A small table has more slots than rows.
        sent = gradient.grad_NK[:most]
        grads = self._traffic.begin_gather(sent, owner)
        rows = self._traffic.begin_gather(gradient.rows[:most], owner)

        def end() -> None:
            grad_parts, row_parts = grads(), rows()
            if grad_parts is None or row_parts is None:
                cast(None)
                return
            total = merged(list(grad_parts), list(row_parts), num_matrices, most, self._model.ops)
            if self._is_cut(tensor_id):
                cast(of_rows(total, self.owned[tensor_id][self.number]))
                return
            self._cast_once(tensor_id, total, cast)

        self._traffic.later(sent.nbytes, end)

    def _exchange_spread(
        self, tensor_id: int, gradient: Gradient, cast: Callable[[Gradient | None], None]
    ) -> None:
        """Exchange the gradients of rows that each rank has chosen of a table whose rows are spread over ranks."""
        spread, most = self._spreads[tensor_id], self._num_rows[tensor_id]
        assert gradient.rows is not None
        rows, grads = map(self._traffic.begin_deal, spread.dealt(gradient.rows, gradient.grad_NK))

        def end() -> None:
            row_parts, grad_parts = [spread.places(each) for each in rows()], grads()
            if not any(map(len, row_parts)):
                cast(replace(gradient, grad_NK=gradient.grad_NK[:0], rows=row_parts[0]))
                return
            cast(merged(grad_parts, row_parts, 0, most, self._model.ops))

        self._traffic.later(gradient.grad_NK.nbytes, end)

    def _spread(self, pieces: Sequence[Sequence[Piece]], places: range, own: Sequence[Changed]) -> None:
        """Begin to send what the steps of owners have changed of their pieces at some places. A rank has the changes of its own."""
        numbers = torch.zeros(len(places), dtype=torch.int64, device=self._model.voting.faults.device)
        if own:
            numbers[: len(own)] = torch.stack([each.number for each in own])
        # They are known to no other rank, as all else that is exchanged is. The host waits for the device here, and nowhere else.
        everyones = torch.stack(self._traffic.gathered(numbers)).tolist()
        for owner, of_owner in enumerate(pieces):
            if some := of_owner[places.start : places.stop]:
                self._send_some(some, owner, everyones[owner], own)

    def _spread_whole(self, pieces: Sequence[Sequence[Piece]], places: range) -> None:
        """Begin to send the pieces of owners at some places as they are. A rank has its own."""
        for owner, of_owner in enumerate(pieces):
            if some := of_owner[places.start : places.stop]:
                sent = [piece.content() for piece in some] if owner == self.number else []
                self._send(some, owner, sent, [piece.size for piece in some])

    def _send_some(
        self, pieces: Sequence[Piece], owner: int, numbers: Sequence[int], own: Sequence[Changed]
    ) -> None:
        """Begin to send the changes of pieces from their owner to all. The ranks know how many bytes of each changed."""
        sizes = [changes_bytes(piece.size, number) for piece, number in zip(pieces, numbers, strict=False)]
        sent = [each.sent(number) for each, number in zip(own, numbers, strict=False)]
        self._send(pieces, owner, sent, sizes)

    def _send(self, pieces: Sequence[Piece], owner: int, own: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Begin to send what makes pieces what they are on their owner to all, as one. `own` is that of this rank."""
        is_mine = owner == self.number
        if is_mine:
            sent = torch.cat(list(own))
        else:
            sent = torch.empty(sum(sizes), dtype=torch.uint8, device=pieces[0].device)
        wait = self._traffic.begin_broadcast(sent, owner)

        def end() -> None:
            wait()
            if not is_mine:
                for piece, part in zip(pieces, sent.split(list(sizes)), strict=True):
                    piece.change(part)

        self._traffic.later(sent.numel(), end)

    def _brought(self, tensors: Mapping[str, Tensor], owner: int) -> dict[str, Tensor]:
        """Return the tensors of an owner, which sends them to rank 0. Ranks other than 0 get the tensors that they have."""
        if not owner:
            return dict(tensors)
        arrived = {name: self._traffic.at_first(each, owner, len(each)) for name, each in tensors.items()}
        return {name: tensors[name] if each is None else each for name, each in arrived.items()}

    def _put_together(self, module: TernaryModule) -> dict[str, Tensor]:
        """Return what votes change of a weight that several ranks own: whole on rank 0, and as this rank has it on other ranks."""
        own = {name: each for name, each in module.own_rows().tensors().items() if name in VOTED_IN}
        found = {name: each for name, each in module.weight.tensors().items() if name in VOTED_IN}
        if self.number == 0:
            found = {
                name: torch.empty_like(each, memory_format=torch.contiguous_format)
                for name, each in found.items()
            }
        for rank, rows in enumerate(self.owned[module.tensor_id]):
            for name, each in own.items() if rows else ():
                arrived = self._traffic.at_first(each, rank, len(rows)) if rank else each
                if self.number == 0 and arrived is not None:
                    found[name][rows.start : rows.stop] = arrived
        return found

    def _parts_of(self, own: Tensor) -> list[Tensor]:
        """Return the tensors that all ranks have, of one shape but for the first dimension, on the CPU of rank 0; [] on others."""
        sizes = [int(each) for each in self._traffic.gathered(torch.tensor(len(own)))]
        arrived = [self._traffic.at_first(own, rank, sizes[rank]) for rank in range(1, self.count)]
        return [] if self.number else [own.cpu(), *(each for each in arrived if each is not None)]

    def _cast_once(self, tensor_id: int, total: Gradient, cast: Callable[[Gradient | None], None]) -> None:
        """Cast a gradient that all ranks have, and count its faults on one of them."""
        faults = self._model.voting.faults
        before = faults.clone()
        cast(total)
        if not self.answers_for(tensor_id):
            faults.copy_(before)


def of_rows(gradient: Gradient, rows: range) -> Gradient:
    """Return a gradient of chosen rows, or of chosen matrices, for a part of a weight, which has some rows.

    The part has no more slots than there can be rows of it. Slots of other rows become unused ones, at the end.
    """
    assert gradient.rows is not None
    height = len(gradient.rows) // gradient.num_matrices if gradient.num_matrices else 1
    most = len(rows) // height * height
    is_own = (gradient.rows >= rows.start) & (gradient.rows < rows.stop)
    order = is_own.logical_not().argsort(stable=True)[:most]
    is_own = is_own[order]
    # What is not finite in a row of another rank is no fault of this part.
    grad_NK = torch.where(is_own[:, None], gradient.grad_NK[order], 0.0)
    return replace(
        gradient,
        grad_NK=grad_NK,
        rows=torch.where(is_own, gradient.rows[order] - rows.start, -1),
        num_matrices=len(order) // height if gradient.num_matrices else 0,
    )


def _add_to_pieces(pieces: list[Piece], tensor_id: int, weight: LaidOutWeight) -> None:
    """Let a weight, or some rows of one, be sent with the pieces of its owner."""
    read = [each for name, each in weight.tensors().items() if name not in VOTED_IN and each.numel()]
    # A copy would arrive in place of the tensor.
    assert all(each.is_contiguous() for each in read)
    if not pieces or pieces[-1].size + sum(each.nbytes for each in read) > PIECE_BYTES:
        pieces.append(Piece())
    pieces[-1].add(tensor_id, [as_bytes(each) for each in read])


def _runs(pieces: Sequence[Sequence[Piece]]) -> Iterator[range]:
    """Yield runs of places whose pieces of each owner have at most RUN_BYTES, or of a single place. Every rank has the same."""
    begin, size = 0, 0
    most = max(map(len, pieces))
    for place in range(most):
        largest = max(of_owner[place].size for of_owner in pieces if place < len(of_owner))
        if place > begin and size + largest > RUN_BYTES:
            yield range(begin, place)
            begin, size = place, 0
        size += largest
    if most:
        yield range(begin, most)


def merged(grads: list[Tensor], rows: list[Tensor], num_matrices: int, most: int, ops: Any) -> Gradient:
    """Return the gradients of rows that ranks have chosen as one gradient, in which each row, or matrix of a stack, stands once.

    Args:
        grads: float [S, K] of each rank.
        rows: int64 [S] of each rank, -1 for an unused slot, whose gradient is 0.
        num_matrices: matrices stacked in the gradient of a rank; 0: rows are merged one by one.
        most: rows of the weight.
        ops: the op set that sums.

    Returns:
        A gradient with a slot for each slot of all ranks, or for each row of the weight if these are fewer.
    """
    height = grads[0].shape[0] // num_matrices if num_matrices else 1
    grad, row = torch.cat(grads), torch.cat(rows)
    # A matrix is merged like a row that is as long as all of its rows.
    firsts = row.reshape(-1, height)[:, 0]
    stand_in = firsts.amax().clamp(min=0)
    names, sums = ops.embedding_row_grads(
        torch.where(firsts < 0, stand_in, firsts), grad.reshape(len(firsts), -1)
    )
    names, sums = names[: most // height], sums[: most // height]
    names = torch.where((firsts >= 0).any(), names, -1)
    ahead = torch.arange(height, device=row.device)
    all_rows = torch.where(names[:, None] < 0, -1, names[:, None] + ahead).flatten()
    return Gradient(sums.reshape(len(all_rows), -1), all_rows, len(names) if num_matrices else 0, chosen=True)
