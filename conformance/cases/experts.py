"""Calls to compare of the family experts.

Legend: E experts, N outputs of an expert, K inputs, M slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.cases.case import Case
from conformance.cases.codebook import vectors
from conformance.cases.core import NARROW

MAGNITUDES: dict[str, Callable[..., Any]] = {}
"""Sums of absolute terms of the ops that subtract."""

EXPERTS = st.sampled_from((1, 2, 5, 8))
"""Numbers of experts worth trying."""


@st.composite
def expert_ids(draw: st.DrawFn, num_groups: int, num_slots: int | None = None) -> Tensor:
    """Draw the expert of each slot: dealt out, all on one expert, few of them used, or unused slots among them."""
    if num_slots is None:  # 1 is few for eight experts; the last fills another tile for one
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
    if draw(st.integers(0, 4)) == 0:  # several tiles of columns and of outputs, ragged
        wide = st.sampled_from((65, 130, 200))
        return draw(st.sampled_from((1, 2)), label="E"), draw(wide, label="N"), draw(wide, label="K")
    num_groups = draw(EXPERTS, label="E")
    num_rows, num_columns = draw(ss.matrix_shapes(limit))
    return num_groups, max(1, min(num_rows, 120 // num_groups)), num_columns


@st.composite
def grouped_linear_case(draw: st.DrawFn, *, backward: bool) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    num_groups, num_rows, num_columns = draw(sizes())
    levels = NARROW if exact_sums else None
    shape = (num_groups * num_rows, num_columns)
    weight = draw(ss.weights(shape, levels=levels))
    experts = draw(expert_ids(num_groups))
    # a product of 1e30 with 2**15 fits float32, and so does the sum of a row of them
    given_shape = (experts.numel(), num_rows if backward else num_columns)
    values = draw(ss.activations(given_shape, dtype, exact=exact_sums))
    return Case((values, weight, experts), {"num_groups": num_groups}, sums_exact=exact_sums)


@st.composite
def grouped_linear_weight_grad(draw: st.DrawFn) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    num_groups, num_rows, num_columns = draw(sizes())
    experts = draw(expert_ids(num_groups))
    kinds = ("normal", "wild", "faint", "constant")
    both = [
        draw(ss.activations((experts.numel(), width), dtype, exact=exact_sums, kinds=kinds))
        for width in (num_rows, num_columns)
    ]
    return Case((*both, experts), {"num_groups": num_groups}, sums_exact=exact_sums)


@st.composite
def expert_load(draw: st.DrawFn) -> Case:
    num_groups = draw(st.one_of(EXPERTS, st.just(64)))
    experts = draw(expert_ids(num_groups, draw(st.sampled_from((0, 1, 12, 300)))))
    if draw(st.booleans(), label="matrix"):
        experts = experts.repeat(2).reshape(2, experts.numel()).T
    return Case((experts,), {"num_groups": num_groups})


@st.composite
def routers(draw: st.DrawFn) -> TernaryWeight:
    """Draw a router's weight: levels near each other or over all their range; rows that are equal, or one trit apart."""
    shape = (draw(st.one_of(EXPERTS, st.just(64)), label="E"), draw(ss.sizes(70), label="K"))
    weight = draw(ss.weights(shape, levels=draw(st.sampled_from((NARROW, None)), label="levels")))
    kind = draw(st.sampled_from(("free", "equal", "one trit apart")), label="rows")
    if kind == "free":
        return weight
    experts = torch.arange(shape[0])
    rows = experts % (draw(st.sampled_from((1, 3)), label="different rows") if kind == "equal" else 1)
    trits = trits_of(weight)[rows]
    if kind == "one trit apart":  # scores that differ in their last bits alone
        places = (experts, experts % shape[1])
        trits[places] = (trits[places] + 2) % 3 - 1
    levels, size = weight.exponents[rows], weight.group_size
    return weight_of_trits(trits, levels, size, mantissa_bits=weight.mantissa_bits)


@st.composite
def choose_experts(draw: st.DrawFn) -> Case:
    weight = draw(routers())
    x = draw(vectors(weight.shape[1]))
    return Case((x, weight), {"top_k": draw(st.integers(1, weight.shape[0]), label="k")})


CASES: dict[str, SearchStrategy[Case]] = {
    "choose_experts": choose_experts(),
    "grouped_linear": grouped_linear_case(backward=False),
    "grouped_linear_input_grad": grouped_linear_case(backward=True),
    "grouped_linear_weight_grad": grouped_linear_weight_grad(),
    "expert_load": expert_load(),
}
"""Calls to compare, by op."""
