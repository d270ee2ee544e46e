"""The modules that hold weights vote and step exactly on the op set under test. Whole models are in test_whole_models.py.

Legend: M rows of activations, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.context import GraphContext
from conformance.compare import exact, unsigned_zeros
from conformance.graph import models
from conformance.subject import Subject


def contexts(subject: Subject, **fields: Any) -> list[GraphContext]:
    """Return the reference's context and the subject's, with weights that the reference draws for both."""
    thresholds = {"theta": 5} if fields.get("exponent_rule") == "frozen" else {"theta": 5, "theta_e": 3}
    config = models.nano(**thresholds, **fields).config
    sets = (
        (reference_ops, torch.device("cpu")),
        (models.drawn_by_the_reference(subject.ops), subject.device),
    )
    return [GraphContext(ops, config, device=device, dtype=torch.float32, seed=7) for ops, device in sets]


def integers(*shape: int, seed: int) -> Tensor:
    """Return floats whose products and sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
@pytest.mark.parametrize("exponent_rule", ["score", "frozen"])
def test_a_linear_votes_and_steps_alike(subject: Subject, vote_rule: str, exponent_rule: str) -> None:
    results = []
    for parts in contexts(subject, vote_rule=vote_rule, exponent_rule=exponent_rule):
        layer = TernaryLinear(parts, 29, 17)
        outputs: list[Any] = []
        for step in range(3):
            x = integers(3, 5, 29, seed=step).to(parts.device).requires_grad_()
            y = layer(x)
            with parts.voting.taking(rate=2.0, step=step, size=2):
                (y * integers(3, 5, 17, seed=9).to(parts.device)).sum().backward()
            outputs += [y.detach().cpu(), x.grad.cpu()]
            layer.step_weight()
        results.append((unsigned_zeros(tuple(outputs)), parts.ops.to_spec(layer.weight).to("cpu")))
    exact(results[1], results[0])
    start = reference_ops.to_spec(TernaryLinear(contexts(subject)[0], 29, 17).weight)
    assert results[0][1].trit_accum.any() and not torch.equal(results[0][1].packed, start.packed)


def test_micro_batches_vote_and_step_alike(subject: Subject) -> None:
    """Sums of a matrix, and rows of a table in each pass, of three steps of three micro-batches."""
    results = []
    for parts in contexts(subject):
        layer, table = TernaryLinear(parts, 29, 17), TernaryEmbedding(parts, 40, 29)
        for number in range(9):
            ids = torch.tensor([[3, 39, 3], [0, 17, 3]], device=parts.device) + number
            with parts.voting.taking(rate=2.0, step=number, accum=3, undo=number % 2 == 0):
                y = layer(integers(2, 3, 29, seed=number).to(parts.device))
                (y * integers(2, 3, 17, seed=number).to(parts.device)).sum().backward()
                (table(ids % 40) * integers(2, 3, 29, seed=number).to(parts.device)).sum().backward()
            if number % 3 == 2:
                parts.voting.vote_sums()
                layer.step_weight()
                table.step_weight()
        results.append(tuple(parts.ops.to_spec(each.weight).to("cpu") for each in (layer, table)))
    exact(results[1], results[0])
    start = reference_ops.to_spec(TernaryLinear(contexts(subject)[0], 29, 17).weight)
    assert all(weight.trit_accum.any() for weight in results[0])
    assert not torch.equal(results[0][0].packed, start.packed)


def test_a_table_votes_and_steps_alike(subject: Subject) -> None:
    results = []
    for parts in contexts(subject):
        table = TernaryEmbedding(parts, 40, 19)
        for step in range(2):
            ids = torch.tensor([[3, 39, 3], [0, 17, 3]], device=parts.device) + step
            with parts.voting.taking(rate=1.0, step=step):
                (table(ids % 40) * integers(2, 3, 19, seed=step).to(parts.device)).sum().backward()
        table.step_weight()
        results.append(parts.ops.to_spec(table.weight).to("cpu"))
    exact(results[1], results[0])
    assert results[0].trit_accum.any()


def test_a_norm_that_votes_steps_alike(subject: Subject) -> None:
    """The root mean square of rows of equal magnitude is a power of two, so that every quotient is exact."""
    results = []
    for parts in contexts(subject):
        norm = TernaryRMSNorm(parts, 24, frozen=False)
        x = torch.where(integers(6, 24, seed=1) < 0, -4.0, 4.0).to(parts.device)
        with parts.voting.taking(rate=1.0, step=0):
            (norm(x) * integers(6, 24, seed=2).to(parts.device)).sum().backward()
        norm.step_weight()
        results.append(parts.ops.to_spec(norm.weight).to("cpu"))
    exact(results[1].packed, results[0].packed)
    exact(results[1].exponents, results[0].exponents)
