"""Laws of scale: W = T * S exactly, and the weights that training starts from."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import EXPONENT_MAX, EXPONENT_MIN, MANTISSA_BITS, RESERVED_STEP
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, I8, ids, ones, refusals, refused, scalar, weight
from ..subject import Subject
from .test_packing import UNPACK_MOST_SIGNIFICANT_FIRST

mutant = mutants_of("scale")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("group_scales")
def group_scales_calls(draw: st.DrawFn) -> Case:
    bits = draw(st.sampled_from((0, 1, 2)))
    levels = draw(st.lists(st.integers(-32 << bits, (16 << bits) - 1), max_size=70))
    return Case((torch.tensor(levels, dtype=torch.int8),), {"mantissa_bits": bits})


@calls("dequantize")
def dequantize_calls(draw: st.DrawFn) -> Case:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return Case((draw(ss.weights()),), {"dtype": draw(st.sampled_from(dtypes))})


@calls("initial_weight")
def initial_weight_calls(draw: st.DrawFn) -> Case:
    std = draw(st.one_of(st.sampled_from((1e-12, 0.02, 1.0, 1e6)), st.floats(1e-9, 1e4)))
    clock = {"seed": draw(ss.SEEDS), "tensor_id": draw(ss.TENSOR_IDS)}
    return Case((draw(ss.matrix_shapes()),), {"std": std, "group_size": draw(ss.GROUPS), **clock})


@calls("constant_weight")
def constant_weight_calls(draw: st.DrawFn) -> Case:
    exponent = draw(st.one_of(st.sampled_from((EXPONENT_MIN, 0, EXPONENT_MAX)), st.integers(-32, 15)))
    kwargs = {"trit": draw(st.integers(-1, 1)), "exponent": exponent, "group_size": draw(ss.GROUPS)}
    return Case((draw(ss.matrix_shapes()),), kwargs)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


MANTISSA_IGNORED = mutant(
    "mantissa_ignored",
    "torch.ldexp(1.0 + mantissa.to(torch.float32) / 2**mantissa_bits, exponent)",
    "torch.ldexp(torch.ones(exponent.shape), exponent)",
    compared=("group_scales", "dequantize"),
)


@law(
    rejects=[
        MANTISSA_IGNORED,
        mutant(
            "truncated_exponent",
            "exponent = level >> mantissa_bits",
            "exponent = torch.div(level, 2**mantissa_bits, rounding_mode='trunc').to(torch.int32)",
            compared="group_scales",
        ),
    ],
)
def test_group_scales_by_fractions(ops: Subject) -> None:
    """Every level of every mantissa, as an exact fraction."""
    for bits in MANTISSA_BITS:
        levels = range(-32 << bits, 16 << bits)
        scales = ops.group_scales(torch.tensor(levels, dtype=torch.int8), mantissa_bits=bits)
        assert scales.dtype == torch.float32
        assert [Fraction(value) for value in scales.tolist()] == [
            oracle.scale(level, bits) for level in levels
        ]


@law(
    weight=ss.weights(),
    rejects=[
        UNPACK_MOST_SIGNIFICANT_FIRST,
        MANTISSA_IGNORED,
        mutant(
            "groups_across_rows",
            "scales.repeat_interleave(weight.group_size, dim=1)[:, :num_columns]",
            "scales.flatten().repeat_interleave(weight.group_size)[: trits.numel()].reshape(trits.shape)",
            compared="dequantize",
        ),
    ],
)
def test_dequantize_by_fractions(ops: Subject, weight: TernaryWeight) -> None:
    """Every element is its trit times its group's scale, exactly, in every dtype."""
    num_rows, num_columns = weight.shape
    trits = torch.tensor(oracle.unpack(weight.packed.tolist(), num_rows * num_columns)).reshape(weight.shape)
    bits = weight.mantissa_bits
    table = {level: float(oracle.scale(level, bits)) for level in set(weight.exponents.flatten().tolist())}
    scales = torch.tensor(
        [[table[level] for level in row] for row in weight.exponents.tolist()], dtype=torch.float64
    )
    want = trits * scales.repeat_interleave(weight.group_size, dim=1)[:, :num_columns]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        exact(ops.dequantize(weight, dtype=dtype).to(torch.float64), want, str(dtype))


