"""The loop of the last layer: shares of turns, and what each turn computes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbitor.reference.config import HALT_THRESHOLD
from arbitor.reference.graph.moe_graph import LEAK_SHIFTS, halting_shares
from arbitor.reference.ops.packing import trits_of
from conformance.graph import models


def shares_by_hand(logits: list[float]) -> list[float]:
    """Return the shares of one position's turns, told as a story."""
    shares, left = [], 1.0
    for logit in logits:
        p = 1 / (1 + torch.tensor(-logit, dtype=torch.float64).exp().item())
        if 1 - left + p >= HALT_THRESHOLD:
            break
        shares.append(p)
        left -= p
    shares.append(left)
    return shares + [0.0] * (len(logits) + 1 - len(shares))


@given(st.lists(st.floats(-8, 8).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=7))
def test_halting_shares_by_hand(logits: list[float]) -> None:
    got = halting_shares(torch.tensor(logits, dtype=torch.float64))
    assert got.tolist() == pytest.approx(shares_by_hand(logits), abs=1e-12)
    assert got.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (got >= 0).all()


def test_a_sure_position_takes_one_turn_and_an_unsure_one_all_of_them() -> None:
    shares = halting_shares(torch.tensor([[9.0, -9.0], [0.0, -9.0], [0.0, -9.0]]))
    assert shares[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert shares[3, 1] > 0.99


def test_one_turn_is_the_plain_layer() -> None:
    """The loop of one turn computes what a layer without a loop does, from the same weights."""
    model, ids_BT = models.nano(), models.random_ids(2, 9)
    looped = models.nano(max_moe_iters=2)
    looped.load_state({**looped.state(), **model.weights()})
    halt = looped.layers[-1].moe_graph.halt
    always = halt.weight.tensors()
    with torch.no_grad():
        assert not torch.equal(looped(ids_BT), model(ids_BT))
        halt.forward = lambda x: torch.full((*x.shape[:-1], 1), 30.0)
        assert torch.equal(looped(ids_BT), model(ids_BT))
    assert always is not None


def test_positions_start_undecided_and_learn_when_to_halt() -> None:
    """The halting weight starts at zero, where every p is a half, and votes move it."""
    model = models.nano(max_moe_iters=2, theta=1)
    halt, seen = model.layers[-1].moe_graph.halt, []
    assert (
        not trits_of(halt.weight).any() and halt.weight.exponents.eq(-8).all()
    )  # in quarters, the scale of 24 inputs
    ask = halt.forward
    halt.forward = lambda x: seen.append(ask(x)) or seen[-1]
    for step in range(3):
        model.backward(model.losses(models.random_ids(2, 12)), rate=models.RATE, step=step)
        model.step()
    assert not seen[0].any() and seen[-1].any()


def test_the_leak_is_an_integer_of_each_channel() -> None:
    table = models.nano(max_moe_iters=2).tables()["layers.1.moe_graph.leak_shifts"]
    assert table.dtype == torch.int8
    assert set(table.tolist()) == set(LEAK_SHIFTS)


def test_more_turns_read_the_state_of_the_turn_before() -> None:
    """A position that never halts ends with its last turn, which differs from the first."""
    outputs: list[Any] = []
    for turns in (2, 3):
        model = models.nano(max_moe_iters=turns)
        model.layers[-1].moe_graph.halt.forward = lambda x: torch.full((*x.shape[:-1], 1), -30.0)
        with torch.no_grad():
            outputs.append(model(models.random_ids(1, 9)))
    assert not torch.equal(*outputs)
