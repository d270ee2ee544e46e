"""An optimizer as loops of torch expect one, for weights that are stepped by votes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.model import ArbModel
from arbitor.nn import Ternary
from arbitor.reference import checks
from arbitor.wrapped import inner_model

STEPS = "steps_taken"
"""The name, in the state of an optimizer, of how many steps an `ArbModel` was trained for."""


class ArbOptimizer(torch.optim.Optimizer):
    """Steps the ternary weights of a model. Its one parameter group has the rate as `lr`, for `torch.optim.lr_scheduler`.

        optimizer = ArbOptimizer(model, rate=6.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1000)
        for ids_BT in batches:
            optimizer.backward(model.losses(ids_BT))
            optimizer.step()
            schedule.step()

    `optimizer.backward(loss)` takes the place of `loss.backward()`: weights vote during the backward pass, and no gradient is left
    for later. `backward` and `step` refuse gradients that came by `loss.backward()`. Float parameters of a `Ternary` need another
    optimizer.

    The size of a vote is the rate's. A factor on the loss changes no vote, and `clip_grad_norm_` of `param_groups` finds no
    gradient. For k micro-batches a step, call `backward` k times before `step`, with `accum=k`: their gradients are summed, and the
    sums vote once with the step, as those of one batch would. The rate is not divided by k. A loss that is divided by k casts the
    same votes, and gives float parameters of a `Ternary` the mean gradient.

    Args:
        model: an `ArbModel`, or a `Ternary`.
        rate:  size of the votes, 0 .. 127; docs/training.md says what was measured for it.
        accum: micro-batches of a step. A step may have fewer, as at the end of the data.

    Attributes:
        passes: backward passes so far that counted; their number is a coordinate of the dither.
    """

    def __init__(self, model: ArbModel | Ternary, *, rate: float, accum: int = 1) -> None:
        if not isinstance(model, ArbModel | Ternary):
            raise TypeError(
                f"model is a {type(model).__name__}, but must be an ArbModel or a Ternary{inner_model(model)}"
            )
        checks.vote_rate(rate)
        checks.integer("accum", accum, 1, 2**32 - 1)
        self.model, self.accum = model, accum
        self.passes = 0
        # torch asks for a parameter. Weights are none: they are integers.
        super().__init__([torch.nn.Parameter(torch.empty(0))], {"lr": rate})

    def backward(self, loss: Tensor | Mapping[str, Tensor]) -> bool:
        """Run the backward pass of one micro-batch, in which the weights vote at the rate of now; see `backward` of the model.

        Of several micro-batches a step, the gradients are added to sums, which vote with the step at the rate of the last pass.

        Args:
            loss: a scalar; or, of an `ArbModel`, its components by name.

        Returns:
            True; or False when the loss is not finite, in which case nothing has changed.

        Raises:
            ValueError: so many passes were taken since the last step as it has micro-batches; or as `backward` of the model.
        """
        given: Any = loss
        group = self.param_groups[0]
        if "rate" in group:
            raise ValueError(
                "param_groups has 'rate', but the rate of an ArbOptimizer is its 'lr', which schedulers of torch set"
            )
        rate = group["lr"]
        accepted = self.model.backward(given, rate=rate, step=self.passes, accum=self.accum)
        self.passes += accepted
        return accepted

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the step rule to all that voted since the last step.

        Raises ValueError for a closure, RuntimeError for gradients that came by `loss.backward()`.
        """
        if closure is not None:
            raise ValueError("closure is given, but must be None: a step evaluates no loss")
        self.model.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that came by `loss.backward()`, which did not vote, as `drop_gradients` of the model does.

        Raises RuntimeError for votes that wait for a step, as they cannot be taken back.
        """
        self.model.drop_gradients()
        if self.model.voting.waits:
            raise RuntimeError(
                "backward was called without a step after it, but zero_grad must follow step(), as votes cannot be taken back"
            )

    def __getattr__(self, name: str) -> Any:
        """Refuse what a `GradScaler` asks before a step, by a RuntimeError, as it would find no gradient to look at.

        A property would be read by whatever reads all that `dir` lists.
        """
        if name == "_step_supports_amp_scaling":
            raise RuntimeError(
                "a GradScaler was given an ArbOptimizer, but must be given optimizers of float parameters alone: call "
                "backward(loss) and step() of the ArbOptimizer, whose votes do not depend on the size of a loss"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, which has a copy of the model."""
        return {**super().__getstate__(), "model": self.model, "accum": self.accum, "passes": self.passes}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: the weights of a model have one rate."""
        if self.param_groups:
            raise ValueError("param_group is given, but the weights of a model have one group, with one rate")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the rate, the passes that voted, and `steps_taken` of an `ArbModel`; what votes have gathered is in the model."""
        steps = {STEPS: self.model.steps_taken} if isinstance(self.model, ArbModel) else {}
        return {**super().state_dict(), "passes": self.passes, **steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the optimizer did whose `state_dict` it is; raises TypeError or ValueError for one of something else.

        An `ArbModel` is told its `steps_taken`, which no file of tensors has.
        """
        rest = dict(state_dict)
        if "passes" not in rest:
            raise ValueError("state_dict has no 'passes', but must be of an ArbOptimizer")
        passes, steps = rest.pop("passes"), rest.pop(STEPS, None)
        checks.integer("passes", passes, 0, 2**32 - 2)
        if steps is not None:
            checks.integer(STEPS, steps, 0, 2**63 - 1)
        super().load_state_dict(rest)
        self.passes = passes
        if steps is not None and isinstance(self.model, ArbModel):
            self.model.steps_taken = steps
