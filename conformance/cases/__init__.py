"""For every op of the table, a strategy of calls to compare; and the one check that compares them. A file a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import OP_TABLE, NoWorse
from arbitor.reference.types import TernaryWeight
from conformance.cases import attention, codebook, core, denoise_loop, edges, experts, memory, orthogonal
from conformance.cases.case import Case, magnitude_of, widened
from conformance.compare import exact, no_worse, unsigned_zeros
from conformance.report import LEDGER
from conformance.subject import Subject

_FAMILIES = (core, codebook, edges, experts, attention, memory, denoise_loop, orthogonal)

CASES: dict[str, SearchStrategy[Case]] = {
    name: cases for family in _FAMILIES for name, cases in family.CASES.items()
}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {
    name: terms for family in _FAMILIES for name, terms in family.MAGNITUDES.items()
}
"""Sums of absolute terms of the ops that subtract."""


def compare(ops: Subject, name: str, case: Case, *, count: bool = False) -> None:
    """Fail unless an op agrees with the reference on a case, in the way that its row of the table says."""
    op, row = getattr(reference_ops, name), OP_TABLE[name]
    twin_case, wide_case = case.copy(), case.copy()
    got = ops.call(name, *case.args, **case.kwargs)
    twin = op(*twin_case.args, **twin_case.kwargs)
    if count:
        LEDGER.compared[name] += 1
    if not isinstance(row.output, NoWorse):
        exact(got, twin, name)
        if "faults" in case.kwargs:  # the other argument that is written, `out`, is what comes back
            exact(case.kwargs["faults"], twin_case.kwargs["faults"], "faults")
        return
    wide = widened(op, wide_case, lambda value: value.to(torch.float64))
    magnitude = MAGNITUDES.get(name, magnitude_of)(op, wide_case)
    if ops.device.type == "cuda":  # plain PyTorch on the device that the kernel runs on
        twin = on_device(op, twin_case, ops.device)
    outputs = zip(*map(as_tuple, (got, twin, wide, magnitude)), strict=True)
    for index, (one, plain, true, terms) in enumerate(outputs):
        what = f"{name}[{index}]" if isinstance(got, tuple) else name
        if not plain.is_floating_point():
            exact(one, plain, what)
        elif case.sums_exact:
            exact(unsigned_zeros(one), unsigned_zeros(true.to(plain.dtype)), what)
        else:
            # A factor of the op itself may be negative, as no input is by now.
            no_worse(one, twin=plain, wide=true, magnitude=terms.abs(), k=row.output.k, what=what)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a value as a tuple of outputs."""
    return value if isinstance(value, tuple) else (value,)


def on_device(op: Callable[..., Any], case: Case, device: torch.device) -> Any:
    """Return an op run by plain PyTorch on a device, its results on the CPU."""
    change = lambda v: v.to(device) if isinstance(v, (Tensor, TernaryWeight)) else v  # noqa: E731
    result = op(*map(change, case.args), **{name: change(value) for name, value in case.kwargs.items()})
    results = tuple(value.cpu() for value in as_tuple(result))
    return results if isinstance(result, tuple) else results[0]