ROWS_IN_ORDER = mutant(
    "rows_in_order",
    "trits = digits_at(weight.packed, rows[:, None]",
    "trits = digits_at(weight.packed, rows.sort().values[:, None]",
    compared="embedding",
)


@law(weight=ss.weights(), data=st.data(), rejects=[ROWS_IN_ORDER])
def test_dequantize_some_rows(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Rows come in the order asked for, and as often."""
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, weight.shape[0] - 1), max_size=9)), dtype=torch.int64
    )
    exact(ops.dequantize(weight, rows=rows), ops.dequantize(weight)[rows])


def _make(ops: Subject, shape: tuple[int, int], group_size: int, seed: int, std: float) -> TernaryWeight:
    return ops.initial_weight(shape, std=std, seed=seed, tensor_id=7, group_size=group_size)


INIT_SIGNS_LEAVE_NO_ZERO = mutant(
    "init_signs_leave_no_zero",
    "(places >= INIT_HIGH_BYTE)",
    "(places >= INIT_LOW_BYTE)",
    compared="initial_weight",
)
INIT_IDS_FROM_THE_END = mutant(
    "init_ids_from_the_end",
    "ids = torch.arange(num_rows * groups, device=device)",
    "ids = torch.arange(num_rows * groups - 1, -1, -1)",
    compared="initial_weight",
)


@law(
    shape=ss.matrix_shapes(40),
    group_size=ss.GROUPS,
    seed=ss.SEEDS,
    std=st.floats(1e-9, 1e4),
    rejects=[
        INIT_SIGNS_LEAVE_NO_ZERO,
        mutant("init_exponent_floor", "round(math.log2(", "math.floor(math.log2(", compared="initial_weight"),
        INIT_IDS_FROM_THE_END,
    ],
)
def test_initial_weight_by_scalar_philox(
    ops: Subject, shape: tuple[int, int], group_size: int, seed: int, std: float
) -> None:
    """A byte below 79 is -1, and a byte of 177 or more is +1. 2^E is nearest to std over sqrt(0.617), in logarithm."""
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


@law(group_size=ss.GROUPS, seed=ss.SEEDS, rejects=[INIT_SIGNS_LEAVE_NO_ZERO])
def test_initial_weight_statistics(ops: Subject, group_size: int, seed: int) -> None:
    """61.7 % of the trits are not zero and the signs balance: within six standard deviations of 4,096 draws."""
    trits = trits_of(_make(ops, (16, 256), group_size, seed, 1.0)).to(torch.float64)
    share = 158 / 256
    assert abs(trits.abs().mean() - share) < 6 * math.sqrt(share * (1 - share) / 4096)
    assert abs(trits.mean()) < 6 * math.sqrt(share / 4096)


@law(shape=ss.matrix_shapes(40), group_size=ss.GROUPS, seed=ss.SEEDS, rejects=[INIT_IDS_FROM_THE_END])
def test_initial_weight_rows_are_local(
    ops: Subject, shape: tuple[int, int], group_size: int, seed: int
) -> None:
    """A taller table starts with the same rows, so that tables of any size can be made in pieces."""
    tall = _make(ops, (shape[0] + 5, shape[1]), group_size, seed, 1.0)
    exact(trits_of(tall)[: shape[0]], trits_of(_make(ops, shape, group_size, seed, 1.0)))


@law(
    shape=ss.matrix_shapes(),
    trit=st.integers(-1, 1),
    exponent=st.integers(-32, 15),
    group_size=ss.GROUPS,
    rejects=[
        mutant(
            "constant_of_one_sign",
            "torch.full((num_rows, num_columns), trit,",
            "torch.full((num_rows, num_columns), abs(trit),",
            compared="constant_weight",
        ),
    ],
)
def test_constant_weight_is_constant(
    ops: Subject, shape: tuple[int, int], trit: int, exponent: int, group_size: int
) -> None:
    weight = ops.constant_weight(shape, trit=trit, exponent=exponent, group_size=group_size)
    want: Tensor = torch.full(shape, trit * 2.0**exponent)
    exact(ops.dequantize(weight), want + 0.0)
    assert weight.group_size == group_size
    assert not weight.trit_accum.any() and not weight.exponent_accum.any()


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_scale = refusals(
    "scale",
    refused("group_scales", "int16", TypeError, "exponents", ones(2, dtype=torch.int16)),
    refused("group_scales", "level 16", ValueError, "exponents", scalar(16, I8)),
    refused("group_scales", "level -33", ValueError, "exponents", scalar(-33, I8)),
    refused("group_scales", "level 64 of 2 mantissa bits", ValueError, "exponents", scalar(64, I8), mantissa_bits=2),
    refused("group_scales", "3 mantissa bits", ValueError, "mantissa_bits", ones(2, dtype=I8), mantissa_bits=3),
    refused("dequantize", "float16", TypeError, "dtype", weight, dtype=lambda: F16),
    refused("dequantize", "two-dimensional rows", ValueError, "rows", weight, rows=lambda: torch.zeros(2, 1, dtype=torch.int64)),
    refused("dequantize", "a list of rows", TypeError, "rows", weight, rows=[0, 1]),
    refused("dequantize", "row N", ValueError, "rows", weight, rows=ids(3)),
    refused("dequantize", "row -1", ValueError, "rows", weight, rows=ids(-1)),
    refused("initial_weight", "std 0", ValueError, "std", (2, 3), std=0.0, seed=0, tensor_id=0),
    refused("initial_weight", "std NaN", ValueError, "std", (2, 3), std=float("nan"), seed=0, tensor_id=0),
    refused("initial_weight", "std 10**400", ValueError, "std", (2, 3), std=10**400, seed=0, tensor_id=0),
    refused("initial_weight", "group 7", ValueError, "group_size", (2, 3), std=1.0, seed=0, tensor_id=0, group_size=7),
    refused("initial_weight", "group 0", ValueError, "group_size", (2, 3), std=1.0, seed=0, tensor_id=0, group_size=0),
    refused("initial_weight", "no rows", ValueError, "shape", (0, 3), std=1.0, seed=0, tensor_id=0),
    refused("initial_weight", "2**33 groups", ValueError, "shape", (2**31, 48), std=1.0, seed=0, tensor_id=0),
    refused("initial_weight", "a number for a shape", TypeError, "shape", 6, std=1.0, seed=0, tensor_id=0),
    refused("initial_weight", "no device", ValueError, "device", (2, 3), std=1.0, seed=0, tensor_id=0, device="here"),
    refused("constant_weight", "a size of True", ValueError, "shape", (True, 3), trit=1, exponent=0),
    refused("constant_weight", "a number for a device", ValueError, "device", (2, 3), trit=1, exponent=0, device=0.5),
    refused("constant_weight", "a group size as a tensor", ValueError,
            "group_size", (2, 3), trit=1, exponent=0, group_size=scalar(12)),
    refused("dequantize", "the name of a dtype", TypeError, "dtype", weight, dtype="float32"),
    refused("constant_weight", "trit 2", ValueError, "trit", (2, 3), trit=2, exponent=0),
    refused("constant_weight", "trit -2", ValueError, "trit", (2, 3), trit=-2, exponent=0),
    refused("constant_weight", "exponent 16", ValueError, "exponent", (2, 3), trit=1, exponent=16),
    refused("constant_weight", "exponent -33", ValueError, "exponent", (2, 3), trit=1, exponent=-33),
    refused("constant_weight", "group 12.0", ValueError, "group_size", (2, 3), trit=1, exponent=0, group_size=12.0),
    refused("constant_weight", "group 7", ValueError, "group_size", (2, 3), trit=1, exponent=0, group_size=7),
    rejects=[
        mutant("dequantized_rows_unchecked", 'checks.values_between("rows", rows, 0, num_rows - 1)', "pass"),
    ],
)
# fmt: on
