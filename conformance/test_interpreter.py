"""The interpreter that the suite speeds up computes what the interpreter of Triton computes, in every bit."""

from __future__ import annotations

import math
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch import Tensor

from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.ops import initial_weight
from conformance.case import Case
from conformance.compare import exact
from conformance.families import CASES
from conformance.graph.models import integers
from conformance.report import skip
from conformance.subject import Subject


@pytest.fixture
def spared(subject: Subject) -> ModuleType:
    """Return the module that speeds the interpreter up, where the interpreter runs."""
    if not triton.knobs.runtime.interpret:
        skip("the interpreter as Triton ships it", "kernels run on CUDA, not in Triton's interpreter")
    from conformance import interpreter

    return interpreter


def test_this_triton_has_all_pieces(spared: ModuleType) -> None:
    missing = [name for owner, name in spared.PIECES if (owner, name) not in spared.SHIPPED]
    assert not missing, f"Triton {triton.__version__} has no {missing}: look into conformance/interpreter.py"


@pytest.mark.parametrize("name", OP_TABLE)
def test_every_op_gives_the_same_bits(subject: Subject, spared: ModuleType, name: str) -> None:
    # One call, the simplest: what is left out depends on types and device functions, never on sizes and values.
    @settings(max_examples=1)
    @given(case=CASES[name])
    def run(case: Case) -> None:
        again = case.copy()
        result = subject.call(name, *case.args, **case.kwargs)
        with spared.as_shipped():
            shipped = subject.call(name, *again.args, **again.kwargs)
        exact(result, shipped, name)

    run()


def test_a_launch_leaves_the_language_as_it_was(subject: Subject, spared: ModuleType) -> None:
    """`philox_impl` is a device function of a module of Triton, which names another module of the language than our kernels do."""
    before = {name: getattr(tl.core, name) for name in ("load", "static_range", "reduce")}
    subject.dither_bytes(torch.arange(3), group_size=12, seed=1, step=2, tensor_id=3)
    assert {name: getattr(tl.core, name) for name in before} == before


def test_few_programs_compute_what_many_do(
    subject: Subject, spared: ModuleType, request: pytest.FixtureRequest
) -> None:
    """Rows of a weight that fill no program, and inputs that fill no tile. Sums of whole numbers are exact in any order."""
    x_MK = integers(2, 70, seed=1)
    weight = initial_weight((70, 70), std=1.0, seed=1, tensor_id=2)
    many = subject.call("linear", x_MK, weight)
    request.getfixturevalue("wide_programs")
    exact(subject.call("linear", x_MK, weight), many)


@triton.jit
def _wrapping_kernel(x_ptr, out_ptr):
    place = tl.arange(0, 4)
    x = tl.load(x_ptr + place)
    tl.store(out_ptr + place, x + x)
    tl.store(out_ptr + 4 + place, x - 3)
    tl.store(out_ptr + 8 + place, x * x)


def test_integers_wrap(subject: Subject, spared: ModuleType) -> None:
    x = torch.tensor([2**31 - 1, -(2**31), 2**30, -(2**30)], dtype=torch.int32)

    def wrapped() -> Tensor:
        out = torch.zeros(12, dtype=torch.int32)
        _wrapping_kernel[(1,)](x, out)
        return out

    exact(wrapped(), torch.cat((x + x, x - 3, x * x)))
    with spared.as_shipped():
        exact(wrapped(), torch.cat((x + x, x - 3, x * x)))


@triton.jit
def _counting_kernel(count_ptr, out_ptr):
    counted = 0
    for each in range(tl.load(count_ptr)):
        counted += each
    tl.store(out_ptr, counted)


def test_a_loop_ends_at_a_number_of_the_device(subject: Subject, spared: ModuleType) -> None:
    """The interpreter has that number in an array of one element."""
    out = torch.zeros(1, dtype=torch.int32)
    _counting_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    exact(out, torch.tensor([10], dtype=torch.int32))


SCALARS = [value for value in vars(tl).values() if type(value) is tl.dtype and value != tl.void]


@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_a_type_is_remembered_as_itself(spared: ModuleType, scalar: Any) -> None:
    """Pointers and blocks too: they have the names of their elements in theirs."""
    shipped = spared.SHIPPED[spared.interpreter, "_get_np_dtype"]
    for kind in (
        scalar,
        tl.pointer_type(scalar),
        tl.block_type(scalar, [4]),
        tl.block_type(tl.pointer_type(scalar), [4]),
    ):
        for _ in range(2):
            assert spared.interpreter._get_np_dtype(kind) == shipped(kind)


@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_blocks_and_tensors_are_remembered_as_themselves(spared: ModuleType, scalar: Any) -> None:
    """Pointers too, in every shape, with one handle and then with another one."""

    def made() -> list[str]:
        kinds = [
            *(scalar, tl.pointer_type(scalar)),
            *(
                tl.block_type(kind, shape)
                for kind in (scalar, tl.pointer_type(scalar))
                for shape in ([1], [4], [4, 1], [1, 4], [2, 4], [tl.constexpr(2), tl.constexpr(4)])
            ),
        ]
        # The order of the fields is no part of a tensor.
        return [
            f"{vars(kind)} {sorted(vars(tl.tensor(handle, kind)).items())}"
            for handle in ("one handle", "the other")
            for kind in kinds
        ]

    found = made()
    with spared.as_shipped():
        assert found == made()


def test_tensors_are_broadcast_as_shipped(spared: ModuleType) -> None:
    """Shapes of every kind: equal, with axes of one element, of fewer axes, scalars, and shapes that do not fit."""
    semantic = spared.interpreter.interpreter_semantic

    def of(shape: tuple[int, ...]) -> Any:
        handle = spared.interpreter.TensorHandle(np.arange(math.prod(shape)).reshape(shape), tl.int64)
        return tl.tensor(handle, tl.block_type(tl.int64, list(shape)) if shape else tl.int64)

    def told(one: tuple[int, ...], other: tuple[int, ...]) -> str:
        try:
            results = semantic.broadcast_impl_value(of(one), of(other))
        except ValueError as error:
            return str(error)
        return str([(result.type, result.handle.data.tolist()) for result in results])

    pairs = list(product([(), (1,), (4,), (2,), (1, 4), (4, 1), (2, 4), (4, 4)], repeat=2))
    found = [told(*pair) for pair in pairs]
    with spared.as_shipped():
        assert found == [told(*pair) for pair in pairs]


def test_two_types_become_what_they_become_as_shipped(spared: ModuleType) -> None:
    """Each of them may be a scalar, for sums and for quotients. Types that have no sum are refused each time."""
    semantic = spared.interpreter.interpreter_semantic

    def told(*asked: Any) -> str:
        try:
            return str(semantic.computation_type_impl(*asked))
        except TypeError as error:
            return str(error)

    answers = (True, False)
    cases = list(product(SCALARS, answers, SCALARS, answers, answers))
    # With one memory for all, and each of them twice.
    found = [told(*asked) for asked in cases + cases]
    with spared.as_shipped():
        assert found == [told(*asked) for asked in cases] * 2
