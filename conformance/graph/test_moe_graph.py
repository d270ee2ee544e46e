"""The loop of the last layer weighs its turns by their shares, and each turn computes from the turn before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.config import HALT_THRESHOLD
from arbitor.reference.graph.moe_graph import LEAK_SHIFTS
from arbitor.reference.ops.denoise import Halting
from arbitor.reference.ops.packing import trits_of
from conformance.compare import alike, exact
from conformance.graph import models


def shares_by_hand(p: list[float], threshold: float) -> list[float]:
    """Return the shares of one sample's steps, computed one by one from p of all steps but the last."""
    shares, left = [], 1.0
    for each in p:
        if 1 - left + each >= threshold:
            break
        shares.append(each)
        left -= each
    shares.append(left)
    return shares + [0.0] * (len(p) + 1 - len(shares))


def shares_of(p_TB: Tensor, threshold: float = HALT_THRESHOLD) -> Tensor:
    """Return the shares of all steps, [T + 1, B], which are the mean of states that are unit vectors."""
    steps, batch = len(p_TB) + 1, p_TB.shape[1]
    states = torch.eye(steps, dtype=p_TB.dtype)[:, None].expand(steps, batch, steps)
    halting = Halting(states[0], threshold)
    for state, p_B in zip(states, [*p_TB, None], strict=True):
        halting.add(state, None if p_B is None else p_B[:, None])
    return halting.mean.T


@given(st.lists(st.floats(0.01, 1.0), max_size=7), st.sampled_from((HALT_THRESHOLD, 0.5)))
def test_halting_shares_by_hand(p: list[float], threshold: float) -> None:
    got = shares_of(torch.tensor(p, dtype=torch.float64)[:, None], threshold).flatten()
    assert got.tolist() == pytest.approx(shares_by_hand(p, threshold), abs=1e-12)
    assert got.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (got >= 0).all()


def test_a_sure_position_takes_one_turn_and_an_unsure_one_all_of_them() -> None:
    shares = shares_of(torch.tensor([[9.0, -9.0], [0.0, -9.0], [0.0, -9.0]]).sigmoid())
    assert shares[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert shares[3, 1] > 0.99


def test_a_turn_that_overflows_after_halting_leaves_output_and_gradients_alone() -> None:
    """A position that has halted goes on from zeros, since a gradient of 0 times a slope that is not finite is no number."""
    model = models.nano(max_moe_iters=3)
    loop = model.layers[-1].moe_graph
    loop.halt.forward = lambda x: torch.full((*x.shape[:-1], 1), 30.0)
    take_turn, results = loop.turn, []
    for spoiled in (False, True):
        factors = iter((1.0, 1e30, 1e30) if spoiled else (1.0, 1.0, 1.0))

        def turn(h_BPD: Tensor, read_BPD: Tensor, factors: Any = factors) -> Tensor:
            return take_turn(h_BPD, read_BPD) * next(factors)

        loop.turn = turn
        e_BPD = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out_BPD = loop(e_BPD)
        out_BPD.square().sum().backward()
        model.drop_gradients()
        results.append((out_BPD.detach(), e_BPD.grad))
    exact(results[1], results[0])


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
    # -8 quarters of an octave are the scale of 24 inputs.
    assert not trits_of(halt.weight).any() and halt.weight.exponents.eq(-8).all()
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


@pytest.mark.parametrize("has_nodes", [False, True])
def test_turns_are_those_of_the_rule(has_nodes: bool) -> None:
    """Each of them injects the stream that the loop began with, and reads its own state and the nodes."""
    loop = models.nano(max_moe_iters=3).layers[-1].moe_graph
    # No position halts before the last turn.
    loop.halt.forward = lambda x: torch.full((*x.shape[:-1], 1), -200.0)
    rng = torch.Generator().manual_seed(1)
    e_BPD, drawn_BPD = (torch.randn(2, 5, 24, generator=rng) for _ in range(2))
    nodes_BPD = drawn_BPD if has_nodes else None
    keep_D = 1 - 2.0 ** -loop.get_buffer("leak_shifts").float()
    h_BPD = e_BPD
    with torch.no_grad():
        for _ in range(3):
            h_BPD = keep_D * h_BPD + (1 - keep_D) * e_BPD
            h_BPD = h_BPD + loop.moe(loop.moe_norm(h_BPD + drawn_BPD if has_nodes else h_BPD))
        alike(loop(e_BPD, nodes_BPD), h_BPD)
