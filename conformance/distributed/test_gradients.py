"""Gradients that travel together, and pieces that go whole: what arrives where, in what order, and in how many exchanges.

Legend: N rows of a gradient, K columns, P elements, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from arbitor.optimized.distributed import gradients
from arbitor.optimized.distributed import ranks as ranks_module
from arbitor.optimized.distributed.gradients import GradientSums, Sending
from arbitor.optimized.distributed.ranks import FULL, MXINT8, GroupRanks
from arbitor.optimized.distributed.traffic import Traffic
from arbitor.optimized.distributed.world import World
from arbitor.reference.graph.mxint8 import decoded, encoded
from arbitor.reference.graph.ranks import Gradient
from conformance.compare import exact
from conformance.distributed.threads import Table, on_threads
from conformance.graph import models

WHOLE, NONE = range(4), range(0)
PLACES = {
    "first": (WHOLE, NONE),
    "second": (NONE, WHOLE),
    "all": (WHOLE,),
    "cut": (range(1), range(1, 4)),
}
"""Rows of a gradient of four that each of two ranks is sent."""


class TableTraffic(Traffic):
    """Traffic of a rank that is a thread. It counts its exchanges."""

    def __init__(self, number: int, table: Table) -> None:
        super().__init__(World(number, table.count), on_gpu=lambda: False)
        self._number, self._table = number, table
        self.exchanges = 0

    def begin_gather(self, tensor: Tensor, owner: int | None) -> Callable[[], Tensor | None]:
        assert owner is None
        self.exchanges += 1
        found = torch.stack(self._table.meet(self._number, tensor))
        return lambda: found

    def begin_parts(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Callable[[], Tensor]:
        self.exchanges += 1
        found = [each[self._number] for each in self._table.meet(self._number, parts)]
        assert [len(each) for each in found] == list(lengths)
        return lambda: torch.cat(found)


class Rank:
    """A rank that sends gradients, and notes what arrived."""

    def __init__(self, number: int, table: Table) -> None:
        self.traffic = TableTraffic(number, table)
        self.sums = GradientSums(self.traffic, number, table.count)
        self.arrived: list[tuple[str, Tensor | None]] = []

    def begin(
        self,
        tensor_id: int,
        grad_NK: Tensor,
        to: str,
        *,
        name: str = "",
        compact: bool = False,
    ) -> None:
        note = partial(self._note, name or f"{tensor_id} {to}")
        rows = [
            range(*(each * len(grad_NK) // len(WHOLE) for each in (rows.start, rows.stop)))
            for rows in PLACES[to]
        ]
        self.sums.begin(tensor_id, Sending(grad_NK, rows, note), compact=compact)

    def _note(self, name: str, sum_NK: Tensor | None) -> None:
        self.arrived.append((name, sum_NK))

    def finish(self) -> None:
        self.sums.send()
        self.traffic.end_all()


def gradient(number: int, place: int, columns: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a gradient of a rank that no other has, of which some elements are not finite."""
    generator = torch.Generator().manual_seed(100 * number + place)
    grad_NK = torch.randn(len(WHOLE), columns, generator=generator)
    grad_NK[place % 4, place % columns] = torch.inf
    return grad_NK.to(dtype)


def own_rows(to: str, number: int) -> range:
    """Return the rows that a rank is sent."""
    return PLACES[to][0 if to == "all" else number]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("small", [True, False])
