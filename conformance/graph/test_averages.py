"""A running mean leads the gradients of matrices: by the rule, once a use, never in a pass that is refused, and over a checkpoint.

Legend: B batch, T bytes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.config import SIGN_VOTES, ArbConfig, with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.averages import GradientAverage
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import TernaryLinear
from conformance.compare import exact
from conformance.graph import models
from conformance.graph.models import random_ids

FIELDS = {"width": 48, "head_inner": 48, "average_gradients": True}


def state(model: ArbModel) -> tuple[Any, ...]:
    return tuple(each.clone() for each in model.state().values())


def test_matrices_that_are_made_orthogonal_have_a_mean() -> None:
    model = models.nano(**FIELDS, shared_inner=36, expert_rank=36)
    seen = 0
    for module in model.ternary_modules().values():
        if isinstance(module, TernaryLinear | TernaryGroupedLinear):
            assert (module.average is not None) == module.orthogonal
            if module.average is not None:
                seen += 1
                assert module.average.get_buffer("mean").shape == module.weight.shape
    assert seen and not any(
        isinstance(part, GradientAverage) for part in models.nano(width=48).table_modules().values()
    )


def test_a_pass_votes_with_what_the_rule_says() -> None:
    """Three gradients of a linear, of two uses each: the second use is led by the first."""
    made: list[torch.Tensor] = []
    whole = ops.orthogonalize

    def watched(grad_NK: torch.Tensor, **how: Any) -> torch.Tensor:
        made.append(grad_NK.clone())
        return whole(grad_NK, **how)

    config, watched_ops = (
        with_fields(models.NANO, average_gradients=True),
        models.ops_with(orthogonalize=watched),
    )
    parts = GraphContext(watched_ops, config, device="cpu", dtype=torch.float32, seed=0)
    linear = TernaryLinear(parts, 33, 40)
    assert linear.average is not None
    want: list[torch.Tensor] = []
    mean, exponents = torch.zeros(40, 33, dtype=torch.int8), torch.zeros(40, dtype=torch.int8)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 5, 33, generator=generator)
        g = torch.randn(2, 5, 40, generator=generator)
        with parts.voting.taking(rate=4.0, step=step):
            for use in range(2):
                linear(x[use]).backward(g[use])
        for use in range(2):
            led, mean, exponents = ops.average_gradient(g[use].T @ x[use], mean, exponents, 4.0)
            want.append(led)
    exact(torch.cat(made), torch.cat(want))
    exact(tuple(linear.average.tables().values()), (mean, exponents))


@pytest.mark.parametrize("chosen", [[3, 3], [0, 3], [3, 0], [-1, -1]])
def test_experts_that_no_slot_chose_keep_their_means(chosen: list[int]) -> None:
    """Fewer slots than experts leave rows that are named -1. They are no rows, and not the last ones."""
    config = with_fields(models.NANO, average_gradients=True)
    parts = GraphContext(ops, config, device="cpu", dtype=torch.float32, seed=0)
    experts = TernaryGroupedLinear(parts, 4, 33, 34)
    assert experts.average is not None
    draws = torch.Generator().manual_seed(1)
    x, g = torch.randn(2, 33, generator=draws), torch.randn(2, 34, generator=draws)
    with parts.voting.taking(rate=4.0, step=0):
        experts(x, torch.tensor(chosen)).backward(g)
    mean, exponents = torch.zeros(4, 34, 33, dtype=torch.int8), torch.zeros(4, 34, dtype=torch.int8)
    for expert in {*chosen} - {-1}:
        slots = torch.tensor(chosen) == expert
        _, mean[expert], exponents[expert] = ops.average_gradient(
            g[slots].T @ x[slots], mean[expert], exponents[expert], 4.0
        )
    exact(tuple(experts.average.tables().values()), (mean.flatten(0, 1), exponents.flatten()))


@pytest.mark.parametrize("undo", [True, False])
def test_a_pass_that_is_refused_or_at_rate_0_changes_no_mean(undo: bool) -> None:
    model = models.nano(**FIELDS)
    for step in range(2):
        assert model.backward(model.losses(random_ids(2, 9, seed=step)), rate=4.0, step=step)
        model.step()
    before, ids = state(model), random_ids(2, 9)
    assert model.backward(model.losses(ids), rate=0.0, step=2, undo=undo)
    exact(state(model), before)
    assert not model.backward(model.loss(ids) * float("nan"), rate=4.0, step=2, undo=undo)
    exact(state(model), before)


def test_a_pass_that_raises_puts_the_means_back() -> None:
    """It raises once a mean has changed."""
    means: list[torch.Tensor] = []

    def fails(grad_NK: torch.Tensor, **how: Any) -> torch.Tensor:
        if means:
            now = model.tables().values()
            assert any(not torch.equal(mean, table) for mean, table in zip(means, now, strict=True))
            raise RuntimeError("out of memory")
        return ops.orthogonalize(grad_NK, **how)

    model = models.nano(**FIELDS, ops=models.ops_with(orthogonalize=fails))
    assert model.backward(model.losses(random_ids(2, 9)), rate=4.0, step=0)
    model.step()
    before = state(model)
    means.extend(table.clone() for table in model.tables().values())
    with pytest.raises(RuntimeError, match="out of memory"):
        model.backward(model.losses(random_ids(2, 9, seed=1)), rate=4.0, step=1)
    exact(state(model), before)


def test_rows_in_parts_have_the_mean_of_the_whole() -> None:
    """A weight whose gradient is made in parts keeps a mean for each row, as if it came at once."""
    parts = GraphContext(
        ops, with_fields(models.NANO, average_gradients=True), device="cpu", dtype=torch.float32, seed=0
    )
    at_once, in_parts = GradientAverage(parts, (7, 5)), GradientAverage(parts, (7, 5))
    for step in range(2):
        grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        led = at_once.lead(grad, None, 1.0)
        exact(torch.cat([in_parts.lead(grad[rows], rows, 1.0) for rows in torch.arange(7).split(4)]), led)
    exact(tuple(in_parts.tables().values()), tuple(at_once.tables().values()))


def test_a_loaded_state_goes_on_to_the_bit() -> None:
    model, other = models.nano(**FIELDS), models.nano(**FIELDS, seed=4)
    for step in range(2):
        assert model.backward(model.losses(random_ids(2, 9, seed=step)), rate=4.0, step=step)
        model.step()
    other.load_state(model.state())
    other.voting.seed = model.voting.seed
    for each in (model, other):
        assert each.backward(each.losses(random_ids(2, 9, seed=5)), rate=4.0, step=2)
        each.step()
    exact(state(other), state(model))


@pytest.mark.parametrize("memory", [1, 3])
def test_a_mean_has_the_memory_of_the_configuration(memory: int) -> None:
    """From zeros a gradient moves it by 2**-memory of the way, of a whole matrix and of rows."""
    config = with_fields(models.NANO, average_gradients=True, average_memory=memory)
    parts = GraphContext(ops, config, device="cpu", dtype=torch.float32, seed=0)
    grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    want = ops.average_gradient(
        grad, torch.zeros(7, 5, dtype=torch.int8), torch.zeros(7, dtype=torch.int8), 1.0, memory=memory
    )
    for rows in (None, torch.arange(7)):
        average = GradientAverage(parts, (7, 5))
        exact((average.lead(grad, rows, 1.0), *average.tables().values()), want)
    largest = grad.abs().amax(dim=1) / 2**memory
    assert (average.get_buffer("exponents") == torch.frexp(largest).exponent - 7).all()


def test_a_mean_that_nothing_reads_is_refused() -> None:
    for fields in ({"orthogonal_steps": 0}, SIGN_VOTES):
        with pytest.raises(ValueError, match="average_gradients is True, but must be False"):
            with_fields(models.NANO, average_gradients=True, **fields)
    with pytest.raises(TypeError, match="average_gradients is 1, but must be true or false"):
        with_fields(models.NANO, average_gradients=1)
    with pytest.raises(ValueError, match="average_memory is 2, but must be 1 without average_gradients"):
        with_fields(models.NANO, average_memory=2)
    for memory in (0, 7):
        with pytest.raises(ValueError, match=f"average_memory is {memory}, but must be"):
            with_fields(models.NANO, average_gradients=True, average_memory=memory)


def test_a_configuration_from_before_has_the_memory_of_one_step() -> None:
    config = with_fields(models.NANO, average_gradients=True)
    values = json.loads(config.to_json())
    del values["average_memory"]
    assert ArbConfig.from_json(json.dumps(values)) == config
