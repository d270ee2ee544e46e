"""`bench.learning`: float weights answer what the graph asks of a weight, so that float rules train the graph that ours train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.reference.config import with_modules
from arbitor.reference.constants import MIN_ORTHOGONAL_RANK
from arbitor.reference.graph import ArbModel
from bench.learning import rules
from bench.learning.dense import DenseOps
from bench.learning.learner import Architecture, Learner
from conformance.compare import exact
from conformance.graph.models import WHOLE

TRUNK = with_modules(WHOLE, vq=False, max_moe_iters=1)

FEW, MANY = 16, 80
"""Bytes of windows whose positions take chosen experts, and all of them."""


@pytest.mark.parametrize("length", [FEW, MANY])
def test_the_graph_on_float_weights_computes_what_it_does_on_ternary_ones(length: int) -> None:
    """The loss agrees, and it changes along the gradients as they say."""
    ids_BT = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(0))
    ops: Any = DenseOps(torch.float32)
    ours, twin = ArbModel(TRUNK, seed=0), ArbModel(TRUNK, ops=ops, seed=0)
    loss = twin.loss(ids_BT)
    # An expert may be chosen otherwise where two are nearly equal.
    assert loss.item() == pytest.approx(ours.loss(ids_BT).item(), rel=1e-4)
    with twin.voting.taking(rate=1.0, step=0, undo=False):
        loss.backward()
    masters = [weight.master for weight in ops.weights]
    squares = sum(float(master.grad.square().sum()) for master in masters if master.grad is not None)
    change, losses = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            for weight in ops.weights:
                if weight.master.grad is not None:
                    weight.value.copy_(weight.master + sign * change * weight.master.grad / squares**0.5)
            losses.append(float(twin.loss(ids_BT)))
    assert (losses[0] - losses[1]) / (2 * change) == pytest.approx(squares**0.5, rel=0.02)


@pytest.mark.parametrize("rule", [rule for rule in rules.RULES if rules.RULES[rule].kind != "integer"])
def test_float_rules_train_the_graph(rule: str) -> None:
    shape = Architecture("nano", config=TRUNK, batch=2, context=MANY)
    model = Learner(shape, rules.RULES[rule], seed=0, device="cpu")
    ids_BT = torch.randint(0, 256, (2, MANY), generator=torch.Generator().manual_seed(0))
    losses = [float(model.step(ids_BT, 1.0)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_an_op_that_float_weights_do_not_have_is_named() -> None:
    with pytest.raises(AttributeError, match="float weights have no op 'nearest_codes'"):
        DenseOps(torch.float32).nearest_codes  # noqa: B018


def test_muon_moves_each_expert_as_a_matrix_of_its_own() -> None:
    """The integer rule makes the gradient of each orthogonal, and a stack of experts is no matrix."""
    shape = Architecture(
        "nano", config=replace(TRUNK, expert_rank=MIN_ORTHOGONAL_RANK, shared_inner=36), batch=2, context=MANY
    )
    model = Learner(shape, rules.RULES["float Muon"], seed=0, device="cpu")
    stacks = [module for module in model.model.ternary_modules().values() if hasattr(module, "num_groups")]
    stacks = [module for module in stacks if module.orthogonal]
    assert len(model.stacks) == len(stacks) > 0
    [before] = [master.detach().clone() for master, _ in model.stacks[:1]]
    held: list[torch.Tensor] = []

    def look(*_: Any) -> None:
        held.extend(matrix.grad.clone() for matrix in model.stacks[0][1] if matrix.grad is not None)

    model.optimizers[1].register_step_pre_hook(look)
    model.step(torch.randint(0, 256, (2, MANY), generator=torch.Generator().manual_seed(0)), 1.0)
    alone: list[torch.Tensor] = [torch.nn.Parameter(part.clone()) for part in before.chunk(len(held))]
    assert len(held) == stacks[0].num_groups
    for matrix, grad in zip(alone, held, strict=True):
        matrix.grad = grad
    rate = rules.RULES["float Muon"].rate
    torch.optim.Muon(alone, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    exact((torch.cat(alone).detach(),), (model.stacks[0][0].detach(),))
    assert not torch.equal(before, model.stacks[0][0])


def test_scales_of_groups_behind_straight_through_weights() -> None:
    """A group has the values -s, 0 and s with the mean size of its float weights as s, the last one of a row too."""
    ops = rules.GroupedStraightThroughOps(torch.float32)
    w_NK = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for group, value in (
        (w_NK[:, :12], ops.value_of(w_NK)[:, :12]),
        (w_NK[:, 12:], ops.value_of(w_NK)[:, 12:]),
    ):
        for row, found in zip(group, value, strict=True):
            scale = row.abs().mean()
            want = torch.where(row.abs() / scale > 0.5, row.sign() * scale, 0.0)
            torch.testing.assert_close(found, want)
