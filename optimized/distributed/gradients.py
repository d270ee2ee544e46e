"""Gradients on their way to the ranks that step their weights. These ranks add them.

An exchange takes the same time however few bytes it carries, and a small model has many small matrices. So small gradients wait for
each other, and travel as one. Large gradients travel in parts. No sum depends on what travels together.
Legend: N rows of a gradient, K columns, P elements that a rank is sent, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.optimized.distributed.sums import in_eight_bits, sum_eight_bits, sum_in_order
from arbitor.optimized.distributed.traffic import Traffic
from arbitor.reference.graph.mxint8 import BLOCK, encoded_bytes

SMALL_BYTES = 2**22
"""Most bytes of a gradient that waits for others. Between GPUs of one host so many bytes take no longer than some exchanges take to
begin."""

TOGETHER_BYTES = 2**23
"""Gradients that wait are sent once they have so many bytes. They then travel beside the backward pass."""

ALIGNED = 8
"""A sum begins at a multiple of so many elements, which is at least 16 bytes. Kernels ask for that."""


@dataclass(frozen=True)
class Kind:
    """What gradients have in common that travel together.

    Fields:
        to_all:  whether all ranks are sent all of a gradient.
        compact: whether it travels in eight bits.
        dtype:   of the gradient, and of its sum.
    """

    to_all: bool
    compact: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Sending:
    """A gradient that is to be summed over ranks.

    Fields:
        grad_NK: the gradient of this rank.
        places:  the rows that each rank is sent, by its number; or a single range, which all are sent.
        arrived: is given the sum of the rows of this rank; None if it is sent none.
    """

    grad_NK: Tensor
    places: Sequence[range]
    arrived: Callable[[Tensor | None], None]


class GradientSums:
    """Sums of gradients over ranks, in the order of their numbers. Every rank begins the same ones in the same order."""

    def __init__(self, traffic: Traffic, number: int, count: int) -> None:
        """Begin without gradients.

        Args:
            traffic, number, count: what carries them, the number of this rank, and how many there are.
        """
        self._traffic, self._number, self._count = traffic, number, count
        self._waiting: dict[Kind, list[Sending]] = {}
        # The one kind of all gradients of a weight that wait. So these arrive in the order in which they came.
        self._kinds: dict[int, Kind] = {}

    def begin(self, tensor_id: int, sending: Sending, *, compact: bool) -> None:
        """Begin to send the gradient of a weight, or let it wait for others.

        Args:
            tensor_id, sending: the weight, and its gradient, float32 or bfloat16. The sum is rounded to the same dtype.
            compact: whether the gradient travels in eight bits.
        """
        grad_NK = sending.grad_NK
        kind = Kind(len(sending.places) == 1, compact, grad_NK.dtype)
        # Blocks of eight bits would reach from one row to the next.
        may_wait = grad_NK.nbytes <= SMALL_BYTES and not (compact and grad_NK.shape[1] % BLOCK)
        if self._kinds.get(tensor_id, kind) != kind or not may_wait:
            self.send(tensor_id)
        if not may_wait:
            self._begin_alone(sending, kind)
            return
        self._kinds[tensor_id] = kind
        together = self._waiting.setdefault(kind, [])
        together.append(sending)
        if sum(each.grad_NK.nbytes for each in together) >= TOGETHER_BYTES:
            self._begin_together(kind)

    def send(self, tensor_id: int | None = None) -> None:
        """Begin to send what waits, or what waits with gradients of one weight."""
        kinds = list(self._waiting) if tensor_id is None else [self._kinds.get(tensor_id)]
        for kind in kinds:
            if kind is not None:
                self._begin_together(kind)

    def forget(self) -> None:
        """Forget the gradients that wait."""
        self._waiting.clear()
        self._kinds.clear()

    def _begin(self, sent: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Begin to send a tensor to each rank, or one to all; return what waits for what this rank is sent, stacked by rank."""
        own = sent[0] if len(sent) == 1 else sent[self._number]
        if len(sent) > 1:
            wait = self._traffic.begin_parts(sent, lengths=[len(own)] * self._count)
            return lambda: wait().view(self._count, *own.shape)
        wait_for_all = self._traffic.begin_gather(own, None)

        def arrived() -> Tensor:
            stacked = wait_for_all()
            assert stacked is not None
            return stacked

        return arrived

    def _begin_alone(self, sending: Sending, kind: Kind) -> None:
        """Send a gradient some rows at a time, so that the memory of who adds does not grow with the number of ranks."""
        grad_NK = sending.grad_NK
        num_rows, num_columns = grad_NK.shape
        own = sending.places[0 if kind.to_all else self._number]
        row_bytes = encoded_bytes(1, num_columns) if kind.compact else num_columns * grad_NK.element_size()
        num_steps = -(-num_rows * row_bytes // max(self._traffic.most_pending // 4, 1))
        num_steps = max(min(num_steps, num_rows), 1)
        total_NK = torch.empty((len(own), num_columns), dtype=kind.dtype, device=grad_NK.device)

        def begin(step: int) -> None:
            parts = [_part_of(each, step, num_steps) for each in sending.places]
            rows = _part_of(own, step, num_steps)
            sent = [_sent(grad_NK[part.start : part.stop], kind.compact) for part in parts]
            wait = self._begin(sent)

            def end() -> None:
                _add(wait(), total_NK[rows.start - own.start : rows.stop - own.start], kind.compact)
                if step == num_steps - 1:
                    sending.arrived(total_NK if len(own) else None)

            self._traffic.later(sum(each.nbytes for each in sent), end)

        for step in range(num_steps):
            begin(step)

    def _begin_together(self, kind: Kind) -> None:
        """Send the gradients of a kind that wait as one."""
        together = self._waiting.pop(kind, [])
        self._kinds = {tensor_id: each for tensor_id, each in self._kinds.items() if each != kind}
        if not together:
            return
        # Behind a gradient of an odd size no sum would be aligned.
        order = sorted(range(len(together)), key=lambda place: _is_odd(together[place]))
        parts = [
            [each.grad_NK[rows.start : rows.stop].flatten() for rows in each.places]
            for each in (together[place] for place in order)
        ]
        sent = [
            _sent(torch.cat(to_rank)[None], kind.compact).flatten() for to_rank in zip(*parts, strict=True)
        ]
        sizes = [len(each[0 if kind.to_all else self._number]) for each in parts]
        total_P = torch.empty(sum(sizes), dtype=kind.dtype, device=sent[0].device)
        wait = self._begin(sent)

        def end() -> None:
            _add(wait(), total_P[None], kind.compact)
            sums = dict(zip(order, total_P.split(sizes), strict=True))
            for place, each in enumerate(together):
                sum_P = sums[place]
                is_aligned = sum_P.storage_offset() % ALIGNED == 0
                sum_NK = (sum_P if is_aligned else sum_P.clone()).view(-1, each.grad_NK.shape[1])
                each.arrived(sum_NK if len(sum_P) else None)

        self._traffic.later(sum(each.nbytes for each in sent), end)


def _is_odd(sending: Sending) -> bool:
    """Return whether what a rank is sent is no multiple of ALIGNED elements. All ranks find the same."""
    return any(len(rows) * sending.grad_NK.shape[1] % ALIGNED for rows in sending.places)


def _sent(part_NK: Tensor, compact: bool) -> Tensor:
    """Return what is sent for some rows of a gradient, which may be none."""
    if not compact:
        return part_NK
    return in_eight_bits(part_NK) if part_NK.numel() else part_NK.new_empty(0, dtype=torch.uint8)


def _add(parts: Tensor, total_NK: Tensor, compact: bool) -> None:
    """Add what all ranks have sent, stacked, into a sum of some rows, which may be none."""
    if total_NK.numel():
        add = sum_eight_bits if compact else sum_in_order
        add(parts, total_NK)


def _part_of(rows: range, step: int, num_steps: int) -> range:
    """Return one of several equal parts of a range, as far as these can be equal."""
    return range(*(rows.start + each * len(rows) // num_steps for each in (step, step + 1)))
