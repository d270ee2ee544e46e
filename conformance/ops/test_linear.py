"""Laws of the ternary linear: exact where sums are exact, and votes that disagree only at rounding boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.checks import GRADIENT_DTYPES
from arbitor.reference.constants import SILENT_ROW, groups_per_row
from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact, no_worse, one_rounding, roundings, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, I8, meta, ones, refusals, refused, weight
from ..subject import Subject
from .test_votes import ASCENT

mutant = mutants_of("linear")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


NUM_GROUPS = st.sampled_from((1, 1, 2, 5))
"""Matrices that stand side by side."""


@calls("linear", "linear_input_grad")
def linear_calls(draw: st.DrawFn, op: str) -> Case:
    exact_sums = draw(st.booleans(), label="exact")
    levels, num_groups = ss.NARROW if exact_sums else None, draw(NUM_GROUPS, label="E")
    num_rows, num_columns = draw(ss.matrix_shapes(30 if num_groups > 1 else None))
    weight = draw(ss.weights((num_groups * num_rows, num_columns), levels=levels))
    is_grad, lead, dtype = op == "linear_input_grad", draw(ss.leading()), draw(ss.DTYPES)
    width = num_rows if is_grad else num_groups * num_columns
    kwargs: dict[str, Any] = {"num_groups": num_groups} if num_groups > 1 else {}
    if is_grad and draw(st.booleans(), label="added to another gradient"):
        # With huge values a sum of two kinds would say little of the smaller one.
        exact_sums = exact_sums and dtype is torch.float32
        out = draw(
            ss.activations((*lead, num_groups * num_columns), dtype, exact=exact_sums, kinds=("normal",))
        )
        kwargs["out"] = out.contiguous()
    x = draw(ss.activations((*lead, width), dtype, exact=exact_sums))
    return Case((x, weight), kwargs, sums_exact=exact_sums)


@calls("linear_weight_grad")
def linear_weight_grad_calls(draw: st.DrawFn) -> Case:
    exact_sums, dtype, rows = draw(st.booleans(), label="exact"), draw(ss.DTYPES), draw(ss.leading())
    num_rows, num_columns = draw(ss.matrix_shapes())
    # The product of two huge values overflows.
    modest = ("normal", "tiny", "constant")
    kinds = draw(st.sampled_from(((modest, (*modest, "huge")), ((*modest, "wild"), (*modest, "wild")))))
    grad = draw(ss.activations((*rows, num_rows), dtype, exact=exact_sums, kinds=kinds[0]))
    num_groups = draw(NUM_GROUPS, label="E")
    x = draw(ss.activations((*rows, num_groups * num_columns), dtype, exact=exact_sums, kinds=kinds[1]))
    kwargs: dict[str, Any] = {"num_groups": num_groups} if num_groups > 1 else {}
    if draw(st.booleans(), label="in bfloat16"):
        kwargs["dtype"] = torch.bfloat16
    return Case((grad, x), kwargs, sums_exact=exact_sums)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


FORWARD = "return (x.to(wide) @ _matrix(weight, num_groups, wide).T).to(x.dtype)"
"""The line of the reference that most mutants replace."""

WEIGHT_GRAD = "_stacked(grad_MN.T @ x_MK, num_groups)"
"""What the reference returns as the gradient of the weight."""

WEIGHTS = ss.weights(limit=70, levels=ss.NARROW)


def dense(weight: TernaryWeight) -> Tensor:
    """Return W in float64 by the plain-Python oracle."""
    return torch.tensor(oracle.dense(weight), dtype=torch.float64)


def _floats(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return data.draw(ss.activations(shape, dtype, exact=True))


TRANSPOSED_WEIGHT = mutant(
    "transposed_weight",
    FORWARD,
    "return x @ dequantize(weight, dtype=x.dtype).reshape(weight.shape[1], weight.shape[0])",
    compared="linear",
)
LAST_COLUMN_DROPPED = mutant(
    "last_column_dropped",
    FORWARD,
    "return x[..., :-1] @ dequantize(weight, dtype=x.dtype)[:, :-1].T",
    compared="linear",
)
INPUT_GRAD_OF_THEFORWARD = mutant(
    "input_grad_of_the_forward",
    "grad.to(wide) @ _matrix(weight, num_groups, wide)",
    "grad.to(wide) @ _matrix(weight, num_groups, wide).abs()",
    compared="linear_input_grad",
)


@law(
    weight=WEIGHTS,
    lead=ss.leading(),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        TRANSPOSED_WEIGHT,
        mutant(
            "sums_in_bfloat16",
            FORWARD,
            "w = dequantize(weight, dtype=x.dtype)\n"
            "    y = x.new_zeros(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16)\n"
            "    for k in range(weight.shape[1]):\n"
            "        y = y + (x[..., k, None] * w[:, k]).to(torch.bfloat16)\n"
            "    return y.to(x.dtype)",
            compared="linear",
        ),
        LAST_COLUMN_DROPPED,
        INPUT_GRAD_OF_THEFORWARD,
    ],
)
def test_linear_by_exact_sums(
    ops: Subject, weight: TernaryWeight, lead: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Forward and input gradient are the matrix products with W and its transpose, rounded once to the dtype."""
    x = _floats(data, *lead, weight.shape[1], dtype=dtype)
    dy = _floats(data, *lead, weight.shape[0], dtype=dtype)
    y, dx = ops.linear(x, weight), ops.linear_input_grad(dy, weight)
    same_sums(y, (x.to(torch.float64) @ dense(weight).T).to(dtype), "y")
    same_sums(dx, (dy.to(torch.float64) @ dense(weight)).to(dtype), "dx")


