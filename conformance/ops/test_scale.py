"""Laws of scale: W = T * S exactly, and the weights that training starts from."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import MANTISSA_BITS, RESERVED_STEP
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.types import TernaryWeight
from conformance import oracle
from conformance import strategies as ss
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject


@law()
def test_group_scales_by_fractions(ops: Subject) -> None:
    """Every level of every mantissa, as an exact fraction."""
    for bits in MANTISSA_BITS:
        levels = range(-32 << bits, 16 << bits)
        scales = ops.group_scales(torch.tensor(levels, dtype=torch.int8), mantissa_bits=bits)
        assert scales.dtype == torch.float32
        assert [Fraction(value) for value in scales.tolist()] == [
            oracle.scale(level, bits) for level in levels
        ]


@law(weight=ss.weights())
def test_dequantize_by_fractions(ops: Subject, weight: TernaryWeight) -> None:
    """Every element is its trit times its group's scale, exactly, in both dtypes."""
    num_rows, num_columns = weight.shape
    trits = torch.tensor(oracle.unpack(weight.packed.tolist(), num_rows * num_columns)).reshape(weight.shape)
    bits = weight.mantissa_bits
    table = {level: float(oracle.scale(level, bits)) for level in set(weight.exponents.flatten().tolist())}
    scales = torch.tensor(
        [[table[level] for level in row] for row in weight.exponents.tolist()], dtype=torch.float64
    )
    want = trits * scales.repeat_interleave(weight.group_size, dim=1)[:, :num_columns]
    for dtype in (torch.float32, torch.bfloat16):
        exact(ops.dequantize(weight, dtype=dtype).to(torch.float64), want, str(dtype))


@law(weight=ss.weights(), data=st.data())
def test_dequantize_some_rows(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Rows come in the order asked for, and as often."""
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, weight.shape[0] - 1), max_size=9)), dtype=torch.int64
    )
    exact(ops.dequantize(weight, rows=rows), ops.dequantize(weight)[rows])


def _make(ops: Subject, shape: tuple[int, int], group_size: int, seed: int, std: float) -> TernaryWeight:
    return ops.initial_weight(shape, std=std, seed=seed, tensor_id=7, group_size=group_size)


@law(shape=ss.matrix_shapes(40), group_size=ss.GROUPS, seed=ss.SEEDS, std=st.floats(1e-9, 1e4))
def test_initial_weight_by_scalar_philox(
    ops: Subject, shape: tuple[int, int], group_size: int, seed: int, std: float
) -> None:
    """A byte below 79 is -1, from 177 on +1; E is the power of two nearest to std over sqrt(0.617), in logarithm."""
    weight = _make(ops, shape, group_size, seed, std)
    groups = -(-shape[1] // group_size)
    for row in range(shape[0]):
        places = []
        for group in range(groups):
            places += oracle.dither(row * groups + group, group_size, seed, RESERVED_STEP, 7)[:group_size]
        want = [(byte >= 177) - (byte < 79) for byte in places[: shape[1]]]
        assert trits_of(weight)[row].tolist() == want, f"row {row}"
    level = min(max(round(math.log2(std / math.sqrt(0.617))), -32), 15)
    assert set(weight.exponents.flatten().tolist()) == {level}
    assert not weight.trit_accum.any() and not weight.exponent_accum.any()


@law(group_size=ss.GROUPS, seed=ss.SEEDS)
def test_initial_weight_statistics(ops: Subject, group_size: int, seed: int) -> None:
    """61.7 % of the trits are not zero and the signs balance: within six standard deviations of 4,096 draws."""
    trits = trits_of(_make(ops, (16, 256), group_size, seed, 1.0)).to(torch.float64)
    share = 158 / 256
    assert abs(trits.abs().mean() - share) < 6 * math.sqrt(share * (1 - share) / 4096)
    assert abs(trits.mean()) < 6 * math.sqrt(share / 4096)


@law(shape=ss.matrix_shapes(40), group_size=ss.GROUPS, seed=ss.SEEDS)
def test_initial_weight_rows_are_local(
    ops: Subject, shape: tuple[int, int], group_size: int, seed: int
) -> None:
    """A taller table starts with the same rows, so that tables of any size can be made in pieces."""
    tall = _make(ops, (shape[0] + 5, shape[1]), group_size, seed, 1.0)
    exact(trits_of(tall)[: shape[0]], trits_of(_make(ops, shape, group_size, seed, 1.0)))


@law(shape=ss.matrix_shapes(), trit=st.integers(-1, 1), exponent=st.integers(-32, 15), group_size=ss.GROUPS)
def test_constant_weight_is_constant(
    ops: Subject, shape: tuple[int, int], trit: int, exponent: int, group_size: int
) -> None:
    weight = ops.constant_weight(shape, trit=trit, exponent=exponent, group_size=group_size)
    want: Tensor = torch.full(shape, trit * 2.0**exponent)
    exact(ops.dequantize(weight), want + 0.0)
    assert weight.group_size == group_size
    assert not weight.trit_accum.any() and not weight.exponent_accum.any()


@pytest.mark.parametrize("trit", [-2, 2])
def test_constant_weight_refuses_trits_beside_the_three(subject: Subject, trit: int) -> None:
    error = subject.refuses("constant_weight", ((2, 3),), {"trit": trit, "exponent": 0})
    assert isinstance(error, ValueError) and f"trit is {trit}" in str(error)
