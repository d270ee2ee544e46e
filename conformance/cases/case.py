"""One call of an op, and the same call on other numbers: what the cases of every family are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight


@dataclass
class Case:
    """One call. `sums_exact`: floats whose sums are exact in any order, so that they are compared bit by bit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    sums_exact: bool = False

    def copy(self) -> Case:
        """Return the same call on memory of its own."""
        copies: dict[int, Any] = {}

        def copy(value: Any) -> Any:
            if isinstance(value, (Tensor, TernaryWeight)):
                return copies.setdefault(id(value), value.clone())
            return tuple(map(copy, value)) if isinstance(value, tuple) else value

        kwargs = {name: copy(value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(map(copy, self.args)), kwargs=kwargs)


def widened(op: Callable[..., Any], case: Case, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return an op on the case with its float tensors converted."""
    change = lambda v: convert(v) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return op(*map(change, case.args), **{name: change(value) for name, value in case.kwargs.items()})


def absolute(weight: TernaryWeight) -> TernaryWeight:
    """Return a weight with the absolute values of its trits."""
    absolute_trits = trits_of(weight).abs()
    return weight_of_trits(
        absolute_trits, weight.exponents, weight.group_size, mantissa_bits=weight.mantissa_bits
    )


def magnitude_of(op: Callable[..., Any], case: Case) -> Any:
    """Return the sum of the absolute terms of an op that multiplies and adds: the op on absolute values."""
    change = lambda v: absolute(v) if isinstance(v, TernaryWeight) else v  # noqa: E731
    positive = Case(
        tuple(map(change, case.args)), {name: change(value) for name, value in case.kwargs.items()}
    )
    return widened(op, positive, lambda value: value.to(torch.float64).abs())