WEIGHT_GRAD_OF_THE_LAST_ROW = mutant(
    "weight_grad_of_the_last_row",
    WEIGHT_GRAD,
    "_stacked(grad_MN[-1:].T @ x_MK[-1:], num_groups)",
    compared="linear_weight_grad",
)
WEIGHT_GRAD_IN_BFLOAT16 = mutant(
    "weight_grad_in_bfloat16",
    WEIGHT_GRAD,
    "_stacked((grad_MN.T @ x_MK).to(torch.bfloat16).to(wide), num_groups)",
    compared="linear_weight_grad",
)


@law(
    lead=ss.leading(),
    shape=ss.matrix_shapes(70),
    dtype=ss.DTYPES,
    made=st.sampled_from(GRADIENT_DTYPES),
    data=st.data(),
    rejects=[
        WEIGHT_GRAD_OF_THE_LAST_ROW,
        WEIGHT_GRAD_IN_BFLOAT16,
        mutant(
            "weight_grad_unwritten",
            "return " + WEIGHT_GRAD,
            "out = torch.empty(grad.shape[-1], x.shape[-1], dtype=wide)\n"
            "    out[:, :64] = (grad_MN.T @ x_MK)[:, :64]\n    return _stacked(out, num_groups)",
            compared="linear_weight_grad",
        ),
    ],
)
def test_linear_weight_grad_by_exact_sums(
    ops: Subject,
    lead: tuple[int, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
    made: torch.dtype,
    data: st.DataObject,
) -> None:
    """The weight gradient sums over every leading dimension in float32 and is rounded once. No row to sum gives zeros."""
    dy, x = _floats(data, *lead, shape[0], dtype=dtype), _floats(data, *lead, shape[1], dtype=dtype)
    got = ops.linear_weight_grad(dy, x, dtype=made)
    want = dy.reshape(-1, shape[0]).to(torch.float64).T @ x.reshape(-1, shape[1]).to(torch.float64)
    same_sums(got, want.to(made))


@law(
    shape=ss.matrix_shapes(70),
    rows=st.sampled_from((65, 66, 70, 129)),
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        mutant(
            "weight_grad_of_rounded_parts",
            WEIGHT_GRAD,
            "_stacked(sum((dy.T @ x).to(dtype).to(wide) for dy, x in zip(grad_MN.split(8), x_MK.split(8))), num_groups)",
        ),
    ],
)
def test_linear_weight_grad_rounds_a_sum_once(
    ops: Subject, shape: tuple[int, int], rows: int, seed: int
) -> None:
    """A bfloat16 gradient is the whole sum, rounded. The sums are whole numbers that float32 holds in any order."""
    rng = ss.generator(seed)
    dy, x = (torch.randint(-256, 257, (rows, width), generator=rng).to(torch.bfloat16) for width in shape)
    want = dy.to(torch.float64).T @ x.to(torch.float64)
    same_sums(ops.linear_weight_grad(dy, x, dtype=torch.bfloat16), want.to(torch.bfloat16))


