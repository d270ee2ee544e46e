"""What the modules of the graph share: the weights they hold, and the votes that a backward pass casts.

A weight is held in the layout of the op set (`ops.from_spec`), its tensors registered as buffers: integers only, and no
parameter. Gradients become votes inside the backward pass, layer by layer, and are gone after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arbitor.reference import checks
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import RESERVED_STEP
from arbitor.reference.types import LaidOutWeight, TernaryWeight

Left = tuple[Callable[..., None], tuple[Tensor | None, ...]]
"""What a backward pass leaves for the next step: how a module is told, and what of."""


class Voting:
    """Whether, when and how the weights of one model vote in a backward pass; one object, shared by all of them.

    Attributes:
        active: weights vote only inside of `at`; a backward pass outside of it computes input gradients alone.
        rate:   `rate` of `stochastic_votes`, a number or a 0-dim float32 tensor.
        step:   dither step of the micro-batch, a number or a 0-dim int64 tensor.
        size:   vote size of the `sign` rule, 1 .. 127.
        faults: int64 [], gradient rows so far that were not finite and cast no votes.
        dtype:  what gradients are made orthogonal in: bfloat16 if the activations are, else float32.
        version: steps and loads of the model's weights and tables so far: what a ledger read before one is stale after it.
        held:   None; or the list of `open`, to which what is left for the next step goes in place of the modules.
    """

    def __init__(
        self,
        ops: ModuleType,
        config: ArbConfig,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.ops = ops
        self.vote_rule = config.vote_rule
        self.exponent_rule = config.exponent_rule
        self.orthogonal_steps = config.orthogonal_steps
        self.dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        self.seed = seed
        self.active = False
        self.rate: float | Tensor = 0.0
        self.step: int | Tensor = 0
        self.size = 1
        self.faults = torch.zeros((), dtype=torch.int64, device=device)
        self.version = 0
        self.held: list[Left] | None = None

    @contextmanager
    def at(self, *, rate: float | Tensor, step: int | Tensor, size: int = 1) -> Iterator[None]:
        """Let weights vote in the backward passes run inside of this context.

        Raises TypeError or ValueError for a rate, step or size that is not allowed, before anything ran.
        """
        checks.vote_rate(rate)
        if isinstance(step, Tensor):
            checks.vote_clock(self.seed, step, 0)
        else:
            checks.integer("step", step, 0, RESERVED_STEP - 1)
        checks.threshold("size", size)
        if float(rate) == 0:  # nothing moves: no vote, no counter, no revival
            yield
            return
        with self.open(rate=rate, step=step, size=size):
            yield

    @contextmanager
    def open(
        self, *, rate: float | Tensor, step: int | Tensor, size: int = 1, held: list[Left] | None = None
    ) -> Iterator[None]:
        """Do as `at` for a rate above 0, without a look at values: they may be on a device that nobody is to wait for.

        With a list, what backward passes leave for the next step is added to it, and no module is told: `leave` does that
        later, as often as the passes are repeated. For a recorder, whose passes do not run as they are recorded.
        """
        self.rate, self.step, self.size = rate, step, size
        self.active, self.held = True, held
        try:
            yield
        finally:
            self.active, self.held = False, None

    def leave(self, note: Callable[..., None], *seen: Tensor | None) -> None:
        """Tell a module, by `note(*seen)`, what a backward pass leaves for the next step; or add it to what is held back."""
        if self.held is None:
            note(*seen)
        else:
            self.held.append((note, seen))

    def cast(
        self,
        weight: LaidOutWeight,
        grad_NK: Tensor,
        *,
        tensor_id: int,
        rows: Tensor | None,
        num_matrices: int = 0,
        uses: int = 1,
    ) -> None:
        """Count the votes of a gradient in the accumulators of `weight`, in place.

        A gradient that is a stack of `num_matrices` matrices is made orthogonal first, in the dtype of the activations, unless
        the rule is the sign's. 0: it votes as it is, as for the rows of a table.
        Of a weight that a pass uses several times, each of the `uses` votes at its part of the rate: a vote says how far a
        step goes, however small the gradient, and so many would go too far. The `sign` rule has no rate to divide.
        """
        if grad_NK.dtype == torch.float64:
            grad_NK = grad_NK.to(torch.float32)
        if num_matrices and self.orthogonal_steps and self.vote_rule == "stochastic":
            grad_NK = self.ops.orthogonalize(
                grad_NK.to(self.dtype), iterations=self.orthogonal_steps, num_groups=num_matrices
            )
        clock: dict[str, Any] = {
            "seed": self.seed,
            "step": self.step,
            "tensor_id": tensor_id,
            "exponent_rule": self.exponent_rule,
            "rows": rows,
            "out": weight,
        }
        if self.vote_rule == "stochastic":
            rate = _part_of_rate(self.rate, uses)
            self.ops.accumulate_gradient(weight, grad_NK, rate, faults=self.faults, **clock)
        else:
            self.faults += self.ops.count_nonfinite_rows(grad_NK)
            self.ops.accumulate(weight, self.ops.sign_votes(grad_NK, self.size), **clock)


def _part_of_rate(rate: float | Tensor, uses: int) -> float | Tensor:
    """Return the float32 nearest to a float32 rate divided by the uses; the same for a number and for a tensor on a device."""
    if uses == 1:
        return rate
    if isinstance(rate, Tensor):
        return rate / torch.full_like(
            rate, uses
        )  # CUDA multiplies by the reciprocal of a number, which rounds differently
    return (
        torch.tensor(rate, dtype=torch.float32).item() / uses
    )  # an op rounds it to float32, as if it never was more


class GraphContext:
    """What every module of a model is built with: op set, config, device, dtype, and the numbering of the weights."""

    def __init__(
        self, ops: ModuleType, config: ArbConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int
    ) -> None:
        self.ops = ops
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.seed = seed
        self.voting = Voting(ops, config, seed=seed, device=device, dtype=dtype)
        self.num_weights = 0

    def next_tensor_id(self) -> int:
        """Return the index of the next weight in definition order: the dither's tensor id."""
        self.num_weights += 1
        return self.num_weights - 1

    def random_weight(self, shape: tuple[int, int], *, std: float, tensor_id: int) -> TernaryWeight:
        """Return a weight of standard deviation `std` (to within half a power of two), in canonical form."""
        group_size = self.config.group_size
        weight = self.ops.initial_weight(
            shape, std=std, seed=self.seed, tensor_id=tensor_id, group_size=group_size, device=self.device
        )
        return weight.with_mantissa(self.config.mantissa_bits)

    def constant_weight(self, shape: tuple[int, int], *, trit: int, exponent: int) -> TernaryWeight:
        """Return a weight that is trit * 2**exponent everywhere, in canonical form."""
        group_size = self.config.group_size
        weight = self.ops.constant_weight(
            shape, trit=trit, exponent=exponent, group_size=group_size, device=self.device
        )
        return weight.with_mantissa(self.config.mantissa_bits)


