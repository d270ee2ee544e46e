"""Laws of the experts: each slot meets the matrix of its own expert, and of no other, in any order of slots.

Legend: E experts, N outputs of an expert, K inputs, M slots.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance import oracle
from conformance import strategies as ss
from conformance.cases.codebook import vectors
from conformance.cases.core import NARROW
from conformance.cases.experts import EXPERTS, expert_ids, routers, sizes
from conformance.compare import exact, unsigned_zeros
from conformance.law import law
from conformance.report import needs_cuda
from conformance.subject import Subject

NARROW_WIDTHS = st.sampled_from((1, 2, 4, 8, 16))


@st.composite
def stacked(draw: st.DrawFn) -> tuple[TernaryWeight, int]:
    """Draw a stacked weight whose sums are exact, and its number of experts."""
    num_groups, num_rows, num_columns = draw(sizes())
    shape = (num_groups * num_rows, num_columns)
    return draw(ss.weights(shape, levels=NARROW)), num_groups


def matrices(weight: TernaryWeight, num_groups: int) -> Tensor:
    """Return the matrices of all experts in float64, [E, N, K], by the plain-Python oracle."""
    w_NK = torch.tensor(oracle.dense(weight), dtype=torch.float64)
    return w_NK.reshape(num_groups, -1, weight.shape[1])


def _equal(got: Tensor, want: Tensor, what: str = "output") -> None:
    """Compare sums that are exact in any order: equal bits, once their zeros have no sign."""
    exact(unsigned_zeros(got), unsigned_zeros(want.to(got.dtype)), what)


def _floats(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return data.draw(ss.activations(shape, dtype, exact=True))


def seen_levels(weight: TernaryWeight) -> list[list[int]]:
    """Return the levels of a router's weight as the choice sees them, by plain Python: 16 octaves at most."""
    rows = weight.exponents.tolist()
    least = max(map(max, rows)) - (16 << weight.mantissa_bits)
    return [[max(level, least) for level in row] for row in rows]


def sixteenths(x: float) -> int:
    """Return a number in whole sixteenths, by plain Python, whose round takes halves to even."""
    return 0 if math.isnan(x) else round(min(max(16 * x, -127.0), 127.0))


