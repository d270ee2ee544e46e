"""What must be refused, one line a case: the call, the exception, and the argument that its sentence names.

Every implementation raises the same exception for the same reason, and has written nothing when it does. The file of a family
ends with `test_refusals_of_<family> = refusals("<family>", refused(...), ..., rejects=[...])`, which is a law like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.types import TernaryWeight

from .law import Law, filed
from .mutant import Mutant
from .report import skip
from .subject import Subject

CLOCK: dict[str, Any] = {"seed": 1, "step": 2, "tensor_id": 3}
I8, F16, F32 = torch.int8, torch.float16, torch.float32

REFUSALS: list[Refusal] = []
"""Every call that must be refused, as far as the files of families are imported (families.py imports all)."""

REFUSES_NOTHING: dict[str, str] = {}
"""Ops that accept every call of their types, each with the reason."""


@dataclass(frozen=True)
class Refusal:
    """A call that must raise: `says` is the argument that the message must name."""

    op: str
    why: str
    error: type[Exception]
    says: str
    call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def refusals(name: str, *cases: Refusal, rejects: Sequence[Mutant]) -> Callable[..., None]:
    """File what a family refuses. Return the test of the refusals, which is a law.

    Args:
        name:    the name of the file without its `test_`: the family, and its part if it has several files.
        cases:   the calls.
        rejects: mutants that accept one of them.
    """
    REFUSALS.extend(cases)

    def body(ops: Subject) -> None:
        """Every bad call is refused, by the same exception everywhere, in one sentence that names the argument."""
        failures = []
        absent = {case.op for case in cases if not ops.has(case.op)}
        for case in [case for case in cases if case.op not in absent]:
            try:
                check(ops, case)
            except AssertionError as failure:
                failures.append(str(failure))
        assert not failures, "\n".join(failures)
        if absent:
            skip(f"refusals of {', '.join(sorted(absent))}", f"{ops.name} has no such op")

    return filed(Law(f"test_refusals_of_{name}", f"test_{name}", body, {}, tuple(rejects)))


def refuses_nothing(*ops: str, because: str) -> None:
    """Say that some ops refuse no call, and why. Every other op refuses some."""
    REFUSES_NOTHING.update(dict.fromkeys(ops, because))


def refused(op: str, why: str, error: type[Exception], says: str, *args: Any, **kwargs: Any) -> Refusal:
    """Return a refusal of one call. Callables among the arguments are called each time, so that calls share no memory."""
    build = lambda value: value() if callable(value) and not isinstance(value, type) else value  # noqa: E731
    return Refusal(
        op,
        why,
        error,
        says,
        lambda: (tuple(map(build, args)), {name: build(value) for name, value in kwargs.items()}),
    )


def check(ops: Subject, case: Refusal) -> None:
    """Fail unless the call raises the exception with a sentence that names the argument."""
    args, kwargs = case.call()
    error = ops.refuses(case.op, args, kwargs)
    want = f"want a {case.error.__name__} that names {case.says}"
    assert error is not None, f"{case.op} accepts {case.why}, {want}"
    assert type(error) is case.error, f"{case.op} on {case.why}: {error!r}, {want}"
    assert case.says in str(error), f"{case.op} on {case.why} does not name {case.says}: {error}"
    assert len(str(error).splitlines()) == 1, f"{case.op} on {case.why} takes more than a sentence: {error}"


def weight(num_rows: int = 3, num_columns: int = 14) -> TernaryWeight:
    """Return a small weight of ones."""
    trits = torch.ones(num_rows, num_columns, dtype=torch.int8)
    return weight_of_trits(trits, torch.zeros(num_rows, -(-num_columns // 12), dtype=torch.int8))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return a maker of a tensor on another device."""
    return lambda: torch.zeros(shape, dtype=dtype, device="meta")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return a maker of a tensor of ones."""
    return lambda: torch.ones(shape, dtype=dtype)


def ids(*values: int) -> Callable[[], Tensor]:
    """Return a maker of int64 ids."""
    return lambda: torch.tensor(values, dtype=torch.int64)


def scalar(value: float, dtype: torch.dtype = torch.int64) -> Callable[[], Tensor]:
    """Return a maker of a 0-dim tensor."""
    return lambda: torch.tensor(value, dtype=dtype)
