"""What a model holds, and how it is stepped, saved and loaded: every weight and integer table below it, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from arbitor.reference import checks
from arbitor.reference.constants import ACCUM_MAX, MAX_PACKED_BYTE, level_range
from arbitor.reference.graph.parts import row_parts
from arbitor.reference.graph.state import TableModule, TernaryModule, Voting
from arbitor.reference.types import LaidOutWeight, TernaryWeight

BESIDE_TRITS = ("exponents", "trit_accum", "exponent_accum")
"""The tensors of a weight that every layout has; what is left of a weight are its trits."""


class Stateful(nn.Module):
    """A module whose submodules hold ternary weights and integer tables.

    Attributes:
        ops:    op set of all weights below.
        voting: theirs, too.
    """

    ops: ModuleType
    voting: Voting

    def step(self) -> None:
        """Apply the step rule to every weight, or row of a table, that voted since the last step; then count tables."""
        for module in self.ternary_modules().values():
            module.step_weight()
        for keeper in self.table_modules().values():
            keeper.step_tables()
        self.voting.version += 1

    def ternary_modules(self) -> dict[str, TernaryModule]:
        """Return the modules that hold a weight by name, in definition order: the order of their tensor ids."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryModule)}

    def table_modules(self) -> dict[str, TableModule]:
        """Return the modules that keep integer tables by name, in definition order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TableModule)}

    def tables(self) -> dict[str, Tensor]:
        """Return every integer table by name. They are the model's own tensors, not copies."""
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
        """Return all that training changes: the weights in canonical form, and the integer tables."""
        return {**self.weights(), **self.tables()}

    def load_state(self, state: Mapping[str, TernaryWeight | Tensor]) -> None:
        """Overwrite weights and tables, in place; nothing changes unless all of them fit.

        Raises TypeError or ValueError for a missing or unknown name, another shape or format, or a value out of range.
        """
        tables, ranges = self.tables(), self.table_ranges()
        given = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for name, table in tables.items():
            if name not in given:
                raise ValueError(f"state has no {name!r}, but must name every table of the model")
            checks.tensor(name, given[name], table.dtype, table.shape)
            checks.values_between(name, given[name], *ranges[name])
        for name in given.keys() - tables.keys():
            raise ValueError(f"state has {name!r}, but the model has no table of that name")
        self.load_weights({name: value for name, value in state.items() if isinstance(value, TernaryWeight)})
        for name, table in tables.items():
            table.copy_(given[name])
        for keeper in self.table_modules().values():
            keeper.forget()
        self.voting.version += 1

    def weights(self) -> dict[str, TernaryWeight]:
        """Return every weight by name in canonical form, in definition order. May share memory with the model."""
        return {name: self.ops.to_spec(module.weight) for name, module in self.ternary_modules().items()}

    def load_weights(self, weights: dict[str, TernaryWeight]) -> None:
        """Overwrite every weight, in place; nothing changes unless all of them fit.

        Raises ValueError for a missing or unknown name, another shape or format, or a value out of range.
        """
        modules = self.ternary_modules()
        for name in (*modules, *weights):
            if name not in weights:
                raise ValueError(f"weights has no {name!r}, but must name every weight of the model")
            if name not in modules:
                raise ValueError(f"weights has {name!r}, but the model has no weight of that name")
        for name, module in modules.items():
            _check_loadable(name, weights[name], module.weight)
        for name, module in modules.items():
            module.load(weights[name])

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
            pairs = zip(row_parts(after.with_tensors(**trits)), row_parts(after), strict=True)
            changed[name] = torch.stack([self.ops.count_changed_trits(*pair) for pair in pairs]).sum()
        return changed

    def flip_rate(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> float:
        """Return the share of trits that differ from those of `snapshot_trits`, among the weights that can vote."""
        changed, modules = self.changed_trits(snapshot), self.ternary_modules()
        total = sum(math.prod(modules[name].weight.shape) for name in changed)
        return float(torch.stack(list(changed.values())).sum()) / total


def _check_loadable(name: str, weight: TernaryWeight, current: LaidOutWeight) -> None:
    """Refuse a weight that does not fit the current one of that name, or holds values out of range."""
    if not isinstance(weight, TernaryWeight):
        raise TypeError(f"{name} is a {type(weight).__name__}, but must be a TernaryWeight")
    for field in ("shape", "group_size", "mantissa_bits"):
        if getattr(weight, field) != getattr(current, field):
            raise ValueError(
                f"{name} has {field} {getattr(weight, field)}, but must have {getattr(current, field)}"
            )
    checks.values_between(f"{name}.packed", weight.packed, 0, MAX_PACKED_BYTE)
    checks.values_between(f"{name}.exponents", weight.exponents, *level_range(weight.mantissa_bits))
    checks.values_between(f"{name}.trit_accum", weight.trit_accum, -ACCUM_MAX, ACCUM_MAX)
    checks.values_between(f"{name}.exponent_accum", weight.exponent_accum, -ACCUM_MAX, ACCUM_MAX)