@law(weight=routers(), data=st.data())
def test_choose_experts_by_fractions(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """By scores without a rounding error, largest first, ties to the lowest expert; the chosen in ascending order."""
    x = data.draw(vectors(weight.shape[1]))
    top_k = data.draw(st.integers(1, weight.shape[0]), label="k")
    x_MK = x.reshape(-1, weight.shape[1])[:5]
    scales = [[oracle.scale(level, weight.mantissa_bits) for level in row] for row in seen_levels(weight)]
    trits = oracle.unpack(weight.packed.tolist(), math.prod(weight.shape))
    want = []
    for row in x_MK.tolist():
        steps = list(map(sixteenths, row))
        scores = [
            sum(trits[e * len(row) + k] * of[k // weight.group_size] * step for k, step in enumerate(steps))
            for e, of in enumerate(scales)
        ]
        want.append(sorted(sorted(range(len(scores)), key=lambda e, s=scores: -s[e])[:top_k]))
    got = ops.choose_experts(x_MK, weight, top_k=top_k)
    exact(got, torch.tensor(want, dtype=torch.int64).reshape(len(want), top_k))


@law(weight=routers(), data=st.data())
def test_choose_experts_lets_the_lowest_of_equal_rows_win(
    ops: Subject, weight: TernaryWeight, data: st.DataObject
) -> None:
    """A router beside its own copy: the first of each pair comes before the second, whatever the vector."""
    twice = weight_of_trits(
        trits_of(weight).repeat(2, 1),
        weight.exponents.repeat(2, 1),
        weight.group_size,
        mantissa_bits=weight.mantissa_bits,
    )
    x, num_experts = data.draw(vectors(weight.shape[1])), weight.shape[0]
    top_k = data.draw(st.integers(1, 2 * num_experts), label="k")
    chosen = ops.choose_experts(x, twice, top_k=top_k)
    assert chosen.shape == (*x.shape[:-1], top_k)
    for row in chosen.reshape(-1, top_k).tolist():
        assert all(expert - num_experts in row for expert in row if expert >= num_experts), row


@law(weight=routers(), data=st.data(), share=0.5)
def test_choose_experts_of_each_vector_alone(
    ops: Subject, weight: TernaryWeight, data: st.DataObject
) -> None:
    """What a vector chooses depends neither on what comes with it nor on its place."""
    x = data.draw(vectors(weight.shape[1])).reshape(-1, weight.shape[1])
    top_k = data.draw(st.integers(1, weight.shape[0]), label="k")
    together = ops.choose_experts(x, weight, top_k=top_k)
    exact(ops.choose_experts(x.flip(0), weight, top_k=top_k).flip(0), together, "in another order")
    for place in range(min(len(x), 3)):
        exact(ops.choose_experts(x[place], weight, top_k=top_k), together[place], "alone")


@law(made=stacked(), dtype=ss.DTYPES, data=st.data())
def test_grouped_linear_by_slot(
    ops: Subject, made: tuple[TernaryWeight, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Slot by slot: the product with the matrix of the slot's expert, forward and backward; zeros for unused slots."""
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
    _equal(ops.grouped_linear(x, weight, experts, num_groups=num_groups), y.to(dtype), "y")
    _equal(ops.grouped_linear_input_grad(dy, weight, experts, num_groups=num_groups), dx.to(dtype), "dx")


@law(width=NARROW_WIDTHS, height=NARROW_WIDTHS, dtype=ss.DTYPES, data=st.data(), share=0.4)
def test_grouped_linear_of_narrow_matrices(
    ops: Subject, width: int, height: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Widths below what a tensor core sums at once, where a compiler may count a term twice (Triton 3.6 did)."""
    weight = data.draw(ss.weights((2 * height, width), levels=NARROW))
    w_ENK, experts = matrices(weight, 2), torch.tensor([1, 0, 1, 1])
    x, dy = _floats(data, 4, width, dtype=dtype), _floats(data, 4, height, dtype=dtype)
    y = (w_ENK[experts] @ x.to(torch.float64)[:, :, None])[:, :, 0]
    dx = (dy.to(torch.float64)[:, None, :] @ w_ENK[experts])[:, 0, :]
    _equal(ops.grouped_linear(x, weight, experts, num_groups=2), y, "y")
    _equal(ops.grouped_linear_input_grad(dy, weight, experts, num_groups=2), dx, "dx")


@law(shape=sizes(), dtype=ss.DTYPES, data=st.data())
def test_grouped_linear_weight_grad_by_slot(
    ops: Subject, shape: tuple[int, int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Every slot adds its outer product to its expert, in float32; experts that no slot uses have zeros."""
    experts = data.draw(expert_ids(shape[0]))
    dy, x = (_floats(data, experts.numel(), width, dtype=dtype) for width in shape[1:])
    want = torch.zeros(shape, dtype=torch.float64)
    for slot, expert in enumerate(experts.tolist()):
        if expert >= 0:
            want[expert] += torch.outer(dy[slot].to(torch.float64), x[slot].to(torch.float64))
    got = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=shape[0])
    _equal(got, want.flatten(0, 1).to(torch.float32))


@law(
    counts=st.lists(st.sampled_from((1100, 513, 512, 255, 33, 1, 0)), min_size=1, max_size=2),
    seed=ss.GENERATOR_SEEDS,
    dtype=ss.DTYPES,
    data=st.data(),
)
def test_grouped_linear_weight_grad_of_frequent_experts(
    ops: Subject, counts: list[int], seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Experts of hundreds of slots, or of none: each slot counts, and counts once."""
    num_groups = len(counts)
    experts = torch.arange(-1, num_groups).repeat_interleave(torch.tensor([3, *counts]))
    experts = experts[torch.randperm(len(experts), generator=ss.generator(seed))]
    dy = _floats(data, experts.numel(), 3, dtype=dtype)
    x = _floats(data, experts.numel(), 5, dtype=dtype)
    got = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups)
    of_expert = [experts == expert for expert in range(num_groups)]
    wide_dy, wide_x = dy.to(torch.float64), x.to(torch.float64)
    _equal(got, torch.cat([wide_dy[own].T @ wide_x[own] for own in of_expert]), "dW")


@law(made=stacked(), data=st.data(), share=0.5)
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


@law(made=stacked(), seed=ss.GENERATOR_SEEDS, data=st.data())
def test_grouped_linear_ignores_the_order_of_slots(
    ops: Subject, made: tuple[TernaryWeight, int], seed: int, data: st.DataObject
) -> None:
    weight, num_groups = made
    experts = data.draw(expert_ids(num_groups))
    order = torch.randperm(experts.numel(), generator=ss.generator(seed))
    x = _floats(data, experts.numel(), weight.shape[1])
    y = ops.grouped_linear(x, weight, experts, num_groups=num_groups)
    _equal(ops.grouped_linear(x[order], weight, experts[order], num_groups=num_groups), y[order])
    dy = _floats(data, experts.numel(), weight.shape[0] // num_groups)
    grad = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups)
    permuted = ops.grouped_linear_weight_grad(dy[order], x[order], experts[order], num_groups=num_groups)
    _equal(permuted, grad)


@law(made=stacked(), count=st.sampled_from((2, 17)), data=st.data(), share=0.4)
def test_grouped_linear_slots_are_independent(
    ops: Subject, made: tuple[TernaryWeight, int], count: int, data: st.DataObject
) -> None:
    """A NaN stays in its slot and in the gradient of its expert; an unused slot may hold one and shows nothing of it."""
    weight, num_groups = made
    if count == 2:  # an expert a row: two slots are few
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
    _equal(spoiled[keep], y[keep], "y beside a NaN")
    back = ops.grouped_linear_input_grad(dy, weight, experts, num_groups=num_groups)
    _equal(back[keep], dx[keep], "dx beside a NaN")
    experts[1] = -1
    without = ops.grouped_linear(x, weight, experts, num_groups=num_groups)
    assert not without[1].any(), "an unused slot is not zero"
    grad = ops.grouped_linear_weight_grad(dy, x, experts, num_groups=num_groups)
    assert grad.isfinite().all(), "an unused slot shows in a gradient"


@law(num_groups=EXPERTS, count=st.sampled_from((0, 1, 40)), data=st.data())
def test_expert_load_counts(ops: Subject, num_groups: int, count: int, data: st.DataObject) -> None:
    """As counted one by one, unused slots left out, in any shape."""
    experts = data.draw(expert_ids(num_groups, count))
    want = torch.tensor([experts.tolist().count(expert) for expert in range(num_groups)])
    exact(ops.expert_load(experts, num_groups=num_groups), want)
    exact(ops.expert_load(experts.reshape(count, 1).flip(0), num_groups=num_groups), want)


@law(made=stacked(), dtype=ss.DTYPES)
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


@pytest.mark.parametrize("shape", [(19, 30), (19, 700), (300, 30)])
def test_few_slots_have_the_same_bits_however_many_they_are(subject: Subject, shape: tuple[int, int]) -> None:
    """Generated text should not depend on what else is generated."""
    num_rows, num_columns = shape
    weight = reference_ops.initial_weight((8 * num_rows, num_columns), std=0.1, seed=1, tensor_id=2)
    experts, options = torch.tensor([3, 0, 7, 5, 1, 2, 6]), {"num_groups": 8}
    x, dy = (
        ss.float_values((7, width), "normal", width).to(torch.bfloat16) for width in (num_columns, num_rows)
    )
    for name, rows in (("grouped_linear", x), ("grouped_linear_input_grad", dy)):
        together = subject.call(name, rows, weight, experts, **options)
        for slot in range(7):
            own = slice(slot, slot + 1)
            exact(subject.call(name, rows[own], weight, experts[own], **options), together[own], name)


@pytest.mark.parametrize("count", [200, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_an_expert_is_its_own(subject: Subject, count: int, dtype: torch.dtype) -> None:
    """It has the same bits whatever slots the others have: what an expert votes is its own affair."""
    own = torch.zeros(count, dtype=torch.int64)
    dy, x = (ss.float_values((count + 900, width), "normal", width).to(dtype) for width in (3, 5))
    alone = subject.call("grouped_linear_weight_grad", dy[:count], x[:count], own, num_groups=2)
    for other in (1, -1):
        experts = torch.cat([own, torch.full((900,), other)])
        beside = subject.call("grouped_linear_weight_grad", dy, x, experts, num_groups=2)
        exact(beside[:3], alone[:3], f"beside slots of {other}")


def test_experts_compile_no_kernel_again(subject: Subject) -> None:
    """However many slots there are and however they fall on experts; few and many slots, aligned widths and ragged ones."""
    needs_cuda(subject, "recompilation of expert kernels")
    import triton

    compiled: list[str] = []
    makes = ((48, 64), (25, 36))
    made = [reference_ops.initial_weight((8 * n, k), std=0.1, seed=1, tensor_id=2) for n, k in makes]
    weights = [subject.raw("from_spec")(weight.to(subject.device)) for weight in made]

    def everything(count: int, experts: Tensor) -> None:
        for weight, (num_rows, num_columns) in zip(weights, makes, strict=True):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(count, num_columns, dtype=dtype, device=subject.device)
                dy = torch.ones(count, num_rows, dtype=dtype, device=subject.device)
                subject.raw("grouped_linear")(x, weight, experts, num_groups=8)
                subject.raw("grouped_linear_input_grad")(dy, weight, experts, num_groups=8)
                subject.raw("grouped_linear_weight_grad")(dy, x, experts, num_groups=8)

    for count in (1, 2, 64, 512, 1024, 4096):  # few slots, and each height of a tile
        everything(count, torch.arange(count, device=subject.device) % 8)
    hook = lambda *args, **kwargs: compiled.append(str(kwargs.get("repr") or kwargs.get("key")))  # noqa: E731
    previous, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, hook
    try:
        for count in (3, 4, 5, 15, 128, 129, 1000, 3072):
            for experts in (torch.arange(count) % 8, torch.full((count,), 5), torch.full((count,), -1)):
                everything(count, experts.to(subject.device))
    finally:
        triton.knobs.runtime.jit_cache_hook = previous
    assert not compiled, f"compiled again: {compiled}"
