"""A step alone writes integer tables, from what accepted backward passes had seen."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from arbitor.reference.graph import ArbModel, tables
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.graph.tables import TableModule, when_voting
from arbitor.reference.types import TernaryWeight
from conformance.compare import exact
from conformance.graph import models


class Counter(TableModule):
    """Counts what it saw."""

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        self.add_table("count", torch.zeros(4, dtype=torch.int16), 0, 99)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return when_voting(x, self, ids)

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        for (ids,) in passes:
            self.tables()["count"].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int16))


def parts() -> tuple[Counter, Tensor]:
    """Return a counter, and an input that requires a gradient."""
    return Counter(models.nano().context), torch.ones(2, requires_grad=True)


def test_a_table_counts_what_accepted_passes_saw() -> None:
    counter, x = parts()
    ids = torch.tensor([1, 3])
    for _ in range(2):
        with counter.voting.taking(rate=1.0, step=0):
            counter(x, ids).sum().backward()
    assert counter.tables()["count"].tolist() == [0, 0, 0, 0]
    counter.step_tables()
    assert counter.tables()["count"].tolist() == [0, 2, 0, 2]
    counter.step_tables()
    assert counter.tables()["count"].tolist() == [0, 2, 0, 2]
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]


def test_what_passes_saw_of_all_tables_is_exchanged_at_once() -> None:
    """A frozen table has no part in it, and no table means no exchange."""
    exchanged: list[list[list[int]]] = []

    class Twice(Ranks):
        """Two ranks that see the same."""

        def everyone(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
            exchanged.append([each.tolist() for each in tensors])
            return iter([torch.cat([each, each]) for each in tensors])

    context, x = models.nano().context, torch.ones(2, requires_grad=True)
    counters, voting = [Counter(context) for _ in range(3)], context.voting
    voting.ranks = Twice()
    for ids in (torch.tensor([1, 3]), torch.tensor([2, 2])):
        with voting.taking(rate=1.0, step=0):
            y = counters[1](counters[0](x, ids), torch.tensor([0, 0]))
            counters[2](y, ids).sum().backward()
    counters[2].frozen = True
    version = voting.version
    tables.count_recorded(counters)
    assert [sorted(each) for each in exchanged] == [[[0, 0], [0, 0], [1, 3], [2, 2]]]
    counts = [counter.tables()["count"].tolist() for counter in counters]
    assert counts == [[0, 2, 4, 2], [8, 0, 0, 0], [0, 0, 0, 0]] and voting.version == version + 2
    assert not any(counter.recorded for counter in counters)
    tables.count_recorded([])
    assert len(exchanged) == 1


def test_what_a_pass_saw_is_forgotten_with_the_table() -> None:
    """A table that is loaded counts nothing of the passes before."""
    counter, x = parts()
    with counter.voting.taking(rate=1.0, step=0):
        counter(x, torch.tensor([2])).sum().backward()
    counter.load_state_dict(counter.state_dict())
    counter.step_tables()
    assert not counter.tables()["count"].any()


def test_a_pass_that_does_not_vote_leaves_no_trace() -> None:
    counter, x = parts()
    # This pass has no backward pass.
    counter(x, torch.tensor([0]))
    # This backward pass does not vote.
    counter(x, torch.tensor([0])).sum().backward()
    with torch.no_grad():
        counter(x, torch.tensor([0]))
    counter.step_tables()
    assert not counter.tables()["count"].any()


def test_tables_are_state() -> None:
    """They are listed by name, saved with the weights, and loaded all or not at all."""
    model = models.nano(max_moe_iters=2)
    name = "layers.1.moe_graph.leak_shifts"
    state = {key: value.clone() for key, value in model.state().items()}
    assert name in state and name in model.tables() and name not in model.weights()
    changed = {**state, name: state[name].flip(0)}
    model.load_state(changed)
    assert torch.equal(model.tables()[name], changed[name])
    for wrong, says in (
        ({key: value for key, value in state.items() if key != name}, "has no 'layers.1"),
        ({**state, "more": torch.zeros(1)}, "no weight or table of that name"),
        ({**state, name: state[name][:-1]}, "leak_shifts"),
    ):
        with pytest.raises(ValueError, match=says):
            model.load_state(wrong)
        assert torch.equal(model.tables()[name], changed[name])


@functools.cache
def trained_state() -> dict[str, TernaryWeight | Tensor]:
    """The state of a model of every module after two steps. Not to be written to."""
    return models.whole().state()


@pytest.mark.parametrize(
    ("name", "low", "high", "wrong"),
    [
        ("shared_vq.bridge.tables.text.usage", 0, 32767, [-1, -5]),
        ("shared_vq.bridge.tables.image.usage", 0, 32767, [-1]),
        ("composite.codebook.usage", 0, 32767, [-1]),
        ("graph.edges.neighbours", -1, 69, [-2, 70, 10**9]),
        ("graph.edges.scores", 0, 127, [-1]),
        ("composite.edges.neighbours", -1, 29, [-2, 30]),
        ("composite.edges.scores", 0, 127, [-128]),
        ("memory.structure.strengths", 0, 127, [-1]),
        ("memory.conversation.strengths", 0, 127, [-1]),
        ("layers.0.moe_graph.moe.load", 0, 2**63 - 1, [-1]),
        ("layers.0.moe_graph.moe.handicap", 0, 32767, [-1]),
        ("layers.1.moe_graph.leak_shifts", 1, 4, [0, 5]),
    ],
)
def test_a_table_out_of_range_is_refused_and_nothing_is_loaded(
    name: str, low: int, high: int, wrong: list[int]
) -> None:
    """What a step writes is accepted, and so are both ends of the range. A value beyond either end is refused."""
    model = ArbModel(models.WHOLE, seed=9)
    before = tuple(value.clone() for value in model.state().values())

    def forged(value: int) -> dict[str, TernaryWeight | Tensor]:
        table = trained_state()[name].clone()
        assert isinstance(table, Tensor)
        table.view(-1)[-1] = value
        return {**trained_state(), name: table}

    for value in wrong:
        says = f"{name} holds {value}, but its elements must lie from {low} to {high}"
        with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
            model.load_state(forged(value))
        exact(tuple(model.state().values()), before)
    for value in (low, high):
        model.load_state(forged(value))
        assert model.tables()[name].view(-1)[-1] == value
    assert model.table_ranges()[name] == (low, high)


def test_every_table_has_a_range() -> None:
    """The cases above leave out the tables that are made like one of them, and no other."""
    model = ArbModel(models.WHOLE, seed=9)
    assert model.table_ranges().keys() == model.tables().keys()
    model.load_state(trained_state())
    assert list(model.state()) == list(trained_state())
    exact(tuple(model.state().values()), tuple(trained_state().values()))


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_components_of_a_loss_drive_the_votes_unless_one_is_not_finite(fault: float) -> None:
    model, ids_BT = models.nano(), models.random_ids(2, 9)
    before = models.state_of(model)
    losses = {**model.losses(ids_BT), "more": torch.tensor(fault)}
    assert not model.backward(losses, rate=models.RATE, step=0)
    assert not models.changed_tensors(before, model)
    assert model.backward(model.losses(ids_BT), rate=models.RATE, step=0)
    signal = models.nano()
    assert signal.backward(signal.loss(ids_BT), rate=models.RATE, step=0)
    assert models.changed_tensors(before, model)
    assert not models.changed_tensors(models.state_of(signal), model)


@pytest.mark.parametrize("loss", [{}, {"bytes": torch.ones(2)}, torch.ones(2)])
def test_a_loss_that_is_no_scalar_is_refused(loss: object) -> None:
    with pytest.raises(ValueError, match="loss"):
        models.nano().backward(loss, rate=1.0, step=0)