def test_each_rank_is_given_the_sums_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, small: bool, compact: bool, dtype: torch.dtype
) -> None:
    """The same bits alone and with others, whatever travels beside them, and how many columns a row has."""
    if not small:
        monkeypatch.setattr(gradients, "SMALL_BYTES", 0)
    columns = (32, 7, 64, 3)
    sent = [(place, to) for place in range(4) for to in PLACES]

    def work(number: int, table: Table) -> Rank:
        rank = Rank(number, table)
        for at, (place, to) in enumerate(sent):
            grad_NK = gradient(number, at, columns[place], dtype)
            rank.begin(at, grad_NK, to, name=str(at), compact=compact)
        rank.finish()
        return rank

    for number, rank in enumerate(on_threads(2, work)):
        found = dict(rank.arrived)
        assert len(rank.arrived) == len(sent)
        for at, (place, to) in enumerate(sent):
            grads = [gradient(each, at, columns[place], dtype) for each in range(2)]
            if compact:
                grads = [decoded(encoded(each), *each.shape) for each in grads]
            rows, sum_NK = own_rows(to, number), found[str(at)]
            if not rows:
                assert sum_NK is None
                continue
            assert sum_NK is not None and sum_NK.is_contiguous() and sum_NK.data_ptr() % 16 == 0
            want = (grads[0].float() + grads[1].float()).to(dtype)[rows.start : rows.stop]
            assert sum_NK.isnan().equal(want.isnan())
            exact(sum_NK.nan_to_num(nan=0.5), want.nan_to_num(nan=0.5))


