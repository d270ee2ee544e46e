"""Every op looks at every tensor that it is given: what is no tensor, of another dtype or on another device is refused.

The files of families say what a family refuses beside this. Here a call is drawn, and one argument after the other is spoiled. Both
sets refuse the call by the same exception, in one sentence that begins with an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.types import TernaryWeight
from conformance.case import Case
from conformance.families import CASES
from conformance.subject import Subject

OTHER = {
    torch.float32: torch.float16,
    torch.bfloat16: torch.float16,
    torch.int64: torch.int32,
    torch.int32: torch.int64,
    torch.int16: torch.int8,
    torch.int8: torch.int16,
    torch.uint8: torch.int8,
}
"""A dtype that an argument of a dtype may not have."""

TWO_DTYPES = ("neighbours_RJ",)
"""Arguments that may have either of two dtypes."""


def spoilt(arguments: dict[str, Any], key: str) -> Iterator[tuple[str, type[Exception], Callable[[], Any]]]:
    """Yield what is wrong with an argument, how it is refused, and a maker of the argument."""
    value = arguments[key]
    lie = {name for name, each in arguments.items() if isinstance(each, TernaryWeight) or _has_elements(each)}
    if lie - {key, "out"} and key in lie:
        yield "elsewhere", ValueError, lambda: value.to("meta")
    if isinstance(value, TernaryWeight):
        yield "floats", TypeError, lambda: reference_ops.dequantize(value)
        yield "a text", TypeError, lambda: "weight"
    if not isinstance(value, Tensor):
        return
    if value.ndim:
        yield "a list", TypeError, lambda: value.tolist()
    if key not in TWO_DTYPES:
        yield "another dtype", TypeError, lambda: value.to(OTHER[value.dtype])


def _has_elements(value: object) -> bool:
    """Return whether a value is a tensor with a dimension; a tensor without one stands for a number."""
    return isinstance(value, Tensor) and value.ndim > 0


def refusal(ops: Any, name: str, arguments: dict[str, Any]) -> Exception | None:
    """Return what an op raises."""
    try:
        getattr(ops, name)(**arguments)
    except Exception as error:
        return error
    return None


def looks_at_arguments(subject: Subject, name: str) -> None:
    """Fail unless an op refuses every spoilt argument of a drawn call as the reference does."""
    signature = inspect.signature(getattr(reference_ops, name))

    def arguments_of(case: Case) -> dict[str, Any]:
        fresh = case.copy()
        return signature.bind(*fresh.args, **fresh.kwargs).arguments

    @settings(max_examples=2, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        arguments = arguments_of(case)
        stems = {key.partition("_")[0] for key in arguments}
        for key in (key for key in arguments if key != "out"):
            for why, wanted, made in spoilt(arguments, key):
                what = f"{name} of {key}, {why}"
                own = refusal(reference_ops, name, {**arguments_of(case), key: made()})
                assert own is not None, f"the reference accepts {what}"
                check(own, wanted, stems, what)
                moved: dict[int, Any] = {}
                here = {k: subject.to_device(v, False, moved) for k, v in arguments_of(case).items()}
                spoiled = made() if why == "elsewhere" else subject.to_device(made(), False, moved)
                error = refusal(subject.ops, name, {**here, key: spoiled})
                assert error is not None, f"{subject.name} accepts {what}"
                check(error, wanted, stems, what)

    run()


def check(error: Exception, wanted: type[Exception], stems: set[str], what: str) -> None:
    """Fail unless an exception is the one that is wanted, in one sentence about an argument."""
    assert type(error) is wanted, f"{what}: {error!r}, want a {wanted.__name__}"
    first = str(error).split()[0].partition("_")[0]
    assert first.partition("[")[0] in stems and len(str(error).splitlines()) == 1, f"{what}: {error}"


@pytest.mark.parametrize("name", OP_TABLE)
def test_every_tensor_is_looked_at(subject: Subject, name: str) -> None:
    looks_at_arguments(subject, name)


def moved(grad: Tensor, weight: Any) -> Tensor:
    """Return a gradient wherever the weight is."""
    return reference_ops.linear_input_grad(grad.to(weight.exponents.device), weight)


def guessed(grad: Tensor, weight: Any) -> Tensor:
    """Return a gradient of whatever torch makes a tensor of."""
    return reference_ops.linear_input_grad(torch.as_tensor(grad), weight)


def unnamed(grad: Tensor, weight: Any) -> Tensor:
    """Refuse in words that name no argument."""
    try:
        return reference_ops.linear_input_grad(grad, weight)
    except TypeError:
        raise TypeError("unsupported dtype") from None


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (moved, "elsewhere"),
        (guessed, "a list"),
        (unnamed, "unsupported dtype"),
    ],
)
def test_an_op_that_does_not_look_is_noticed(fault: Callable[..., Tensor], says: str) -> None:
    """The planted faults."""
    ops = SimpleNamespace(**{**vars(reference_ops), "linear_input_grad": fault})
    with pytest.raises(AssertionError, match=says):
        looks_at_arguments(Subject(ops, fault.__name__), "linear_input_grad")


LEFT_OUT = "float64 is not supported"
"""What the docstring of an op says that leaves float64 to the reference."""


@pytest.mark.parametrize("name", OP_TABLE)
def test_an_op_whose_docstring_leaves_float64_out_refuses_it(subject: Subject, name: str) -> None:
    """A call whose floats are all float64 raises a TypeError. What no docstring leaves out is compared with the reference."""

    @settings(max_examples=2, phases=[Phase.generate])
    @given(case=CASES[name])
    def run(case: Case) -> None:
        fresh = case.copy()
        is_float = [isinstance(value, Tensor) and value.is_floating_point() for value in fresh.args]
        args = [v.double() if wide else v for v, wide in zip(fresh.args, is_float, strict=True)]
        if any(is_float):
            error = subject.refuses(name, tuple(args), fresh.kwargs)
            assert isinstance(error, TypeError), f"{name} leaves float64 out, but takes it: {error!r}"
            assert "has dtype float64, but must be" in str(error)

    if LEFT_OUT in (inspect.getdoc(subject.raw(name)) or ""):
        run()