class TableModule(nn.Module):
    """A module that keeps integers beside its weights: counters of use, neighbours, strengths.

    What a forward pass saw is handed over by `when_voting` in an accepted backward pass, kept until `step_tables`, and
    counted there: a pass without a backward pass, or with a loss that is refused, leaves no trace.
    """

    def add_table(self, name: str, tensor: Tensor, low: int, high: int) -> None:
        """Register integers from `low` to `high` under a name: they move with the module and are saved with the model.

        The range is what a state that is loaded must keep to: ops index with some tables and trust them all.
        """
        self.register_buffer(name, tensor)
        self.__dict__.setdefault("_tables", {})[name] = (low, high)

    def tables(self) -> dict[str, Tensor]:
        """Return the integer tensors by name."""
        return {name: self.get_buffer(name) for name in self.__dict__.get("_tables", ())}

    def table_ranges(self) -> dict[str, tuple[int, int]]:
        """Return the least and the largest element that each table may hold, by name."""
        return dict(self.__dict__.get("_tables", {}))

    def step_tables(self) -> None:
        """Count what was recorded since the last step, in place, and forget it. Nothing where nothing is counted."""

    def forget(self) -> None:
        """Drop what was recorded since the last step: the tables, or the weights behind it, were loaded."""


def when_voting(x: Tensor, voting: Voting, record: Callable[..., None], *seen: Tensor) -> Tensor:
    """Return x; when a backward pass that votes comes through it, call `record(*seen)`, `seen` detached."""
    return _WhenVoting.apply(x, voting, record, *seen)