def test_small_gradients_travel_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those to all ranks apart from those to owners, those of a dtype apart, and large ones alone."""
    monkeypatch.setattr(gradients, "SMALL_BYTES", 4 * 32 * 4)

    def exchanges(sends: Callable[[Rank, int], None], number: int, table: Table) -> int:
        rank = Rank(number, table)
        sends(rank, number)
        rank.finish()
        return rank.traffic.exchanges

    def owned(rank: Rank, number: int) -> None:
        for place, to in enumerate(("first", "second", "cut", "first")):
            rank.begin(place, gradient(number, place), to)

    def of_both_kinds(rank: Rank, number: int) -> None:
        owned(rank, number)
        rank.begin(8, gradient(number, 8), "all")
        rank.begin(9, gradient(number, 9, dtype=torch.bfloat16), "first")

    def with_a_large_one(rank: Rank, number: int) -> None:
        owned(rank, number)
        rank.begin(8, gradient(number, 8, columns=33), "first")

    for sends, want in ((owned, 1), (of_both_kinds, 3), (with_a_large_one, 2)):
        assert on_threads(2, partial(exchanges, sends)) == [want, want]


def test_enough_gradients_travel_before_the_pass_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "TOGETHER_BYTES", 3 * gradient(0, 0).nbytes)

    def work(number: int, table: Table) -> list[int]:
        rank, seen = Rank(number, table), []
        for place in range(7):
            rank.begin(place, gradient(number, place), "first")
            seen.append(rank.traffic.exchanges)
        rank.finish()
        return [*seen, rank.traffic.exchanges]

    assert on_threads(2, work) == [[0, 0, 1, 1, 1, 2, 2, 3]] * 2


def test_sums_of_one_weight_arrive_in_their_order() -> None:
    """Though a later one travels in another way, by itself, or is of an odd size: counts of votes saturate."""

    def work(number: int, table: Table) -> list[str]:
        rank = Rank(number, table)
        rank.begin(0, gradient(number, 0, columns=3), "first", name="odd")
        rank.begin(1, gradient(number, 1), "first", name="another weight")
        rank.begin(0, gradient(number, 2, columns=8)[:2], "first", name="even")
        rank.begin(0, gradient(number, 3, dtype=torch.bfloat16), "first", name="another dtype")
        rank.begin(0, gradient(number, 4, columns=2**18 + 1), "first", name="large")
        rank.begin(0, gradient(number, 5, columns=3), "first", name="odd at last")
        rank.finish()
        return [name for name, _ in rank.arrived if name != "another weight"]

    want = ["odd", "even", "another dtype", "large", "odd at last"]
    assert on_threads(2, work) == [want] * 2


def test_what_waits_for_rows_of_its_weight_can_be_sent() -> None:
    """Rows that a batch chose travel in a way of their own, and their votes follow those that came before."""

    def work(number: int, table: Table) -> list[int]:
        rank, seen = Rank(number, table), []
        rank.begin(0, gradient(number, 0), "first")
        for tensor_id in (1, 0, 0):
            rank.sums.send(tensor_id)
            seen.append(rank.traffic.exchanges)
        return seen

    assert on_threads(2, work) == [[0, 1, 1]] * 2


def test_gradients_of_a_pass_that_raised_are_forgotten() -> None:
    def work(number: int, table: Table) -> list[str]:
        rank = Rank(number, table)
        rank.begin(0, gradient(number, 0), "first", name="of a pass that raised")
        rank.sums.forget()
        rank.begin(0, gradient(number, 1, dtype=torch.bfloat16), "first", name="of the next pass")
        rank.finish()
        return [name for name, _ in rank.arrived]

    assert on_threads(2, work) == [["of the next pass"]] * 2


def group_ranks(number: int, table: Table) -> GroupRanks:
    """Return what a rank of a model has, whose exchanges meet at a table."""
    ranks = GroupRanks(models.nano(), World(number, table.count))
    ranks._traffic = TableTraffic(number, table)
    ranks._sums = GradientSums(ranks._traffic, number, table.count)
    return ranks


def test_rows_that_a_batch_chose_are_cast_after_what_waits_of_their_table() -> None:
    """And the gradients of a pass that is abandoned are not cast at all."""

    def work(number: int, table: Table) -> tuple[list[str], list[str]]:
        ranks, cast = group_ranks(number, table), []
        weight = ranks._model.embedding.table
        whole = Gradient(torch.ones(weight.weight.shape))
        chosen = Gradient(torch.ones(2, weight.weight.shape[1]), torch.tensor([1, 2]), chosen=True)

        def exchange() -> None:
            for name, each in (("whole", whole), ("chosen", chosen), ("whole again", whole)):
                ranks.exchange(weight.tensor_id, each, lambda _, name=name: cast.append(name))

        exchange()
        ranks.finish()
        of_pass = list(cast)
        exchange()
        ranks.abandon()
        ranks.finish()
        return of_pass, cast[len(of_pass) :]

    assert on_threads(2, work) == [(["whole", "chosen", "whole again"], [])] * 2


def test_a_first_step_after_which_nothing_has_voted() -> None:
    """As that of a run whose first losses are all refused."""

    def work(number: int, table: Table) -> bool:
        ranks = group_ranks(number, table)
        ranks._model.step()
        return ranks._model.voting.torn

    assert on_threads(2, work) == [False] * 2


def test_pieces_are_made_anew_for_other_weights() -> None:
    """A weight that was moved lies in other memory, and one that is frozen is in no piece."""
    ranks = GroupRanks(models.nano(), World(0, 2))
    weights = {each.tensor_id: each.weight for each in ranks._model.ternary_modules().values()}
    pieces = ranks._pieces_of(weights)
    assert ranks._pieces_of(dict(weights)) is pieces
    owned = max(ranks.owned)
    fewer = {tensor_id: weight for tensor_id, weight in weights.items() if tensor_id != owned}
    sizes = [
        sum(piece.size for of_owner in each for piece in of_owner)
        for each in (pieces, ranks._pieces_of(fewer))
    ]
    assert sizes[0] > sizes[1] > 0
    moved = {**weights, owned: weights[owned].clone()}
    for tensor_id, changed in ((owned, moved[owned]), (min(ranks.owned), weights[min(ranks.owned)])):
        at = changed.tensors()["exponents"].data_ptr()
        of_owners = ranks._pieces_of(moved)
        assert at in {
            each.data_ptr() for of_owner in of_owners for piece in of_owner for each in piece._tensors
        }, tensor_id


def test_all_ranks_find_alike_whether_pieces_go_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the owner that has most. A rank that went by its own pieces would wait for a number that nobody sends."""
    model = models.nano()
    weights = {each.tensor_id: each.weight for each in model.ternary_modules().values()}
    found = []
    for exchange, more in ((FULL, -1), (FULL, 0), (MXINT8, 0)):
        for number in range(2):
            ranks = GroupRanks(models.nano(), World(number, 2), exchange=exchange)
            pieces = ranks._pieces_of(weights)
            sizes = sorted(sum(piece.size for piece in of_owner) for of_owner in pieces)
            assert sizes[0] < sizes[1]
            monkeypatch.setattr(ranks_module, "WHOLE_BYTES", sizes[1] + more)
            found.append(ranks._go_whole(pieces))
    assert found == [False, False, True, True, False, False]
