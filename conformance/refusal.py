"""What must be refused, one line a case: the call, the exception, and the argument that its sentence names.

Every implementation raises the same exception for the same reason, and has written nothing when it does. The file of a family
ends with `test_refusals_of_<family> = refusals("<family>", refused(...), ..., rejects=[...])`, which is a law like any other.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
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
    """A call that must raise: `says` is the argument that the message must name, or two such joined by " or "."""

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
        absent = {case.op for case in cases if not ops.has(case.op)}
        faults = [fault(ops, case) for case in cases if case.op not in absent]
        if any(faults):
            raise AssertionError("\n".join(sentence for sentence in faults if sentence))
        if absent:
            skip(f"refusals of {', '.join(sorted(absent))}", f"{ops.name} has no such op")

    return filed(Law(f"test_refusals_of_{name}", f"test_{name}", body, {}, tuple(rejects)))


def refuses_nothing(*ops: str, because: str) -> None:
    """Say that some ops refuse no call, and why. Every other op refuses some."""
    REFUSES_NOTHING.update(dict.fromkeys(ops, because))


def refused(op: str, why: str, error: type[Exception], says: str, *args: Any, **kwargs: Any) -> Refusal:
    """Return a refusal of one call. Callables among the arguments are called each time, so that calls share no memory."""

    def build(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(build, value))
        return value() if callable(value) and not isinstance(value, type) else value

    return Refusal(
        op,
        why,
        error,
        says,
        lambda: (tuple(map(build, args)), {name: build(value) for name, value in kwargs.items()}),
    )


def fault(ops: Subject, case: Refusal) -> str:
    """Return what is wrong with the answer to a call, or "" where the exception is right and its sentence names an argument."""
    args, kwargs = case.call()
    call = f"{case.op} on {case.why} ({_in_words(args, kwargs)})"
    names = names_of(case)
    want = f"want a {case.error.__name__} that names {' or '.join(names)}"
    try:
        error = ops.refuses(case.op, args, kwargs)
    except AssertionError as failure:
        return f"{call}: {str(failure).splitlines()[0]}"
    if error is None:
        return f"{call}: nothing is raised, {want}"
    if type(error) is not case.error:
        return f"{call}: {error!r}, {want}"
    if not any(_names(str(error), name) for name in names):
        return f"{call}: the sentence names another argument, {want}: {error}"
    if len(str(error).splitlines()) != 1:
        return f"{call}: the message takes more than a sentence: {error}"
    return ""


def names_of(case: Refusal) -> list[str]:
    """Return the arguments that a sentence may name. Where two arguments do not fit each other, either will do.

    The sentence of the reference says which other argument there is: "up has shape [3], but must match gate, [2]".
    """
    names = case.says.split(" or ")
    args, kwargs = case.call()
    op = getattr(reference_ops, case.op)
    try:
        op(*args, **kwargs)
    except Exception as error:
        others = [
            name for name in inspect.signature(op).parameters if _names(str(error), name, after=_RELATION)
        ]
        names += [name for name in others if name not in names]
    return names


_RELATION = r"(?:match|where|of|as|in) "
"""What comes before the other argument in a sentence of the reference."""


def _names(sentence: str, name: str, *, after: str = "") -> bool:
    """Return whether a sentence has the name of an argument as a word."""
    return re.search(rf"(?<!\w){after}{re.escape(name)}(?!\w)", sentence) is not None


def _in_words(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments of a call in a line."""
    return ", ".join([*map(_value, args), *(f"{name}={_value(value)}" for name, value in kwargs.items())])


def _value(value: Any) -> str:
    if isinstance(value, (Tensor, TernaryWeight)):
        kind = "a weight" if isinstance(value, TernaryWeight) else str(value.dtype).removeprefix("torch.")
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{kind} {list(value.shape)}{place}"
    if isinstance(value, tuple) and any(isinstance(part, (Tensor, TernaryWeight)) for part in value):
        return f"({', '.join(map(_value, value))})"
    words = repr(value)
    return words if len(words) <= 40 else f"a {type(value).__name__}"


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
