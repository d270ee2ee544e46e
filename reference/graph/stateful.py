"""The state of a model, every weight and integer table below it by name: how it votes, is stepped, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import BESIDE_TRITS
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.module import ArbModule, TernaryModule, check_loadable
from arbitor.reference.graph.parts import looked_at
from arbitor.reference.graph.tables import TableModule, count_recorded
from arbitor.reference.graph.uncompiled import out_of_graphs
from arbitor.reference.types import TernaryWeight, overwrite


class Stateful(ArbModule):
    """A whole model. Its submodules hold ternary weights and integer tables, and share a context that no other model has."""

    def __init__(self, context: GraphContext, *, frozen: bool = False) -> None:
        super().__init__(context, frozen=frozen)
        self.voting.whole = True

    @out_of_graphs
    def backward(
        self,
        loss: Tensor,
        *,
        rate: float | Tensor,
        step: int | Tensor,
        accum: int = 1,
        undo: bool = True,
    ) -> bool:
        """Run the backward pass of one micro-batch: ternary weights vote, and float parameters get gradients as always.

        Args:
            loss: a scalar computed with this model.
            rate: size of the votes, 0 .. 127, a number or a 0-dim float32 tensor; about 6 while training is under way, falling to 0
                towards its end.
            step: number of this micro-batch, a coordinate of the dither; a number or a 0-dim int64 tensor.
            accum: how many micro-batches the next step has, the same for each of them. The gradients of several are summed, and the
                sums vote once with that step, at `rate`. At 1 the weights vote in this pass.
            undo: whether a pass that raises leaves every byte as it was, for which the pass keeps copies (`Voting.taking`).

        Returns:
            True; or False if the loss is not finite. Then every byte stays as it was.

        Raises:
            TypeError or ValueError: a loss that is no scalar tensor, has no graph, or was not computed with this model; a rate,
                step or accum that is not allowed; another accum than in the passes since the last step, or a pass too many.
            RuntimeError: a weight was stepped or loaded since the loss was computed; gradients came by `loss.backward()` before;
                the model is torn (`Voting`); or it is a model of `arbitor` in one process of several, whose votes nobody exchanges.
        """
        self.voting.check_whole()
        self.voting.check_answered()
        # A module of the user's that holds the layers may have been moved by itself.
        self._follow_weights()
        ranks = self.voting.ranks
        loss = ranks.part(scalar("loss", loss))
        if not loss.requires_grad:
            raise ValueError(
                "loss has no graph, but must be computed with this model while gradients are on, and come through a weight that "
                "is not frozen or has an adapter"
            )
        value = float(ranks.total(loss.detach()))
        if not math.isfinite(value):
            return False
        size = self.vote_size(value)
        with self.voting.taking(rate=rate, step=step, size=size, accum=accum, undo=undo) as taken:
            loss.backward()
            if not taken.reached and self._can_be_reached:
                raise ValueError(
                    "loss was not computed with this model: its gradient came to none of the model's weights"
                )
        return True

    @property
    def _can_be_reached(self) -> bool:
        """Whether a gradient can come to a weight. Below float layers that learn, all ternary ones may be frozen."""
        return any(
            not module.frozen or module.adapter is not None for module in self.ternary_modules().values()
        )

    def vote_size(self, loss: float) -> int:
        """Return the size of the votes of a pass whose loss is finite; 1 where the rate gives votes their size."""
        return 1

    @out_of_graphs
    def step(self) -> None:
        """Apply the step rule to all weights that voted since the last step, as the notes of passes say, then count tables.

        The sums of gradients over several micro-batches vote first.
        A step without votes changes nothing, for example after micro-batches that were all refused.

        Raises:
            RuntimeError: gradients came through the weights outside of a pass, and so did not vote; or a pass or a step that
                raised left the model torn.
        """
        with self.stepping():
            self.step_weights()
            self.step_tables()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Refuse a step as `step` does, let sums vote, and mark the model torn until the step inside of this context is done."""
        self.voting.check_whole()
        self.voting.check_answered()
        # As before a pass.
        self._follow_weights()
        self.voting.vote_sums()
        # The mark holds until the step is done, because a step that raises has moved some weights and not others.
        self.voting.torn = True
        try:
            yield
            self.voting.ranks.finish()
        except BaseException:
            self.voting.ranks.abandon()
            raise
        self.voting.torn = False

    def drop_gradients(self) -> None:
        """Go on without gradients that came through the weights by `loss.backward()`: they did not vote, and never will.

        Votes of `backward` stay, and wait for `step`. Gradients of float parameters are dropped by their optimizer.
        """
        self.voting.strayed = False

    @property
    def faulty_rows(self) -> int:
        """Rows of gradients so far that were not finite and cast no votes, though the loss was finite; 0 in a sound training."""
        return int(self.voting.faults)

    def step_weights(self, apply: Callable[[Sequence[int]], None] | None = None) -> None:
        """Apply the step rule to all weights that voted. It is the first half of a step, inside of `stepping`.

        Args:
            apply: what steps the weights of some tensor ids in place of `step_some`.
        """
        # Each step would deliver all notes, and steps may run side by side.
        self.voting.deliver()
        modules, ranks = self.ternary_modules().values(), self.voting.ranks
        due = {module.tensor_id: module.weight for module in modules if module.voted and not module.frozen}
        ranks.step(due, apply or self.step_some)
        for module in modules:
            module.note_step()

    def step_some(self, tensor_ids: Sequence[int]) -> None:
        """Apply the step rule to the weights of some tensor ids, which voted and are not frozen, as far as notes were delivered."""
        asked = set(tensor_ids)
        modules = [module for module in self.ternary_modules().values() if module.tensor_id in asked]
        whole = [module for module in modules if module.steps_whole]
        pieces = [module.step_weight for module in modules if not module.steps_whole]
        self.voting.apart([partial(self._step_together, whole), *pieces] if whole else pieces)

    def _step_together(self, modules: Sequence[TernaryModule]) -> None:
        """Apply the step rule to all rows of the weights of some modules, which voted."""
        rule, weights = self.config, tuple(module.own_rows() for module in modules)
        self.ops.apply_steps(
            weights, theta=rule.theta, theta_e=rule.theta_e, on_flip=rule.on_flip, out=weights
        )
        for module in modules:
            module.note_step()

    def step_tables(self) -> None:
        """Count what passes recorded for tables. It is the second half of a step, inside of `stepping`."""
        count_recorded(list(self.table_modules().values()))

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Let activations be of another dtype from now on; refuse one that is not allowed."""
        self.context.change_dtype(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the model as torch does, and the count of faults and the notes with it."""
        super()._apply(fn, recurse)
        self.voting.move(fn)
        self.context.device = self.voting.faults.device
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """See `Part`. With `assign` the model moves to the device of the tensors."""
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._follow_weights()
        if strict:
            self._is_whole()
        return found

    def _follow_weights(self) -> None:
        """Move the state that belongs to no module to the device of the weights."""
        device = next((module.device for module in self.modules() if isinstance(module, TernaryModule)), None)
        if device is not None and device != self.voting.faults.device:
            self.voting.move(
                lambda tensor: (
                    torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                )
            )
            self.context.device = device

    def _is_whole(self) -> None:
        """Note that all of the state was loaded, so that no vote is missing or left over."""
        self.voting.torn = self.voting.strayed = False

    def ternary_modules(self) -> dict[str, TernaryModule]:
        """Return the modules that hold a weight by name, in definition order: the order of their tensor ids."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryModule)}

    def table_modules(self) -> dict[str, TableModule]:
        """Return the modules that keep integer tables by name, in definition order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TableModule)}

    def tables(self) -> dict[str, Tensor]:
        """Return every integer table by name. The tensors are the model's own, not copies."""
        return {
            f"{name}.{table}": tensor
            for name, module in self.table_modules().items()
            for table, tensor in module.tables().items()
        }

    def table_ranges(self) -> dict[str, tuple[int, int]]:
        """Return the least and the largest element that each integer table may hold, by name."""
        return {
            f"{name}.{table}": bounds
            for name, module in self.table_modules().items()
            for table, bounds in module.table_ranges().items()
        }

    def state(self) -> dict[str, TernaryWeight | Tensor]:
        """Return all that training changes: the weights in canonical form, and the integer tables.

        Tensors may share memory with the model, as those of `state_dict` do. A deep copy stays as the model is now.
        """
        return {**self.weights(), **self.tables()}

    def load_state(self, state: Mapping[str, TernaryWeight | Tensor]) -> None:
        """Overwrite weights and tables, in place. Nothing changes unless all of them fit.

        Raises TypeError or ValueError for a missing or unknown name, another shape or format, or a value out of range.
        """
        tables, ranges, modules = self.tables(), self.table_ranges(), self.ternary_modules()
        state = self._own_parts(state)
        for name in state:
            if name not in tables and name not in modules:
                raise ValueError(f"state has {name!r}, but the model has no weight or table of that name")
        for name, table in tables.items():
            if name not in state:
                raise ValueError(f"state has no {name!r}, but must name every table of the model")
            given = checks.is_tensor(name, state[name])
            checks.tensor(name, given, table.dtype, table.shape)
            checks.values_between(name, given, *ranges[name])
        self.load_weights(cast(Any, {name: value for name, value in state.items() if name in modules}))
        for name, table in tables.items():
            overwrite(table, cast(Tensor, state[name]))
        for keeper in self.table_modules().values():
            keeper.note_loaded()

    def _own_parts(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state, or the weights of one, with the rows that this rank keeps in the place of whole spread tables."""
        spreads = {name: part.spread for name, part in self.named_modules() if isinstance(part, ArbModule)}
        found = dict(state)
        for name, value in state.items():
            spread = spreads.get(name) or spreads.get(name.rpartition(".")[0])
            if spread is None or not value.shape or value.shape[0] != spread.num_rows:
                continue
            rows = spread.rows
            found[name] = value[rows.start : rows.stop] if isinstance(value, Tensor) else spread.part(value)
        return found

    def weights(self) -> dict[str, TernaryWeight]:
        """Return every weight by name in canonical form, in definition order. The weights may share memory with the model."""
        return {name: self.ops.to_spec(module.weight) for name, module in self.ternary_modules().items()}

    def load_weights(self, weights: Mapping[str, TernaryWeight]) -> None:
        """Overwrite every weight, in place. Nothing changes unless all of them fit.

        Integer tables stay as they are: neighbours, ages of codes, strengths of memory, handicaps of experts. `load_state`
        restores a whole model, tables and weights.

        Raises TypeError or ValueError for a missing or unknown name, another shape or format, or a value out of range.
        """
        modules = self.ternary_modules()
        weights = cast(Any, self._own_parts(weights))
        for name in (*modules, *weights):
            if name not in weights:
                raise ValueError(f"weights has no {name!r}, but must name every weight of the model")
            if name not in modules:
                raise ValueError(f"weights has {name!r}, but the model has no weight of that name")
        for name, module in modules.items():
            check_loadable(name, weights[name], module.weight)
        for name, module in modules.items():
            module.overwrite(weights[name])
        self._is_whole()

    def snapshot_trits(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of the trits of every weight that can vote, as the op set keeps them, and of nothing else."""
        return {
            name: {
                part: tensor.clone()
                for part, tensor in module.weight.tensors().items()
                if part not in BESIDE_TRITS
            }
            for name, module in self.ternary_modules().items()
            if not module.frozen
        }

    def changed_trits(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return how many trits of each weight of `snapshot_trits` differ from it, int64 [] by name, counted part by part."""
        modules, changed = self.ternary_modules(), {}
        for name, trits in snapshot.items():
            after = modules[name].weight
            pairs = zip(looked_at(after.with_tensors(**trits)), looked_at(after), strict=True)
            changed[name] = torch.stack([self.ops.count_changed_trits(*pair) for pair in pairs]).sum()
        return changed

    def flip_rate(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> float:
        """Return the share of trits that differ from those of `snapshot_trits`, among the weights that can vote; 0 for none."""
        if not snapshot:
            return 0.0
        changed, modules = self.changed_trits(snapshot), self.ternary_modules()
        total = sum(math.prod(modules[name].weight.shape) for name in changed)
        return float(torch.stack(list(changed.values())).sum()) / total


def scalar(name: str, loss: Tensor) -> Tensor:
    """Return a loss of one element as a tensor without dimensions; refuse a loss of another shape."""
    checks.dtype_in(name, loss, checks.FLOAT_DTYPES)
    if loss.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(loss.shape)}, but must be a scalar")
    return loss.reshape(())