@law(
    weight=WEIGHTS,
    data=st.data(),
    rejects=[
        mutant(
            "saturating_output",
            FORWARD,
            "return (x @ dequantize(weight, dtype=x.dtype).T).clamp(-2.0, 2.0)",
            compared="linear",
        ),
    ],
)
def test_linear_is_linear(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    a, b = ss.float_values((5, weight.shape[1]), "small integers", 1), _floats(data, 5, weight.shape[1])
    b = torch.round(b * 1024) / 1024
    same_sums(
        ops.linear(a + b.clamp(-8, 8), weight), ops.linear(a, weight) + ops.linear(b.clamp(-8, 8), weight)
    )


@law(
    num_groups=st.sampled_from((2, 3, 7)),
    shape=ss.matrix_shapes(24),
    lead=ss.leading(),
    data=st.data(),
    rejects=[
        mutant("matrices_interleaved", "w_EnK.transpose(0, 1).flatten(1)", "w_EnK.permute(1, 2, 0).flatten(1)",
               compared=("linear", "linear_input_grad")),
        mutant("matrices_of_rows", "w_EnK.transpose(0, 1).flatten(1)", "w_EnK.reshape(w_EnK.shape[1], -1)",
               compared=("linear", "linear_input_grad")),
        mutant("gradients_of_rows", "w.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(0, 1)",
               "w.reshape(num_groups * w.shape[0], -1)", compared="linear_weight_grad"),
    ],
)  # fmt: skip
def test_linear_of_matrices_side_by_side(
    ops: Subject, num_groups: int, shape: tuple[int, int], lead: tuple[int, ...], data: st.DataObject
) -> None:
    """A stack multiplies its part of x with each of its matrices, and adds up. Its gradients are those of each matrix."""
    num_rows, num_columns = shape
    weight = data.draw(ss.weights((num_groups * num_rows, num_columns), levels=ss.NARROW))
    w_ENK = dense(weight).reshape(num_groups, num_rows, num_columns)
    x, dy = _floats(data, *lead, num_groups * num_columns), _floats(data, *lead, num_rows)
    parts = x.to(torch.float64).split(num_columns, dim=-1)
    wide = dy.to(torch.float64)
    y = sum(part @ w.T for part, w in zip(parts, w_ENK, strict=True))
    same_sums(ops.linear(x, weight, num_groups=num_groups), y.to(x.dtype), "y")
    dx = torch.cat([wide @ w for w in w_ENK], dim=-1)
    same_sums(ops.linear_input_grad(dy, weight, num_groups=num_groups), dx.to(x.dtype), "dx")
    flat = wide.reshape(-1, num_rows).T
    dw = torch.cat([flat @ part.reshape(-1, num_columns) for part in parts])
    same_sums(ops.linear_weight_grad(dy, x, num_groups=num_groups), dw.to(torch.float32), "dW")


@law(
    weight=WEIGHTS,
    lead=ss.leading(),
    data=st.data(),
    rejects=[
        mutant("a_sum_that_is_overwritten", "out.copy_(out.to(wide) + dx)", "out.copy_(dx)",
               compared="linear_input_grad"),
        mutant("a_sum_that_is_returned_alone", "out.copy_(out.to(wide) + dx)", "(out.to(wide) + dx).to(out.dtype)"),
    ],
)  # fmt: skip
def test_linear_input_grad_is_added_to_a_sum(
    ops: Subject, weight: TernaryWeight, lead: tuple[int, ...], data: st.DataObject
) -> None:
    """A gradient that is given as `out` becomes the sum of both. It is a gradient too, so that every sum on the way is exact."""
    dy, other = _floats(data, 2, *lead, weight.shape[0])
    out = (other.to(torch.float64) @ dense(weight)).to(dy.dtype)
    want = out.to(torch.float64) + dy.to(torch.float64) @ dense(weight)
    same_sums(ops.linear_input_grad(dy, weight, out=out.clone()), want.to(out.dtype))


@law(
    shape=ss.matrix_shapes(150),
    rows=st.sampled_from((65, 66, 70, 129)),
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        mutant("a_sum_that_is_rounded_twice", "out.copy_(out.to(wide) + dx)", "out.copy_(out + dx.to(out.dtype))"),
    ],
)  # fmt: skip
def test_linear_input_grad_cancels_a_sum(ops: Subject, shape: tuple[int, int], rows: int, seed: int) -> None:
    """A gradient that is added to its own opposite, as bfloat16 has it, leaves exactly what bfloat16 had cut off.

    The sums are whole numbers that float32 holds in any order.
    """
    rng = ss.generator(seed)
    trits = torch.randint(-1, 2, shape, generator=rng).to(torch.int8)
    levels = torch.zeros(shape[0], groups_per_row(shape[1], 12), dtype=torch.int8)
    dy = torch.randint(-256, 257, (rows, shape[0]), generator=rng).to(torch.bfloat16)
    dx = dy.to(torch.float64) @ trits.to(torch.float64)
    out = -dx.to(torch.bfloat16)
    got = ops.linear_input_grad(dy, weight_of_trits(trits, levels, 12), out=out.clone())
    exact(got, (out.to(torch.float64) + dx).to(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 8, 64, 65])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_sum_with_an_input_gradient_is_rounded_once(subject: Subject, rows: int, contiguous: bool) -> None:
    """257 is no bfloat16, and 257 less 256 is 1. A kernel that rounds its product first gives 0."""
    grad = torch.zeros(rows, 16, dtype=torch.bfloat16)
    grad[:, 0], grad[:, 1] = 256, 1
    weight = reference_ops.constant_weight((16, 24), trit=1, exponent=0)
    out = torch.full((rows, 48), -256, dtype=torch.bfloat16)[:, ::2]
    got = subject.call("linear_input_grad", grad, weight, out=out.contiguous() if contiguous else out)
    exact(got.contiguous(), torch.ones(rows, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [0, 1])
def test_an_input_gradient_may_be_added_to_the_memory_of_its_gradient(
    subject: Subject, dtype: torch.dtype, beside: int
) -> None:
    """All of the gradient is read before the sum is written, also where a row lies in the place of the row before."""
    rng = ss.generator(3)
    trits = torch.randint(-1, 2, (96, 96), generator=rng).to(torch.int8)
    weight = weight_of_trits(trits, torch.zeros(96, groups_per_row(96, 12), dtype=torch.int8), 12)
    # The sums are whole numbers that bfloat16 holds.
    memory = torch.randint(-1, 2, (70 + beside, 96), generator=rng).to(subject.device, dtype)
    grad, out = memory[:70], memory[beside:]
    if not beside:
        grad = out
    want = (out.cpu().to(torch.float64) + grad.cpu().to(torch.float64) @ trits.to(torch.float64)).to(dtype)
    subject.raw("linear_input_grad")(grad, weight.to(subject.device), out=out)
    exact(out.cpu(), want)


@law(
    weight=WEIGHTS,
    data=st.data(),
    rejects=[
        mutant(
            "magnitudes_only",
            FORWARD,
            "return x @ dequantize(weight, dtype=x.dtype).abs().T",
            compared="linear",
        ),
    ],
)
def test_linear_negation(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Negating every trit negates the output."""
    x = _floats(data, 7, weight.shape[1])
    negated = weight.with_tensors(packed=ops.pack_trits(-ops.unpack_trits(weight.packed, weight.shape)))
    same_sums(ops.linear(x, negated), -ops.linear(x, weight))


@law(
    weight=WEIGHTS,
    data=st.data(),
    rejects=[TRANSPOSED_WEIGHT, LAST_COLUMN_DROPPED, INPUT_GRAD_OF_THEFORWARD, WEIGHT_GRAD_OF_THE_LAST_ROW],
)
def test_linear_adjoint(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """<dy, linear(x)> = <linear_input_grad(dy), x> = <linear_weight_grad(dy, x), W>, exactly."""
    x, dy = _floats(data, 3, 5, weight.shape[1]), _floats(data, 3, 5, weight.shape[0])
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    forward = dot(dy, ops.linear(x, weight))
    assert forward == dot(ops.linear_input_grad(dy, weight), x)
    assert forward == dot(ops.linear_weight_grad(dy, x), ops.dequantize(weight))


@law(weight=WEIGHTS, seed=ss.GENERATOR_SEEDS, data=st.data(), rejects=[TRANSPOSED_WEIGHT])
def test_linear_permutation(ops: Subject, weight: TernaryWeight, seed: int, data: st.DataObject) -> None:
    """Permuting the rows of W permutes the outputs."""
    order = torch.randperm(weight.shape[0], generator=ss.generator(seed))
    trits, exponents = trits_of(weight)[order], weight.exponents[order]
    permuted = weight_of_trits(trits, exponents, weight.group_size, mantissa_bits=weight.mantissa_bits)
    x = _floats(data, 5, weight.shape[1])
    same_sums(ops.linear(x, permuted), ops.linear(x, weight)[:, order])


@law(
    weight=WEIGHTS,
    data=st.data(),
    rejects=[
        mutant("zero_skips_nan", FORWARD, "return torch.nan_to_num(x) @ dequantize(weight, dtype=x.dtype).T"),
        mutant(
            "mean_over_the_batch",
            FORWARD,
            "return (x - 0.5 * x.reshape(-1, x.shape[-1])[:1]) @ dequantize(weight, dtype=x.dtype).T",
        ),
    ],
)
def test_linear_rows_are_independent(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """A row of activations gives the same output alone, and a NaN in it stays in its row."""
    x = _floats(data, 17, weight.shape[1]).clone()
    y = ops.linear(x, weight)
    same_sums(ops.linear(x[3], weight), y[3], "alone")
    x[3, -1] = float("nan")
    spoiled = ops.linear(x, weight)
    assert spoiled[3].isnan().all(), "a NaN times a trit of 0 is a NaN"
    keep = torch.arange(17) != 3
    same_sums(spoiled[keep], y[keep], "beside a NaN")


@law(
    weight=WEIGHTS,
    lead=st.sampled_from(((0,), (2, 0), (0, 3))),
    dtype=ss.DTYPES,
    rejects=[
        mutant(
            "empty_batch_of_one",
            WEIGHT_GRAD,
            "_stacked(grad_MN.T @ x_MK if x_MK.shape[0] else x_MK.new_ones(grad.shape[-1], x.shape[-1]), num_groups)",
            compared="linear_weight_grad",
        ),
    ],
)
def test_linear_of_an_empty_batch(
    ops: Subject, weight: TernaryWeight, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    num_rows, num_columns = weight.shape
    x, dy = torch.zeros(*lead, num_columns, dtype=dtype), torch.zeros(*lead, num_rows, dtype=dtype)
    exact(ops.linear(x, weight), dy)
    exact(ops.linear_input_grad(dy, weight), x)
    exact(ops.linear_weight_grad(dy, x), torch.zeros(num_rows, num_columns))
    exact(ops.linear_weight_grad(dy, x, dtype=dtype), torch.zeros(num_rows, num_columns, dtype=dtype))


@law(
    shape=ss.matrix_shapes(40),
    num_rows=st.sampled_from((1, 5, 33, 70)),
    dtype=ss.DTYPES,
    rate=st.sampled_from((0.25, 1.0, 1.25)),
    clock=ss.clocks(),
    data=st.data(),
    rejects=[ASCENT, WEIGHT_GRAD_IN_BFLOAT16],
)
def test_linear_backward_votes_disagree_only_at_boundaries(
    ops: Subject,
    shape: tuple[int, int],
    num_rows: int,
    dtype: torch.dtype,
    rate: float,
    clock: dict[str, Any],
    data: st.DataObject,
) -> None:
    """Votes from real activations are the votes of a gradient within its own error of the true gradient.

    Each vote lies between the votes of the true gradient less and plus that error; so where the error crosses no
    rounding boundary, the vote is the reference's. Rows whose exponent the error could change are exempt.
    """
    kinds = ("normal", "wild", "constant")
    dy = data.draw(ss.activations((num_rows, shape[0]), dtype, exact=False, kinds=kinds))
    x = data.draw(ss.activations((num_rows, shape[1]), dtype, exact=False, kinds=kinds))
    grad = ops.linear_weight_grad(dy, x)
    twin = reference_ops.linear_weight_grad(dy, x)
    wide = reference_ops.linear_weight_grad(dy.to(torch.float64), x.to(torch.float64))
    terms = reference_ops.linear_weight_grad(dy.to(torch.float64).abs(), x.to(torch.float64).abs())
    k = OP_TABLE["linear_weight_grad"].output.k
    no_worse(grad, twin=twin, wide=wide, magnitude=terms, k=k, what="the gradient")
    allowed = k * roundings(twin, wide, terms).max().item() + 1.0
    error = allowed * one_rounding(torch.float32, wide, terms)

    votes = ops.stochastic_votes(grad, rate, group_size=12, **clock).to(torch.int64)
    least = _row_exponent((wide.abs() - error).clamp(min=0.0))
    exponent = _row_exponent(wide.abs() + error)
    sure = least == exponent
    ids = torch.arange(shape[0] * -(-shape[1] // 12)).reshape(shape[0], -1)
    dither = reference_ops.dither_bytes(ids, group_size=12, **clock)[..., :12].reshape(shape[0], -1)[
        :, : shape[1]
    ]
    low, high = (_votes(value, exponent, rate, dither) for value in (wide - error, wide + error))
    outside = ((votes < low) | (votes > high)) & sure[:, None]
    assert not outside.any(), f"votes beyond the gradient's error at {outside.nonzero()[0].tolist()}"


def _row_exponent(grad: Tensor) -> Tensor:
    """Return V of float64 rows, and SILENT_ROW for rows of zeros."""
    found = [oracle.row_exponent(row) for row in grad.tolist()]
    return torch.tensor([SILENT_ROW if exponent is None else exponent for exponent in found])


def _votes(value: Tensor, exponent: Tensor, rate: float, dither: Tensor) -> Tensor:
    """Return the votes of a float64 gradient under known dither. Silent rows vote 0."""
    scaled = torch.ldexp(value, 8 - exponent[:, None]) * rate
    q = scaled.to(torch.float32).clamp(-32768.0, 32767.0).round().to(torch.int64)
    votes = torch.div(q + dither, 256, rounding_mode="floor").clamp(-127, 127)
    return torch.where(exponent[:, None] == SILENT_ROW, 0, votes)


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_linear = refusals(
    "linear",
    refused("linear", "float16", TypeError, "x", ones(2, 14, dtype=F16), weight),
    refused("linear", "int8", TypeError, "x", ones(2, 14, dtype=I8), weight),
    refused("linear", "13 columns", ValueError, "x", ones(2, 13), weight),
    refused("linear", "a scalar", ValueError, "x", ones(), weight),
    refused("linear", "another device", ValueError, "x", meta(2, 14), weight),
    refused("linear_input_grad", "14 columns for 3 rows", ValueError, "grad", ones(2, 14), weight),
    refused("linear_input_grad", "float16", TypeError, "grad", ones(2, 3, dtype=F16), weight),
    refused("linear_input_grad", "another device", ValueError, "grad", meta(2, 3), weight),
    refused("linear", "rows that do not divide", ValueError, "num_groups", ones(2, 28), weight, num_groups=2),
    refused("linear", "columns of one matrix of three", ValueError, "x", ones(2, 14), weight, num_groups=3),
    refused("linear", "no matrices", ValueError, "num_groups", ones(2, 14), weight, num_groups=0),
    refused("linear_input_grad", "rows of the whole stack", ValueError, "grad", ones(2, 3), weight, num_groups=3),
    refused("linear_input_grad", "a sum of another shape", ValueError, "out", ones(2, 3), weight, out=ones(2, 13)),
    refused("linear_input_grad", "a sum of another dtype", TypeError,
            "out", ones(2, 3), weight, out=ones(2, 14, dtype=torch.bfloat16)),
    refused("linear_input_grad", "a sum elsewhere", ValueError, "out", ones(2, 3), weight, out=meta(2, 14)),
    refused("linear_weight_grad", "columns that do not divide", ValueError,
            "num_groups", ones(2, 3), ones(2, 14), num_groups=3),
    refused("linear_weight_grad", "other rows", ValueError, "x", ones(2, 3), ones(3, 14)),
    refused("linear_weight_grad", "two dtypes", TypeError, "x", ones(2, 3), ones(2, 14, dtype=torch.bfloat16)),
    refused("linear_weight_grad", "two devices", ValueError, "x", ones(2, 3), meta(2, 14)),
    refused("linear_weight_grad", "no rows of the weight", ValueError, "grad", ones(2, 0), ones(2, 14)),
    refused("linear_weight_grad", "no columns of the weight", ValueError, "x", ones(2, 3), ones(2, 0)),
    refused("linear_weight_grad", "a gradient in float16", TypeError, "dtype", ones(2, 3), ones(2, 14), dtype=F16),
    refused("linear_weight_grad", "a gradient in float64", TypeError,
            "dtype", ones(2, 3), ones(2, 14), dtype=torch.float64),
    refused("linear_weight_grad", "a dtype by its name", TypeError,
            "dtype", ones(2, 3), ones(2, 14), dtype="bfloat16"),
    refused("linear_weight_grad", "a scalar x", ValueError, "x", ones(3), ones()),
    refused("linear_weight_grad", "a scalar grad", ValueError, "grad", ones(), ones(14)),
    rejects=[
        mutant("linear_dtypes_unchecked", 'checks.same_dtype("x", x, "grad", grad)', "pass"),
    ],
)
# fmt: on
