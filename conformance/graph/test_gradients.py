"""The model's logits, and the gradient that each weight votes with, are those of a plain torch model on dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.constants import RESERVED_STEP
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.audio import TernaryConv1d
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.ternary_graph import edge_sum
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike
from conformance.graph import models, twin


@pytest.fixture(scope="module", params=[1, 3], ids=["one turn", "three turns"])
def double(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a float64 model, its weights as matrices, and the gradient each of them voted with."""
    voted: dict[int, torch.Tensor] = {}
    uses: list[int] = []

    def record(
        weight: Any, grad: torch.Tensor, rate: float, *, rows: Any = None, tensor_id: int, **_: Any
    ) -> Any:
        full = torch.zeros(weight.shape)
        if rows is None:
            full += grad
        else:
            full[rows[rows >= 0]] = grad[rows >= 0]
        uses.append(tensor_id)
        # A weight of the loop votes once a turn.
        voted[tensor_id] = voted.get(tensor_id, 0) + full
        return weight

    model = models.nano(
        ops=models.ops_with(accumulate_gradient=record), dtype=torch.float64, max_moe_iters=request.param
    )
    matrices = {
        name: dequantize(weight, dtype=torch.float64).requires_grad_()
        for name, weight in model.weights().items()
    }
    assert model.backward(model.loss(models.random_ids(2, 9)), rate=models.RATE, step=0)
    assert request.param > 1 or len(uses) == len(voted), "a weight voted twice"
    names = {module.tensor_id: name for name, module in model.ternary_modules().items()}
    return model, matrices, {names[tensor_id]: grad for tensor_id, grad in voted.items()}


def test_logits_are_those_of_the_twin(double: Any) -> None:
    model, matrices, _ = double
    ids_BT = models.random_ids(2, 9)
    with torch.no_grad():
        want = torch.stack([twin.logits(matrices, model.config, ids_T) for ids_T in ids_BT])
        alike(model(ids_BT), want, "logits")
        alike(model.loss(ids_BT), twin.loss(matrices, model.config, ids_BT), "loss")


def test_every_weight_votes_with_the_gradient_of_the_twin(double: Any) -> None:
    model, matrices, voted = double
    twin.loss(matrices, model.config, models.random_ids(2, 9)).backward()
    frozen = {name for name, module in model.ternary_modules().items() if module.frozen}
    assert set(voted) == set(matrices) - frozen
    for name, grad in voted.items():
        want = matrices[name].grad
        assert want is not None and want.abs().max() > 0, f"{name} has no gradient to be checked with"
        alike(grad, want, f"the gradient that {name} voted with")


def test_a_step_goes_downhill() -> None:
    """After one step the loss on the same bytes is lower, since votes are cast against the gradient."""
    model = models.nano(theta=1)
    ids_BT = models.random_ids(4, 24)
    before = model.loss(ids_BT)
    model.backward(before, rate=0.2, step=0)
    model.step()
    with torch.no_grad():
        assert model.loss(ids_BT) < before


def test_input_gradient_needs_no_votes() -> None:
    """A backward pass outside of `model.backward` moves nothing and still gives the gradient of the input."""
    model = models.nano()
    before = models.state_of(model)
    layer = model.sequencer.project
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, layer.weight.shape[1], generator=generator).requires_grad_()
    layer(x).square().sum().backward()
    want = 2 * (x.detach() @ ops.dequantize(layer.weight).T) @ ops.dequantize(layer.weight)
    alike(x.grad, want)
    assert not models.changed_tensors(before, model)


def test_the_initialisation_step_is_not_for_votes() -> None:
    model = models.nano()
    before = models.state_of(model)
    with pytest.raises(ValueError, match=f"step is {RESERVED_STEP}"):
        model.backward(model.loss(models.random_ids(1, 6)), rate=1.0, step=RESERVED_STEP)
    assert not models.changed_tensors(before, model)


LAYERS: dict[str, Callable[[ArbModel, torch.Tensor], torch.Tensor]] = {
    "linear": lambda model, x: TernaryLinear(model.context, x.shape[1], 5)(x),
    "rms_norm": lambda model, x: TernaryRMSNorm(model.context, x.shape[1])(x),
    "grouped_linear": lambda model, x: TernaryGroupedLinear(model.context, 2, x.shape[1], 5)(
        x, torch.tensor([0, 1])
    ),
    "conv1d": lambda model, x: TernaryConv1d(model.context, 1, 3, kernel_size=4)(x[:, None]),
    "edge_sum": lambda model, x: edge_sum(
        x, torch.tensor([[1], [0]]), torch.tensor([[0.5], [-2.0]]), model.context.ops
    ),
}
"""What the graph computes of two rows, where the gradient depends on a weight or on signs."""


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("power", [1, 2])
def test_a_second_derivative_is_refused(name: str, power: int) -> None:
    """Also of a loss that is linear in the result, so that the gradient of the result is constant."""
    model = models.nano()
    x = torch.randn(2, model.config.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = LAYERS[name](model, x).pow(power).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (loss + grad.square().sum()).backward()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(grad.sum(), x, allow_unused=True)
