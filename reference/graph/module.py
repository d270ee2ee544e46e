"""The base classes of the graph: torch's ways with a module (freeze, move, load, copy), for ternary weights.

A weight is held in the layout of the op set (`ops.from_spec`). Its tensors are buffers of integers, and no parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from arbitor.reference import checks
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import BESIDE_TRITS, VOTED_IN
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.open_pass import Average, Voter
from arbitor.reference.graph.ranks import Gradient
from arbitor.reference.graph.rule import ANCHOR, Rule, RuleFunction, new_ticket
from arbitor.reference.graph.spread import Spread
from arbitor.reference.graph.uncompiled import outside
from arbitor.reference.graph.voting import Voting
from arbitor.reference.types import LaidOutWeight, TernaryWeight, overwrite, without_memory

Method = TypeVar("Method", bound=Callable[..., Any])

RULES_ENTRY = "_extra_state"
"""The entry of a state dict in which a part names its rules (`changed_rules`), as torch calls what is no buffer."""


class Part(nn.Module):
    """The base of every module of the graph and of lists of modules: how it is frozen, moved and loaded.

    Freezing: `requires_grad_(False)` keeps every weight and table below from moving. True lets them move again, except those
              that were built frozen, as norms are.
    Moving:   `.to(device)` moves a model. `.to(dtype)`, `.float()`, `.bfloat16()` and `.double()` of a whole model change the
              dtype of activations, and are refused for a part of it. float16 is refused.
    Loading:  `load_state_dict` looks at every name and value before anything changes.
    """

    @property
    def shared(self) -> GraphContext | None:
        """The context of the modules below; None for an empty list."""
        return next((part.context for part in self.modules() if isinstance(part, ArbModule)), None)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze every weight and table below, or let them move again, except those that were built frozen."""
        for part in self.modules():
            if isinstance(part, ArbModule):
                part.frozen = part.built_frozen or not requires_grad
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors below as torch does, and change the dtype of activations if `fn` changes the dtype of floats."""
        context = self.shared
        if context is None or context.moving:
            return super()._apply(fn, recurse)
        dtype = context.dtype_under(fn)
        if dtype is not context.dtype:
            self.change_dtype(dtype)
        context.moving = True
        try:
            return super()._apply(fn, recurse)
        finally:
            context.moving = False

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Refuse another dtype of activations, because a part has the dtype of the whole model."""
        raise TypeError(
            f"a {type(self).__name__} cannot become {dtype}, but must have the dtype of activations of the whole model: "
            "change it there, or give it when the model is built"
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load tensors by name, as torch does, after all of them were checked.

        Raises:
            RuntimeError: `strict`, and a name is missing or unknown.
            TypeError or ValueError: a tensor of another dtype or shape, or with an element that no model holds; or a part that
                learned by other rules (`changed_rules`).
        """
        if strict:
            names = self.state_dict().keys()
            for name in (*names, *state_dict):
                # `check_tensors` says more of a missing rule.
                if name not in state_dict and not name.endswith(RULES_ENTRY):
                    raise RuntimeError(
                        f"state_dict has no {name!r}, but must name every tensor of the module"
                    )
                if name not in names:
                    raise RuntimeError(f"state_dict has {name!r}, but the module has no tensor of that name")
        for name, part in self.named_modules():
            if isinstance(part, ArbModule):
                part.check_tensors(state_dict, f"{name}." if name else "", assign=assign)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class PartList(Part, nn.ModuleList):
    """A list of modules of the graph."""


class PartDict(Part, nn.ModuleDict):
    """Modules of the graph by name."""


def as_it_is(method: Method) -> Method:
    """Return a method of an `ArbModule` that computes the same under torch.autocast and torch.compile as without them.

    torch.autocast is off inside of the method, because the model has a dtype of its own. torch.compile leaves the method alone. It
    compiles work on tensors, and would lose the notes that passes leave. The model's kernels are compiled by Triton anyway. Layers
    that stand in graphs as registered ops are the exception (`ArbModule.in_graphs`).
    """

    def run(self: ArbModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.context.own_dtype():
            return method(self, *args, **kwargs)

    @functools.wraps(method)
    def outer(self: ArbModule, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return run(self, args, kwargs)
        return method(self, *args, **kwargs) if self.in_graphs else outside(run, self, args, kwargs)

    return cast(Method, outer)


class ArbModule(Part):
    """A module of the graph.

    Attributes:
        context:   the context that the modules of one model share.
        frozen:    whether the module is frozen: a frozen weight never votes, and a frozen table never changes.
        spread:    how the rows of its weight and tables are spread over ranks, of which this rank has its own; None for all rows.
        in_graphs: whether a call becomes part of a graph of torch.compile: the op of its rule, whatever autocast says.
    """

    spread: Spread | None = None
    in_graphs = False

    def __init__(self, context: GraphContext, *, frozen: bool = False) -> None:
        super().__init__()
        self.context = context
        self.built_frozen = self.frozen = frozen

    @as_it_is
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of `forward`."""
        return super().__call__(*args, **kwargs)

    @property
    def ops(self) -> ModuleType:
        """The op set of the model."""
        return self.context.ops

    @property
    def config(self) -> ArbConfig:
        """The configuration of the model."""
        return self.context.config

    @property
    def voting(self) -> Voting:
        """The voting of the model."""
        return self.context.voting

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.context.dtype

    @property
    def seed(self) -> int:
        """The seed of the starting weights and of the dither."""
        return self.context.seed

    @property
    def moves(self) -> bool:
        """Whether a backward pass running now moves this module's weight or table."""
        return self.voting.active and not self.frozen

    def own_tensors(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Return the entries of a state dict for the buffers of this module itself, by the names of the buffers."""
        return {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}

    def check_tensors(self, state_dict: Mapping[str, Any], prefix: str, *, assign: bool) -> None:
        """Refuse entries of a state dict for this module itself, under a prefix, that do not fit. A plain module has no entries."""

    def forget(self) -> None:
        """Drop the notes that passes left for this module since the last step."""
        self.voting.forget(self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Load the tensors of this module itself. Torch calls this, also for a model inside of a user's module."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        self.check_tensors(state_dict, prefix, assign=assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.own_tensors(state_dict, prefix):
            self.note_loaded()

    def note_loaded(self) -> None:
        """Forget the notes of passes, which belong to the state before, and make ledgers stale."""
        self.forget()
        self.voting.version += 1


class TernaryModule(ArbModule):
    """A module that holds one ternary weight.

    Attributes:
        tensor_id: index of the weight in definition order.
        voted:     whether the weight voted since the last `step_weight`, as far as notes were delivered.
        uses:      how often a pass of the model uses the weight (`used`).
        steps:     how often the weight was stepped or loaded; a backward pass refuses a weight that changed since its forward pass.
        adapter:   what adds a change of low rank to the output of a linear (`adapters.attach`), or None.
        average:   the running mean of the weight's gradients (`averages`), or None.
        kept_rows: the rows whose accumulators this rank keeps, where other ranks keep others; None where this rank keeps all.
        ticket:    names the module in graphs of torch.compile (`rule.new_ticket`).
    """

    def __init__(
        self, context: GraphContext, make: Callable[[int], TernaryWeight], *, frozen: bool = False
    ) -> None:
        super().__init__(context, frozen=frozen)
        self.voted = False
        self.adapter: nn.Module | None = None
        self.average: Average | None = None
        self.uses = 1
        self.steps = 0
        self.kept_rows: range | None = None
        self.tensor_id = context.next_tensor_id()
        self._hold(self.ops.from_spec(make(self.tensor_id)))
        if self.tensor_id in context.kept_rows:
            self.leave_votes(context.kept_rows[self.tensor_id])
        # Plain values, because the compiler looks at them.
        self._shape = list(self._weight.shape)
        self._codes = next(iter(self._tensors.keys() - BESIDE_TRITS))
        self.ticket = new_ticket(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a pickle, under a ticket of its own."""
        super().__setstate__(state)
        self.ticket = new_ticket(self)

    def _hold(self, weight: LaidOutWeight) -> None:
        """Hold a weight, by its own tensors."""
        self._weight, self._tensors = weight, weight.tensors()
        for name, tensor in self._tensors.items():
            self.register_buffer(name, tensor)

    def leave_votes(self, kept: range) -> None:
        """Let other ranks keep what votes change of all rows but some, the running mean of gradients among it.

        In `weight` accumulators read as zeros from then on. `own_rows` has those of the rows that are kept. A weight whose gradient
        is led by a mean keeps all rows or none.

        Raises ValueError if the weight keeps other rows already, since accumulators that were left are nowhere here.
        """
        before = range(self.weight.shape[0]) if self.kept_rows is None else self.kept_rows
        if kept == before:
            return
        if self.kept_rows is not None:
            raise ValueError(
                f"kept is {kept}, but must be {before}, the rows whose accumulators the weight keeps"
            )
        tensors = self.weight.tensors()
        for name in VOTED_IN:
            own = tensors[name][kept.start : kept.stop].clone()
            self.register_buffer(f"own_{name}", own, persistent=False)
        self._hold(self.weight.with_tensors(**{name: without_memory(tensors[name]) for name in VOTED_IN}))
        self.kept_rows = kept
        if self.average is not None:
            self.average.leave()

    def own_rows(self) -> LaidOutWeight:
        """Return what votes and steps change on this rank: the weight, or the rows of it whose accumulators this rank keeps.

        The trits and exponents share the memory of the weight.
        """
        if not self.kept_rows:
            return self.weight
        own = {name: self.get_buffer(f"own_{name}") for name in VOTED_IN}
        return self.weight.part(self.kept_rows).with_tensors(**own)

    def voting_rows(self) -> LaidOutWeight | None:
        """Return `own_rows`, or None if the weight is frozen."""
        return None if self.frozen else self.own_rows()

    @property
    def weight(self) -> LaidOutWeight:
        """The weight, in the layout of the op set, made of the buffers that the module has now."""
        if not _same_tensors(self._tensors, self._buffers):
            buffers = {name: self.get_buffer(name) for name in self._tensors}
            self._weight, self._tensors = self._weight.with_tensors(**buffers), buffers
        return self._weight

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_weight(value)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """See `torch.nn.Module`, which calls this for each parameter that becomes an attribute. Raises TypeError for a weight."""
        if name == "weight":
            self._refuse_weight(param)
        super().register_parameter(name, param)

    def _refuse_weight(self, value: object) -> None:
        raise TypeError(
            f"weight is given as a {type(value).__name__}, but a {type(self).__name__} keeps the weight that it was made with: "
            "`load_state_dict` copies values, and no two layers share a weight"
        )

    def extra_repr(self) -> str:
        """Return the rows and the columns of the weight, as `print` shows them."""
        num_rows, num_columns = self._shape
        return f"{num_rows} x {num_columns}"

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.get_buffer(next(iter(self._tensors))).device

    def anchor(self) -> Tensor | None:
        """Return an empty tensor that makes autograd visit this module although its input is detached or integer."""
        if self.frozen or not torch.is_grad_enabled():
            return None
        return torch.empty(0, device=self.device, requires_grad=True)

    def run(self, rule: Rule, *inputs: Tensor) -> Tensor:
        """Return the result of a rule for some inputs and this module's weight, whose backward pass votes.

        In a graph of torch.compile it is one op, if the rule has one there. Otherwise it runs outside of graphs.
        """
        if not torch.compiler.is_compiling():
            return _apply(rule, self, inputs)
        if rule.in_graph is None:
            return outside(_apply, rule, self, inputs)
        # An adapter learns although the weight is frozen, and its gradients say that the model was reached.
        anchor = None if self.frozen and self.adapter is None else ANCHOR
        codes, exponents = self.get_buffer(self._codes), self.get_buffer("exponents")
        return rule.in_graph(*inputs, anchor, self.ticket, codes, exponents, self._shape, self.dtype)

    def adapted(self, y: Tensor, *inputs: Tensor) -> Tensor:
        """Return the output y for some inputs, with the change of the adapter if there is one.

        A backward pass that comes through the adapter has reached the model, also where it comes to no weight.
        """
        if self.adapter is None:
            return y
        x, *experts = inputs
        changed: Tensor = self.adapter(x, y, *experts)
        # In a graph the op of the rule says it.
        if changed.requires_grad and not torch.compiler.is_compiling():
            changed.register_hook(self._note_reached)
        return changed

    def _note_reached(self, grad: Tensor) -> None:
        if self.voting.current is not None:
            self.voting.current.reached = True

    def forward_weight(self, ctx: Any) -> LaidOutWeight:
        """Return the weight for the forward pass of a function, and let `ctx` hold it until the backward pass."""
        weight = self.weight
        ctx.module, ctx.weight, ctx.steps = self, weight, self.steps
        return weight

    def backward_weight(self, ctx: Any) -> LaidOutWeight:
        """Return the weight of the forward pass to its backward pass.

        Raises:
            RuntimeError: the weight was stepped or loaded since the forward pass, or the module holds another weight by now.
        """
        if ctx.steps != self.steps:
            raise RuntimeError("weight was changed between forward and backward, but a step must follow both")
        self.arrive(ctx.weight)
        weight: LaidOutWeight = ctx.weight
        return weight

    def arrive(self, weight: LaidOutWeight) -> None:
        """Note that a backward pass came to the module, whose forward pass used `weight`.

        Raises:
            RuntimeError: the module moves, and holds another weight by now; or it belongs to no model (`Voting.stray`).
        """
        if self.voting.current is None:
            if not self.frozen:
                self.voting.stray()
            return
        self.voting.current.reached = True
        if self.moves and not _same_tensors(weight.tensors(), self.weight.tensors()):
            raise RuntimeError(
                "the loss was computed with another state than the module holds, but votes must go to the weights that it was "
                "computed with"
            )

    def weight_worth(self, codes: Tensor, exponents: Tensor) -> LaidOutWeight:
        """Return the weight whose value lies in some tensors: the module's own if they are its own, as in most graphs."""
        weight, buffers = self.weight, self._buffers
        if _same_memory(buffers[self._codes], codes) and _same_memory(buffers["exponents"], exponents):
            return weight
        return weight.with_tensors(**{self._codes: codes, "exponents": exponents})

    def vote(
        self,
        grad_NK: Tensor,
        rows: Tensor | None = None,
        *,
        num_matrices: int = 0,
        chosen: bool = False,
        part: int = 0,
    ) -> None:
        """Count the votes of a gradient of the weight, or of its `rows`.

        The arguments are the fields of a `Gradient`.
        """
        first_row = self.kept_rows.start if self.kept_rows else 0
        if self.spread is not None:
            first_row = self.spread.rows.start
        self.voting.cast(
            Voter(
                self.own_rows(),
                self.tensor_id,
                self.voting_rows,
                uses=self.uses,
                average=self.average,
                first_row=first_row,
                voted=self.note_vote,
            ),
            Gradient(grad_NK, rows, num_matrices, chosen, part),
        )

    def note_vote(self, rows: Tensor | None) -> None:
        """Remember that the weight, or its `rows`, voted."""
        self.voted = True

    def step_weight(self) -> None:
        """Apply the step rule to the weight, if it voted since the last step and is not frozen."""
        self.voting.deliver()
        if self.voted and not self.frozen:
            self.apply_step(rows=None)
        self.forget_votes()

    @property
    def steps_whole(self) -> bool:
        """Whether the next step moves all rows of the weight, as far as notes were delivered."""
        return self.voted and not self.frozen

    def note_step(self) -> None:
        """Note a step that moved the weight without `step_weight`, as a replay of a recorded step does."""
        if self.voted and not self.frozen:
            self.changed()
        self.forget_votes()

    def forget_votes(self) -> None:
        """Forget that the weight voted."""
        self.voted = False

    def apply_step(self, *, rows: Tensor | None) -> None:
        """Apply the step rule to the weight, or to its unique `rows` (-1: unused slot)."""
        rule, weight = self.config, self.own_rows()
        self.ops.apply_step(
            weight,
            theta=rule.theta,
            theta_e=rule.theta_e,
            on_flip=rule.on_flip,
            rows=rows,
            out=weight,
        )
        self.changed()

    def changed(self) -> None:
        """Note that the weight changed, for backward passes and ledgers that began with the old weight."""
        self.steps += 1
        self.voting.version += 1

    def load(self, weight: TernaryWeight) -> None:
        """Overwrite the weight, in place, with a weight in canonical form, and forget the votes of an earlier state.

        Raises TypeError or ValueError for another shape or format, or a value out of range, before anything changes.
        """
        check_loadable("weight", weight, self.weight)
        self.overwrite(weight)

    def overwrite(self, weight: TernaryWeight) -> None:
        """Do as `load` with a weight that was checked."""
        for name, tensor in self.ops.from_spec(weight.to(self.device)).tensors().items():
            overwrite(self.get_buffer(name), tensor)
            if self.kept_rows is not None and name in VOTED_IN:
                kept = self.kept_rows
                self.get_buffer(f"own_{name}").copy_(tensor[kept.start : kept.stop])
        self.note_loaded()

    def forget(self) -> None:
        """Drop the notes that passes left for this module since the last step, and forget that its weight voted."""
        super().forget()
        self.forget_votes()

    def note_loaded(self) -> None:
        """Forget the notes of passes, and let no backward pass vote whose forward pass used the earlier weight."""
        super().note_loaded()
        self.changed()

    def check_tensors(self, state_dict: Mapping[str, Any], prefix: str, *, assign: bool) -> None:
        """Refuse tensors that do not fit the weight, hold values that no weight holds, or do not make a weight together."""
        super().check_tensors(state_dict, prefix, assign=assign)
        own = self.own_tensors(state_dict, prefix)
        given = {name: value for name, value in own.items() if name in self._tensors}
        if given and self.kept_rows is not None:
            raise ValueError(
                f"state_dict has {prefix + next(iter(given))!r}, but must have no tensor of a weight of which other ranks keep "
                "accumulators: load_state loads the part of this rank"
            )
        for name, value in given.items():
            checks.tensor(prefix + name, value, self._tensors[name].dtype, self._tensors[name].shape)
            self.weight.check_values(prefix, name, value)
        if assign:
            self.weight.with_tensors(**given)


def check_loadable(name: str, weight: TernaryWeight, current: LaidOutWeight) -> None:
    """Refuse a weight that does not fit the current one of that name, or holds values out of range."""
    if not isinstance(weight, TernaryWeight):
        raise TypeError(f"{name} is a {type(weight).__name__}, but must be a TernaryWeight")
    for field in ("shape", "group_size", "mantissa_bits"):
        if getattr(weight, field) != getattr(current, field):
            raise ValueError(
                f"{name} has {field} {getattr(weight, field)}, but must have {getattr(current, field)}"
            )
    for part, tensor in weight.tensors().items():
        weight.check_values(f"{name}.", part, tensor)


def _same_tensors(some: Mapping[str, Tensor], others: Mapping[str, Tensor | None]) -> bool:
    """Return whether the second mapping holds the very tensors of the first under their names."""
    return all(others[name] is tensor for name, tensor in some.items())


def _same_memory(one: Tensor | None, other: Tensor) -> bool:
    """Return whether two tensors of one shape lie at one place. A graph may hand an op another tensor object."""
    if one is None:
        return False
    return one is other or (one.device == other.device and one.data_ptr() == other.data_ptr())


def used(module: nn.Module, times: int) -> None:
    """Set how many times a pass of the model uses every weight of `module`. See `Voting.cast` for how such a weight votes."""
    for part in module.modules():
        if isinstance(part, TernaryModule):
            part.uses = times


def _apply(rule: Rule, module: TernaryModule, inputs: Iterable[Tensor]) -> Tensor:
    result: Tensor = RuleFunction.apply(rule, module, module.anchor(), *inputs)
    return result
