"""Laws of the experts: each slot meets the matrix of its own expert, and of no other, in any order of slots.

Legend: E experts, N outputs of an expert, K inputs, M slots.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.checks import GRADIENT_DTYPES
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls, compare
from ..compare import exact, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, I8, ids, meta, ones, refusals, refused, weight
from ..subject import Subject, needs_cuda

mutant = mutants_of("experts")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


EXPERTS = st.sampled_from((1, 2, 5, 8))
"""Numbers of experts worth trying."""


@st.composite
def expert_ids(draw: st.DrawFn, num_groups: int, num_slots: int | None = None) -> Tensor:
    """Draw the expert of each slot: dealt out, all on one expert, few of them used, or unused slots among them."""
    # 1 slot is few for eight experts. 200 slots of one expert fill another tile.
    if num_slots is None:
        num_slots = draw(st.sampled_from((0, 1, 2, 4, 17, 40, 70, 200)), label="M")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    kind = draw(st.sampled_from(("some unused", "any", "one", "none")), label="experts")
    if kind == "none":
        return torch.full((num_slots,), -1)
    one = int(torch.randint(num_groups, (), generator=rng))
    if kind == "one":
        return torch.full((num_slots,), one)
    return torch.randint(-1 if kind == "some unused" else 0, num_groups, (num_slots,), generator=rng)


@st.composite
def sizes(draw: st.DrawFn, limit: int = 40) -> tuple[int, int, int]:
    """Draw (E, N, K) of a stacked weight."""
    # These sizes give several tiles of columns and of outputs, ragged ones.
    if draw(st.integers(0, 4)) == 0:
        wide = st.sampled_from((65, 130, 200))
        return draw(st.sampled_from((1, 2)), label="E"), draw(wide, label="N"), draw(wide, label="K")
    num_groups = draw(EXPERTS, label="E")
    num_rows, num_columns = draw(ss.matrix_shapes(limit))
    return num_groups, max(1, min(num_rows, 120 // num_groups)), num_columns


@st.composite
def slot_values(
    draw: st.DrawFn,
    slots: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    *,
    exact: bool,
    kinds: tuple[str, ...] = (),
) -> Tensor:
    """Draw the activations of slots. Slots of several dimensions often share one row in memory along the last of these."""
    if len(slots) == 1 or not draw(st.booleans(), label="shared rows"):
        return draw(ss.activations((*slots, width), dtype, exact=exact, kinds=kinds))
    rows = draw(ss.activations((*slots[:-1], width), dtype, exact=exact, kinds=kinds))
    return rows.unsqueeze(-2).expand(*slots, width)


def in_dimensions(draw: st.DrawFn, experts: Tensor) -> Tensor:
    """Return the experts of slots, half of the time those of two slots a position."""
    if experts.numel() % 2 == 0 and draw(st.booleans(), label="two slots a position"):
        return experts.reshape(experts.numel() // 2, 2)
    return experts


@calls("grouped_linear", "grouped_linear_input_grad")
def grouped_linear_calls(draw: st.DrawFn, op: str) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    num_groups, num_rows, num_columns = draw(sizes())
    levels = ss.NARROW if exact_sums else None
    shape = (num_groups * num_rows, num_columns)
    weight = draw(ss.weights(shape, levels=levels))
    experts = in_dimensions(draw, draw(expert_ids(num_groups)))
    # a product of 1e30 with 2**15 fits float32, and so does the sum of a row of them
    width = num_rows if op == "grouped_linear_input_grad" else num_columns
    values = draw(slot_values(tuple(experts.shape), width, dtype, exact=exact_sums))
    return Case((values, weight, experts), {"num_groups": num_groups}, sums_exact=exact_sums)


@calls("grouped_linear_weight_grad")
def grouped_linear_weight_grad_calls(draw: st.DrawFn) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    num_groups, num_rows, num_columns = draw(sizes())
    experts = in_dimensions(draw, draw(expert_ids(num_groups)))
    kinds = ("normal", "wild", "faint", "constant")
    both = [
        draw(slot_values(tuple(experts.shape), width, dtype, exact=exact_sums, kinds=kinds))
        for width in (num_rows, num_columns)
    ]
    kwargs: dict[str, Any] = {"num_groups": num_groups}
    if draw(st.booleans(), label="in bfloat16"):
        kwargs["dtype"] = torch.bfloat16
    return Case((*both, experts), kwargs, sums_exact=exact_sums)


@calls("expert_load")
def expert_load_calls(draw: st.DrawFn) -> Case:
    num_groups = draw(st.one_of(EXPERTS, st.just(64)))
    experts = draw(expert_ids(num_groups, draw(st.sampled_from((0, 1, 12, 300)))))
    if draw(st.booleans(), label="matrix"):
        experts = experts.repeat(2).reshape(2, experts.numel()).T
    return Case((experts,), {"num_groups": num_groups})


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


NARROW_WIDTHS = st.sampled_from((1, 2, 4, 8, 16))


@st.composite
def stacked(draw: st.DrawFn) -> tuple[TernaryWeight, int]:
    """Draw a stacked weight whose sums are exact, and its number of experts."""
    num_groups, num_rows, num_columns = draw(sizes())
    shape = (num_groups * num_rows, num_columns)
    return draw(ss.weights(shape, levels=ss.NARROW)), num_groups


def matrices(weight: TernaryWeight, num_groups: int) -> Tensor:
    """Return the matrices of all experts in float64, [E, N, K], by the plain-Python oracle."""
    w_NK = torch.tensor(oracle.dense(weight), dtype=torch.float64)
    return w_NK.reshape(num_groups, -1, weight.shape[1])


def _floats(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return data.draw(ss.activations(shape, dtype, exact=True))


EXPERTS_INTERLEAVED = mutant(
    "experts_interleaved",
    "torch.arange(expert * num_rows, (expert + 1) * num_rows, device",
    "torch.arange(expert, weight.shape[0], weight.shape[0] // num_rows, device",
    compared=("grouped_linear", "grouped_linear_input_grad"),
)
UNUSED_SLOTS_TAKE_THE_FIRST_EXPERT = mutant(
    "unused_slots_take_the_first_expert",
    "slots = experts_M == expert",
    "slots = experts_M.clamp(min=0) == expert",
    compared=("grouped_linear", "grouped_linear_weight_grad"),
    times=3,
)
SLOTS_SORTED_AND_NOT_PUT_BACK = mutant(
    "slots_sorted_and_not_put_back",
    "y_MN[slots] = (x_MK[slots].to(wide)",
    "y_MN[slots] = (x_MK[slots.sort(descending=True).values].to(wide)",
    compared="grouped_linear",
)


@law(
    made=stacked(),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[EXPERTS_INTERLEAVED, UNUSED_SLOTS_TAKE_THE_FIRST_EXPERT, SLOTS_SORTED_AND_NOT_PUT_BACK],
)
def test_grouped_linear_by_slot(
    ops: Subject, made: tuple[TernaryWeight, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Each slot is the product with the matrix of its expert, forward and backward. Unused slots are zeros."""
    weight, num_groups = made
    experts = data.draw(expert_ids(num_groups))
    w_ENK = matrices(weight, num_groups)
    x = _floats(data, experts.numel(), w_ENK.shape[2], dtype=dtype)
    dy = _floats(data, experts.numel(), w_ENK.shape[1], dtype=dtype)
    y, dx = torch.zeros_like(dy, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    for slot, expert in enumerate(experts.tolist()):
        if expert >= 0:
            y[slot] = w_ENK[expert] @ x[slot].to(torch.float64)
            dx[slot] = dy[slot].to(torch.float64) @ w_ENK[expert]
    same_sums(ops.grouped_linear(x, weight, experts, num_groups=num_groups), y.to(dtype), "y")
    same_sums(ops.grouped_linear_input_grad(dy, weight, experts, num_groups=num_groups), dx.to(dtype), "dx")


@law(
    width=NARROW_WIDTHS,
    height=NARROW_WIDTHS,
    dtype=ss.DTYPES,
    data=st.data(),
    share=0.4,
    rejects=[EXPERTS_INTERLEAVED],
)
def test_grouped_linear_of_narrow_matrices(
    ops: Subject, width: int, height: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Widths below what a tensor core sums at once, where a compiler may count a term twice (Triton 3.6 did)."""
    weight = data.draw(ss.weights((2 * height, width), levels=ss.NARROW))
    w_ENK, experts = matrices(weight, 2), torch.tensor([1, 0, 1, 1])
    x, dy = _floats(data, 4, width, dtype=dtype), _floats(data, 4, height, dtype=dtype)
    y = (w_ENK[experts] @ x.to(torch.float64)[:, :, None])[:, :, 0]
    dx = (dy.to(torch.float64)[:, None, :] @ w_ENK[experts])[:, 0, :]
    same_sums(ops.grouped_linear(x, weight, experts, num_groups=2), y.to(dtype), "y")
    same_sums(ops.grouped_linear_input_grad(dy, weight, experts, num_groups=2), dx.to(dtype), "dx")


GROUPED_WEIGHT_GRAD_BY_ROW = mutant(
    "grouped_weight_grad_by_row",
    "grads_ENK.flatten(0, 1).to",
    "grads_ENK.transpose(0, 1).reshape(-1, x_MK.shape[1]).to",
    compared="grouped_linear_weight_grad",
)


@law(
    shape=sizes(),
    dtype=ss.DTYPES,
    made=st.sampled_from(GRADIENT_DTYPES),
    data=st.data(),
    rejects=[
        UNUSED_SLOTS_TAKE_THE_FIRST_EXPERT,
        mutant(
            "grouped_weight_grad_in_the_dtype_of_x",
            "= grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)",
            "= (grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)).to(x_MK.dtype)",
            compared="grouped_linear_weight_grad",
        ),
        GROUPED_WEIGHT_GRAD_BY_ROW,
    ],
)
def test_grouped_linear_weight_grad_by_slot(
    ops: Subject, shape: tuple[int, int, int], dtype: torch.dtype, made: torch.dtype, data: st.DataObject
) -> None:
    """Every slot adds its outer product to its expert in float32, and a sum is rounded once. Experts without a slot have zeros."""
    experts = data.draw(expert_ids(shape[0]))
    dy, x = (_floats(data, experts.numel(), width, dtype=dtype) for width in shape[1:])
    want = torch.zeros(shape, dtype=torch.float64)
    for slot, expert in enumerate(experts.tolist()):
        if expert >= 0:
            want[expert] += torch.outer(dy[slot].to(torch.float64), x[slot].to(torch.float64))
    got = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=shape[0], dtype=made)
    same_sums(got, want.flatten(0, 1).to(made))


@law(
    counts=st.lists(st.sampled_from((1100, 513, 512, 255, 33, 1, 0)), min_size=1, max_size=2),
    seed=ss.GENERATOR_SEEDS,
    dtype=ss.DTYPES,
    made=st.sampled_from(GRADIENT_DTYPES),
    data=st.data(),
    rejects=[
        mutant(
            "grouped_weight_grad_of_a_hundred_slots",
            "= grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)",
            "= grad_MN[slots][:100].to(wide).T @ x_MK[slots][:100].to(wide)",
        ),
        mutant(
            "grouped_weight_grad_of_rounded_parts",
            "= grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)",
            "= sum((dy.to(wide).T @ x.to(wide)).to(dtype).to(wide)\n"
            "            for dy, x in zip(grad_MN[slots].split(16), x_MK[slots].split(16)))",
            compared="grouped_linear_weight_grad",
        ),
    ],
)
def test_grouped_linear_weight_grad_of_frequent_experts(
    ops: Subject, counts: list[int], seed: int, dtype: torch.dtype, made: torch.dtype, data: st.DataObject
) -> None:
    """Experts of hundreds of slots, or of none: each slot counts, and counts once. Sums are rounded when they are whole."""
    num_groups = len(counts)
    experts = torch.arange(-1, num_groups).repeat_interleave(torch.tensor([3, *counts]))
    experts = experts[torch.randperm(len(experts), generator=ss.generator(seed))]
    dy = _floats(data, experts.numel(), 3, dtype=dtype)
    x = _floats(data, experts.numel(), 5, dtype=dtype)
    got = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups, dtype=made)
    of_expert = [experts == expert for expert in range(num_groups)]
    wide_dy, wide_x = dy.to(torch.float64), x.to(torch.float64)
    want = torch.cat([wide_dy[own].T @ wide_x[own] for own in of_expert])
    same_sums(got, want.to(made), "dW")


def test_grouped_linear_weight_grad_of_a_large_expert(subject: Subject) -> None:
    """A tile has more slots where experts have many, with the same bits. Rows of an odd multiple of 8 are read eight at a time."""
    needs_cuda(subject, "tiles of a matrix of 712 x 520")
    dy, x = (ss.float_values((1000, width), "normal", width).to(torch.bfloat16) for width in (712, 520))
    experts = torch.arange(2).repeat_interleave(torch.tensor([100, 900]))
    alone = subject.call("grouped_linear_weight_grad", dy[:100], x[:100], experts[:100], num_groups=2)
    beside = subject.call("grouped_linear_weight_grad", dy, x, experts, num_groups=2)
    exact(beside[:712], alone[:712], "beside 900 slots")
    compare(subject, "grouped_linear_weight_grad", Case((dy, x, experts), {"num_groups": 2}))


@law(
    made=stacked(),
    data=st.data(),
    share=0.5,
    rejects=[
        EXPERTS_INTERLEAVED,
        mutant(
            "grouped_input_grad_of_the_first_expert",
            "grad_MN[slots].to(wide) @ _matrix(weight, expert, num_rows, wide)",
            "grad_MN[slots].to(wide) @ _matrix(weight, 0, num_rows, wide)",
            compared="grouped_linear_input_grad",
        ),
        GROUPED_WEIGHT_GRAD_BY_ROW,
    ],
)
def test_grouped_linear_adjoint(ops: Subject, made: tuple[TernaryWeight, int], data: st.DataObject) -> None:
    """<dy, grouped_linear(x)> = <grouped_linear_input_grad(dy), x> = <grouped_linear_weight_grad(dy, x), W>, exactly."""
    weight, num_groups = made
    experts = data.draw(expert_ids(num_groups))
    x = _floats(data, experts.numel(), weight.shape[1])
    dy = _floats(data, experts.numel(), weight.shape[0] // num_groups)
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    forward = dot(dy, ops.grouped_linear(x, weight, experts, num_groups=num_groups))
    assert forward == dot(ops.grouped_linear_input_grad(dy, weight, experts, num_groups=num_groups), x)
    grad = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups)
    assert forward == dot(grad, ops.dequantize(weight))


@law(made=stacked(), seed=ss.GENERATOR_SEEDS, data=st.data(), rejects=[SLOTS_SORTED_AND_NOT_PUT_BACK])
def test_grouped_linear_ignores_the_order_of_slots(
    ops: Subject, made: tuple[TernaryWeight, int], seed: int, data: st.DataObject
) -> None:
    weight, num_groups = made
    experts = data.draw(expert_ids(num_groups, data.draw(st.sampled_from((1, 4, 17, 40)))))
    order = torch.randperm(experts.numel(), generator=ss.generator(seed))
    x = _floats(data, experts.numel(), weight.shape[1])
    y = ops.grouped_linear(x, weight, experts, num_groups=num_groups)
    same_sums(ops.grouped_linear(x[order], weight, experts[order], num_groups=num_groups), y[order])
    dy = _floats(data, experts.numel(), weight.shape[0] // num_groups)
    grad = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups)
    permuted = ops.grouped_linear_weight_grad(dy[order], x[order], experts[order], num_groups=num_groups)
    same_sums(permuted, grad)


@law(
    made=stacked(),
    count=st.sampled_from((2, 17)),
    data=st.data(),
    share=0.4,
    rejects=[
        mutant(
            "unused_slots_kept_as_they_were",
            "    for expert in _used(experts_M):",
            "    if not _used(experts_M) or (experts_M < 0).any():\n        experts_M = experts_M.clamp(min=0)\n"
            "    for expert in _used(experts_M):",
            times=3,
        ),
    ],
)
def test_grouped_linear_slots_are_independent(
    ops: Subject, made: tuple[TernaryWeight, int], count: int, data: st.DataObject
) -> None:
    """A NaN stays in its slot and in the gradient of its expert. A NaN in an unused slot shows nowhere."""
    weight, num_groups = made
    # Every row is an expert, so two slots are few.
    if count == 2:
        num_groups = weight.shape[0]
    experts = torch.arange(count) % num_groups
    x = _floats(data, count, weight.shape[1]).clone()
    dy = _floats(data, count, weight.shape[0] // num_groups).clone()
    y = ops.grouped_linear(x, weight, experts, num_groups=num_groups)
    dx = ops.grouped_linear_input_grad(dy, weight, experts, num_groups=num_groups)
    x[1, -1] = dy[1, -1] = float("nan")
    spoiled = ops.grouped_linear(x, weight, experts, num_groups=num_groups)
    assert spoiled[1].isnan().all(), "a NaN times a trit of 0 is a NaN"
    keep = torch.arange(count) != 1
    same_sums(spoiled[keep], y[keep], "y beside a NaN")
    back = ops.grouped_linear_input_grad(dy, weight, experts, num_groups=num_groups)
    same_sums(back[keep], dx[keep], "dx beside a NaN")
    experts[1] = -1
    without = ops.grouped_linear(x, weight, experts, num_groups=num_groups)
    assert not without[1].any(), "an unused slot is not zero"
    grad = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups)
    assert grad.isfinite().all(), "an unused slot shows in a gradient"


@law(
    num_groups=EXPERTS,
    count=st.sampled_from((0, 1, 40)),
    data=st.data(),
    rejects=[
        mutant(
            "unused_slots_counted",
            "experts.flatten() + 1, minlength=num_groups + 1)[1:]",
            "experts.flatten().clamp(min=0), minlength=num_groups)",
            compared="expert_load",
        ),
    ],
)
def test_expert_load_counts(ops: Subject, num_groups: int, count: int, data: st.DataObject) -> None:
    """As counted one by one, unused slots left out, in any shape."""
    experts = data.draw(expert_ids(num_groups, count))
    want = torch.tensor([experts.tolist().count(expert) for expert in range(num_groups)])
    exact(ops.expert_load(experts, num_groups=num_groups), want)
    exact(ops.expert_load(experts.reshape(count, 1).flip(0), num_groups=num_groups), want)


@law(
    made=stacked(),
    dtype=ss.DTYPES,
    rejects=[
        mutant(
            "no_slots_no_shape",
            "    y_MN = torch.zeros(*x_MK.shape[:-1], num_rows,",
            "    y_MN = torch.zeros(max(1, x_MK.shape[0]), *x_MK.shape[1:-1], num_rows,",
            compared="grouped_linear",
        ),
    ],
)
def test_grouped_linear_of_no_slots(
    ops: Subject, made: tuple[TernaryWeight, int], dtype: torch.dtype
) -> None:
    weight, num_groups = made
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, weight.shape[1], dtype=dtype)
    dy = torch.zeros(0, weight.shape[0] // num_groups, dtype=dtype)
    exact(ops.grouped_linear(x, weight, none, num_groups=num_groups), dy)
    exact(ops.grouped_linear_input_grad(dy, weight, none, num_groups=num_groups), x)
    grad = ops.grouped_linear_weight_grad(dy, x, none, num_groups=num_groups)
    exact(grad, torch.zeros(weight.shape))


# Only the comparison with the reference rejects these.
mutant(
    "grouped_sums_in_bfloat16",
    "    wide = wide_dtype(x_MK)\n    y_MN",
    "    wide = x_MK.dtype\n    x_MK = x_MK.to(torch.bfloat16).to(wide)\n    y_MN",
    compared="grouped_linear",
)


# --- what is refused -------------------------------------------------------------------------------------------------


_SIX = lambda: weight(6)  # noqa: E731  three experts of two rows
_BF16 = torch.bfloat16


# fmt: off
test_refusals_of_experts = refusals(
    "experts",
    refused("grouped_linear", "expert E", ValueError, "experts_M", ones(2, 14), _SIX, ids(0, 3), num_groups=3),
    refused("grouped_linear", "expert -2", ValueError, "experts_M", ones(2, 14), _SIX, ids(0, -2), num_groups=3),
    refused("grouped_linear", "another number of slots", ValueError,
            "experts_M", ones(2, 14), _SIX, ids(0), num_groups=3),
    refused("grouped_linear", "int32 experts", TypeError,
            "experts_M", ones(2, 14), _SIX, ones(2, dtype=torch.int32), num_groups=3),
    refused("grouped_linear", "a matrix of experts", ValueError,
            "experts_M", ones(2, 14), _SIX, ones(2, 1, dtype=torch.int64), num_groups=3),
    refused("grouped_linear", "rows that do not divide", ValueError,
            "num_groups", ones(2, 14), _SIX, ids(0, 1), num_groups=4),
    refused("grouped_linear", "no groups", ValueError, "num_groups", ones(2, 14), _SIX, ids(0, 1), num_groups=0),
    refused("grouped_linear", "13 columns", ValueError, "x_MK", ones(2, 13), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear", "one dimension", ValueError, "x_MK", ones(14), _SIX, ids(0), num_groups=3),
    refused("grouped_linear", "slots of other dimensions", ValueError,
            "experts_M", ones(1, 2, 14), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear", "float16", TypeError, "x_MK", ones(2, 14, dtype=F16), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear", "another device", ValueError, "x_MK", meta(2, 14), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "one dimension", ValueError,
            "grad_MN", ones(2), _SIX, lambda: torch.tensor(0), num_groups=3),
    refused("grouped_linear_input_grad", "six columns", ValueError,
            "grad_MN", ones(2, 6), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "int8", TypeError,
            "grad_MN", ones(2, 2, dtype=I8), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "expert E", ValueError,
            "experts_M", ones(2, 2), _SIX, ids(0, 3), num_groups=3),
    refused("grouped_linear_input_grad", "another number of slots", ValueError,
            "experts_M", ones(2, 2), _SIX, ids(0), num_groups=3),
    refused("grouped_linear_input_grad", "int32 experts", TypeError,
            "experts_M", ones(2, 2), _SIX, ones(2, dtype=torch.int32), num_groups=3),
    refused("grouped_linear_input_grad", "another device", ValueError,
            "grad_MN", meta(2, 2), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "rows that do not divide", ValueError,
            "num_groups", ones(2, 2), _SIX, ids(0, 1), num_groups=4),
    refused("grouped_linear_weight_grad", "two dtypes", TypeError,
            "x_MK", ones(2, 3), ones(2, 14, dtype=_BF16), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "other slots", ValueError,
            "x_MK", ones(2, 3), ones(3, 14), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "a gradient in float16", TypeError,
            "dtype", ones(2, 3), ones(2, 14), ids(0, 1), num_groups=3, dtype=F16),
    refused("grouped_linear_weight_grad", "no columns", ValueError,
            "grad_MN", ones(2, 0), ones(2, 14), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "expert E", ValueError,
            "experts_M", ones(2, 3), ones(2, 14), ids(0, 3), num_groups=3),
    refused("grouped_linear_weight_grad", "another number of slots", ValueError,
            "experts_M", ones(2, 3), ones(2, 14), ids(0), num_groups=3),
    refused("grouped_linear_weight_grad", "two devices", ValueError,
            "x_MK", ones(2, 3), meta(2, 14), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "no groups", ValueError,
            "num_groups", ones(2, 3), ones(2, 14), ids(0, 1), num_groups=0),
    refused("expert_load", "expert E", ValueError, "experts", ids(0, 3), num_groups=3),
    refused("expert_load", "expert -2", ValueError, "experts", ids(-2), num_groups=3),
    refused("expert_load", "float32", TypeError, "experts", ones(2), num_groups=3),
    refused("expert_load", "no groups", ValueError, "num_groups", ids(0), num_groups=0),
    rejects=[
        mutant(
            "experts_unchecked",
            'checks.values_between("experts_M", experts_M, -1, num_groups - 1)',
            "pass",
            times=3
        ),
    ],
)
# fmt: on
