"""Modules that keep integers beside their weights, and count what passes saw once a pass has voted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.module import ArbModule
from arbitor.reference.graph.uncompiled import uncompiled
from arbitor.reference.promises import differentiable_once


class TableModule(ArbModule):
    """A module that keeps integers beside its weights: counters of use, neighbours, strengths.

    `when_voting` hands over what a forward pass saw, once a backward pass through it is accepted. The table keeps it until
    `step_tables` counts it. A forward pass without a backward pass, or with a refused loss, leaves no trace.

    Attributes:
        recorded: what accepted backward passes saw, delivered and not yet counted.
        of_votes: whether the tables belong to the votes of a weight, and go where they go.
    """

    of_votes = False

    def __init__(self, context: GraphContext, *, frozen: bool = False) -> None:
        super().__init__(context, frozen=frozen)
        self.recorded: list[tuple[Tensor, ...]] = []
        self._ranges: dict[str, tuple[int, int]] = {}

    def add_table(self, name: str, tensor: Tensor, low: int, high: int) -> None:
        """Register integers from `low` to `high` under a name. They move with the module and are saved with the model.

        A state that is loaded must keep to the range, because ops index with some tables and trust them all.
        """
        self.register_buffer(name, tensor)
        self._ranges[name] = (low, high)

    def tables(self) -> dict[str, Tensor]:
        """Return the integer tensors by name."""
        return {name: self.get_buffer(name) for name in self._ranges}

    def table_ranges(self) -> dict[str, tuple[int, int]]:
        """Return the least and the largest element that each table may hold, by name."""
        return dict(self._ranges)

    def record(self, *seen: Tensor) -> None:
        """Keep what the forward pass of a backward pass saw, until the step that counts it."""
        self.recorded.append(seen)

    def step_tables(self) -> None:
        """Count what passes recorded since the last step, in place, and forget it. A frozen module only forgets."""
        count_recorded([self])

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        """Change the tables by what one or more passes saw. A table that counts nothing stays as it is."""

    def forget(self) -> None:
        """Drop the notes and the records that passes left for this module since the last step."""
        super().forget()
        self.recorded.clear()

    def check_tensors(self, state_dict: Mapping[str, Any], prefix: str, *, assign: bool) -> None:
        """Refuse a table of another dtype or shape, or with an element out of its range."""
        super().check_tensors(state_dict, prefix, assign=assign)
        for name, value in self.own_tensors(state_dict, prefix).items():
            if name in self._ranges:
                table = self.get_buffer(name)
                checks.tensor(prefix + name, value, table.dtype, table.shape)
                checks.values_between(prefix + name, value, *self._ranges[name])


def count_recorded(modules: Sequence[TableModule]) -> None:
    """Count what passes recorded for modules of a model since the last step, in place, and forget it. A frozen module only forgets.

    What the passes of all ranks saw is counted, in the order of the ranks' numbers.
    """
    if not modules:
        return
    voting = modules[0].voting
    voting.deliver()
    recorded = {module: module.recorded for module in modules if module.recorded and not module.frozen}
    for module in modules:
        module.recorded = []
    everyone = voting.ranks.everyone(
        [seen for passes in recorded.values() for each in passes for seen in each]
    )
    for module, passes in recorded.items():
        module.count_passes([tuple(next(everyone) for _ in each) for each in passes])
        voting.version += 1


def when_voting(x: Tensor, table: TableModule, *seen: Tensor) -> Tensor:
    """Return x, such that a backward pass that votes and comes through x leaves `seen`, detached, for `table` to record."""
    return uncompiled(_pass_through, x, table, seen)


def _pass_through(x: Tensor, table: TableModule, seen: Iterable[Tensor]) -> Tensor:
    return _WhenVoting.apply(x, table, *seen)


class _WhenVoting(torch.autograd.Function):
    """The identity, with a backward pass that leaves a note of what its forward pass saw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: TableModule, *seen: Tensor) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(*seen)
        return x.view_as(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, seen = ctx.table, ctx.saved_tensors
        if table.moves:
            table.voting.note(table.record, *seen)
        return grad, None, *(None for _ in seen)
