"""The interpreter that the suite speeds up computes what the interpreter of Triton computes, in every bit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch import Tensor

from arbitor.reference.op_table import OP_TABLE
from conformance.case import Case
from conformance.compare import exact
from conformance.families import CASES
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