class _WhenVoting(torch.autograd.Function):
    """The identity, with a backward pass that hands over what its forward pass saw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, voting: Voting, record: Callable[..., None], *seen: Tensor) -> Tensor:
        ctx.voting, ctx.record = voting, record
        ctx.save_for_backward(*seen)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.voting.active:
            ctx.voting.leave(ctx.record, *ctx.saved_tensors)
        return grad, None, None, *(None for _ in ctx.saved_tensors)


def used(module: nn.Module, times: int) -> None:
    """Say that a pass of the model uses every weight of `module` so many times: each use votes at its part of the rate."""
    for part in module.modules():
        if isinstance(part, TernaryModule):
            part.uses = times


class TernaryModule(nn.Module):
    """A module that holds one ternary weight.

    Attributes:
        weight:    the weight, in the layout of the op set; its tensors are this module's buffers.
        tensor_id: index of the weight in definition order.
        frozen:    a frozen weight never votes.
        voted:     whether it voted since the last `step_weight`.
        uses:      how often a pass of the model uses the weight, see `used`.
        steps:     how often the weight was stepped or loaded; a backward pass refuses a weight changed since its forward.
    """

    def __init__(
        self, context: GraphContext, make: Callable[[int], TernaryWeight], *, frozen: bool = False
    ) -> None:
        super().__init__()
        self.ops = context.ops
        self.config = context.config
        self.voting = context.voting
        self.frozen = frozen
        self.voted = False
        self.uses = 1
        self.steps = 0
        self.tensor_id = context.next_tensor_id()
        self.weight: LaidOutWeight = self.ops.from_spec(make(self.tensor_id))
        for name, tensor in self.weight.tensors().items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move the buffers as torch does, and the weight with them."""
        super()._apply(fn, recurse)
        self.weight = self.weight.with_tensors(
            **{name: self.get_buffer(name) for name in self.weight.tensors()}
        )
        return self

    def anchor(self) -> Tensor | None:
        """Return what makes autograd visit this module although its input is detached or integer: an empty tensor."""
        if self.frozen or not torch.is_grad_enabled():
            return None
        return torch.empty(0, device=self.device, requires_grad=True)

    @property
    def votes(self) -> bool:
        """Whether a backward pass running now takes this weight's votes."""
        return self.voting.active and not self.frozen

    def vote(self, grad_NK: Tensor, rows: Tensor | None = None, *, num_matrices: int = 0) -> None:
        """Count the votes of a gradient of the weight, or of its `rows`. Each use in a forward pass votes on its own.

        `num_matrices`: matrices that the gradient is a stack of, as `Voting.cast` takes it.
        """
        matrices: dict[str, int] = {"num_matrices": num_matrices, "uses": self.uses}
        self.voting.cast(self.weight, grad_NK, tensor_id=self.tensor_id, rows=rows, **matrices)
        self.voting.leave(self.note_vote, rows)

    def note_vote(self, rows: Tensor | None) -> None:
        """Remember that the weight, or its `rows`, voted."""
        self.voted = True

    def check_unchanged(self, steps: int) -> None:
        """Refuse a backward pass through a weight that was stepped or loaded since its forward pass."""
        if steps != self.steps:
            raise RuntimeError("weight was changed between forward and backward, but a step must follow both")

    def step_weight(self) -> None:
        """Apply the step rule to the weight, if it voted since the last step."""
        if self.voted:
            self.apply_step(rows=None)

    def apply_step(self, *, rows: Tensor | None) -> None:
        """Apply the step rule to the weight, or to its unique `rows` (-1: unused slot)."""
        rule = self.config
        self.ops.apply_step(
            self.weight,
            theta=rule.theta,
            theta_e=rule.theta_e,
            on_flip=rule.on_flip,
            rows=rows,
            out=self.weight,
        )
        self.voted = False
        self.changed()

    def changed(self) -> None:
        """Note that the weight is another: for backward passes through the old one, and for what was read with it."""
        self.steps += 1
        self.voting.version += 1

    def load(self, weight: TernaryWeight) -> None:
        """Overwrite the weight, in place, with one in canonical form; votes of an earlier state are forgotten."""
        for name, tensor in self.ops.from_spec(weight.to(self.device)).tensors().items():
            self.weight.tensors()[name].copy_(tensor)
        self.voted = False
        self.changed()

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return next(iter(self.weight.tensors().values())).device
