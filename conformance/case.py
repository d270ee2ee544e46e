"""One call of an op. This file draws it, makes the same call on other numbers, and compares its results.

`@calls("<op>")` above a function that draws a `Case` files the function in `CASES`. A function that draws for several ops is given
the op's name. `@magnitude("<op>")` files the sum of absolute terms of an op that subtracts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import OP_TABLE, NoWorse
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import StateTensors, TernaryWeight

from .compare import exact, no_worse, same_sums
from .report import LEDGER
from .subject import Subject


@dataclass
class Case:
    """One call. `sums_exact` says that sums of its floats are exact in any order, so that results are compared bit by bit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    sums_exact: bool = False

    def copy(self) -> Case:
        """Return the same call on memory of its own."""
        return self.reformed(Tensor.clone)

    def reformed(self, form: Callable[[Tensor], Tensor]) -> Case:
        """Return the call with all tensors, also those of weights, in another form. What is one object stays one object."""
        made: dict[int, Any] = {}

        def formed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(formed, value))
            if isinstance(value, Tensor) and id(value) not in made:
                made[id(value)] = form(value)
            elif isinstance(value, StateTensors) and id(value) not in made:
                parts = {name: form(tensor) for name, tensor in value.tensors().items()}
                made[id(value)] = value.with_tensors(**parts)
            return made.get(id(value), value)

        return self.changed(formed)

    def changed(self, change: Callable[[Any], Any]) -> Case:
        """Return the call with every argument changed."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(map(change, self.args)), kwargs=kwargs)

    def of(self, op: Callable[..., Any]) -> Any:
        """Return what an op makes of the call."""
        return op(*self.args, **self.kwargs)


CASES: dict[str, SearchStrategy[Case]] = {}
"""Calls to compare by op, as far as the files of families are imported (families.py imports all)."""

MAGNITUDES: dict[str, Callable[[Callable[..., Any], Case], Any]] = {}
"""Sums of absolute terms of the ops that subtract."""


def calls(*ops: str) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """File a function that draws the calls of an op. A function with a second argument is given the op's name."""

    def decorate(draw_case: Callable[..., Case]) -> Callable[..., Case]:
        takes_op = len(inspect.signature(draw_case).parameters) > 1
        for op in ops:
            assert op not in CASES, f"the calls of {op} are drawn twice"
            CASES[op] = st.composite(draw_case)(*((op,) if takes_op else ()))
        return draw_case

    return decorate


def magnitude(
    op: str,
) -> Callable[[Callable[[Callable[..., Any], Case], Tensor]], Callable[[Callable[..., Any], Case], Tensor]]:
    """File the sum of the absolute terms of an op. `magnitude_of` serves every op that only multiplies and adds."""

    def decorate(
        terms: Callable[[Callable[..., Any], Case], Tensor],
    ) -> Callable[[Callable[..., Any], Case], Tensor]:
        assert op not in MAGNITUDES, f"the magnitude of {op} is said twice"
        MAGNITUDES[op] = terms
        return terms

    return decorate


def compare(ops: Subject, name: str, case: Case, *, count: bool = False) -> None:
    """Fail unless an op agrees with the reference on a case, in the way that its row of the table says."""
    assert name in CASES, (
        f"the file that draws the calls of {name} is not imported: import conformance.families"
    )
    op, row = getattr(reference_ops, name), OP_TABLE[name]
    twin_case, wide_case = case.copy(), case.copy()
    got = ops.call(name, *case.args, **case.kwargs)
    twin = twin_case.of(op)
    if count:
        LEDGER.compared[name] += 1
    if not isinstance(row.output, NoWorse):
        exact(got, twin, name)
        # An op writes `out` too, but returns it, so it is compared above.
        if "faults" in case.kwargs:
            exact(case.kwargs["faults"], twin_case.kwargs["faults"], "faults")
        return
    wide = widened(op, wide_case, Tensor.double)
    terms_of = MAGNITUDES.get(name, magnitude_of)
    magnitudes = terms_of(op, wide_case)
    # Plain PyTorch on the device that the kernel runs on.
    if ops.device.type == "cuda":
        twin = on_device(op, twin_case, ops.device)
    outputs = zip(*map(as_tuple, (got, twin, wide, magnitudes)), strict=True)
    for index, (one, plain, true, terms) in enumerate(outputs):
        what = f"{name}[{index}]" if isinstance(got, tuple) else name
        if not plain.is_floating_point():
            exact(one, plain, what)
        elif case.sums_exact:
            same_sums(one, true.to(plain.dtype), what)
        else:
            # A factor of the op itself may be negative, as no input is by now.
            no_worse(one, twin=plain, wide=true, magnitude=terms.abs(), k=row.output.k, what=what)


def widened(op: Callable[..., Any], case: Case, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return an op on the case with its float tensors converted."""
    return case.reformed(lambda v: convert(v) if v.is_floating_point() else v).of(op)


def absolute(weight: TernaryWeight) -> TernaryWeight:
    """Return a weight with the absolute values of its trits."""
    absolute_trits = trits_of(weight).abs()
    return weight_of_trits(
        absolute_trits, weight.exponents, weight.group_size, mantissa_bits=weight.mantissa_bits
    )


def magnitude_of(op: Callable[..., Any], case: Case) -> Any:
    """Return the sum of the absolute terms of an op that multiplies and adds, which is the op on absolute values."""
    positive = case.changed(lambda value: absolute(value) if isinstance(value, TernaryWeight) else value)
    return widened(op, positive, lambda value: value.double().abs())


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a value as a tuple of outputs."""
    return value if isinstance(value, tuple) else (value,)


def on_device(op: Callable[..., Any], case: Case, device: torch.device) -> Any:
    """Return an op run by plain PyTorch on a device, its results on the CPU."""
    result = case.reformed(lambda value: value.to(device)).of(op)
    results = tuple(value.cpu() for value in as_tuple(result))
    return results if isinstance(result, tuple) else results[0]
