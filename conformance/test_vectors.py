"""Golden vectors: cases as data, most of them derived by hand, run against the reference and the implementation."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference.op_table import EXACT, OP_TABLE
from arbitor.reference.ops.dither import philox
from arbitor.reference.ops.packing import weight_of_trits

from . import oracle
from .compare import alike, exact, same_sums
from .refusal import fault, refused
from .subject import Subject

FOLDER = Path(__file__).parent / "vectors"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
CASES = [(content["op"], case) for content in FILES.values() for case in content["cases"]]
OPS = [(op, case) for op, case in CASES if op != "philox"]
LEAST_VECTORS = 40
"""A floor, so that a lost file shows."""


def value_of(data: Any) -> Any:
    """Return what a JSON value stands for."""
    if not isinstance(data, dict):
        return data
    if "tuple" in data:
        return tuple(map(value_of, data["tuple"]))
    if "dtype" in data:
        return torch.tensor(_numbers(data["data"]), dtype=getattr(torch, data["dtype"]))
    trits, exponents = (torch.tensor(data[name], dtype=torch.int8) for name in ("trits", "exponents"))
    weight = weight_of_trits(
        trits, exponents, data.get("group_size", 12), mantissa_bits=data.get("mantissa_bits", 0)
    )
    counts = {
        name: torch.tensor(data[name], dtype=torch.int8)
        for name in ("trit_accum", "exponent_accum")
        if name in data
    }
    return weight.with_tensors(**counts)


def _numbers(data: Any) -> Any:
    if isinstance(data, list):
        return [_numbers(item) for item in data]
    return float(data) if isinstance(data, str) else data


def comparer_of(op: str, case: dict[str, Any]) -> Callable[[Any, Any, str], None]:
    """Return how a result is compared: in every bit, but for the sign of a zero where an op sums, or ALIKE if the case says so."""
    if case.get("compared") == "ALIKE":
        return alike_beside_nans
    return exact if OP_TABLE[op].output is EXACT else same_sums


def alike_beside_nans(got: Tensor, want: Tensor, what: str) -> None:
    """Fail unless dtypes are equal, NaNs lie in the same places, and all other elements are ALIKE."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    exact(got.isnan(), want.isnan(), f"whether there is a NaN in {what}")
    alike(got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0), what)


def _ids(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [f"{op}-{case['name']}".replace(" ", "_") for op, case in cases]


def _run(ops: Subject, op: str, case: dict[str, Any]) -> None:
    args = tuple(map(value_of, case["args"]))
    kwargs = {name: value_of(value) for name, value in case.get("kwargs", {}).items()}
    on, kind = f"{op} on {case['name']!r}", case.get("raises")
    if kind is not None:
        error = ops.refuses(op, args, kwargs)
        assert error is not None, f"{op} accepts {case['name']!r}, want a {kind} ({case['why']})"
        assert type(error).__name__ == kind, f"{on} raises {error!r}, want a {kind} ({case['why']})"
        return
    got = ops.call(op, *args, **kwargs)
    try:
        comparer_of(op, case)(got, value_of(case["want"]), f"{on}: output")
    except AssertionError as failure:
        raise AssertionError(f"{failure} ({case['why']})") from None


@pytest.mark.parametrize(("op", "case"), OPS, ids=_ids(OPS))
def test_vector_of_the_reference(reference: Subject, op: str, case: dict[str, Any]) -> None:
    _run(reference, op, case)


@pytest.mark.parametrize(("op", "case"), OPS, ids=_ids(OPS))
def test_vector(subject: Subject, op: str, case: dict[str, Any]) -> None:
    _run(subject, op, case)


@pytest.mark.parametrize("op", sorted(FILES.keys() - {"philox"}))
def test_none_is_no_argument(reference: Subject, subject: Subject, op: str) -> None:
    """In the place of each argument that must be given, None is refused by a sentence that names the argument."""
    case = next(each for each in FILES[op]["cases"] if "raises" not in each)
    signature = inspect.signature(reference.raw(op))
    kwargs = {name: value_of(value) for name, value in case.get("kwargs", {}).items()}
    given = signature.bind(*map(value_of, case["args"]), **kwargs).arguments
    for name in given:
        if signature.parameters[name].default is not inspect.Parameter.empty:
            continue
        call = signature.bind(**{**given, name: None})
        error = reference.refuses(op, call.args, call.kwargs)
        kind = TypeError if error is None else type(error)
        assert kind in (TypeError, ValueError), f"{op} on None for {name} raises {error!r}"
        for ops in (reference, subject):
            wrong = fault(ops, refused(op, f"None for {name}", kind, name, *call.args, **call.kwargs))
            assert not wrong, wrong


@pytest.mark.parametrize("case", FILES["philox"]["cases"], ids=lambda case: case["name"].replace(" ", "_"))
def test_philox_known_answer(case: dict[str, Any]) -> None:
    """The generator itself, in the reference and in the oracle of the laws, against Random123's known answers."""
    counter, key, want = ([int(word, 16) for word in case[name]] for name in ("counter", "key", "want"))
    assert oracle.philox(counter, key) == want
    words = philox(tuple(torch.tensor(word) for word in counter), (key[0], key[1]))
    assert [int(word) for word in words] == want


def test_vectors_are_well_formed() -> None:
    """Each case says where its numbers come from, and each file names an op."""
    assert len(CASES) >= LEAST_VECTORS
    for op, case in CASES:
        assert op in OP_TABLE or op == "philox"
        assert case.get("compared", "ALIKE") == "ALIKE", f"{op}, {case['name']}: {case['compared']}"
        assert "compared" not in case or OP_TABLE[op].output is not EXACT, f"{op}, {case['name']} is EXACT"
        assert len(case["why"]) > 10, f"{op}, {case['name']}: say why"


def test_a_vector_forgives_only_what_an_op_may_differ_in() -> None:
    """The sign of a zero is free where an op sums. ALIKE has room for roundings, and not for another number or a lost NaN."""
    zero, minus = torch.zeros(1), -torch.zeros(1)
    comparer_of("linear", {})(minus, zero, "y")
    with pytest.raises(AssertionError, match=r"is -0\.0, want 0\.0"):
        comparer_of("dequantize", {})(minus, zero, "w")
    want, near, far = (torch.tensor([math.nan, value]) for value in (0.7, 0.7 + 2**-20, 0.7 + 2**-10))
    compare = comparer_of("orthogonalize", {"compared": "ALIKE"})
    compare(near, want, "y")
    for wrong in (far, want.double(), torch.tensor([0.0, 0.7]), torch.full((2,), math.nan)):
        with pytest.raises(AssertionError):
            compare(wrong, want, "y")
