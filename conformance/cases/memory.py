"""Calls to compare of the family memory.

Legend: B batch, P positions, N rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference.constants import STRENGTH_MAX
from conformance import strategies as ss
from conformance.cases.case import Case

LAST_CODE = 2**32 - 1


@st.composite
def code_tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Draw codes: many or few, the largest words, some positions without one."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    codes = torch.randint(draw(st.sampled_from((2, 58_684, 2**32)), label="codes"), shape, generator=rng)
    if draw(st.booleans(), label="extremes"):
        some = torch.tensor([-1, 0, 2**31, LAST_CODE])[torch.randint(4, shape, generator=rng)]
        codes = torch.where(torch.rand(shape, generator=rng) < 0.2, some, codes)
    return codes


@st.composite
def tables_of_rows(draw: st.DrawFn) -> dict[str, int]:
    """Draw what an n-gram is hashed to: order, rows and salt."""
    return {
        "order": draw(st.sampled_from((1, 2, 3, 5, 16)), label="order"),
        "num_rows": draw(st.sampled_from((1, 2, 97, 4096, 10_000_000, 2**31 - 1)), label="N"),
        "salt": draw(st.sampled_from((0, 1, 3, 2**31, 2**32 - 1)), label="salt"),
    }


@st.composite
def ngram_rows(draw: st.DrawFn) -> Case:
    kwargs: dict[str, Any] = draw(tables_of_rows())
    batch, positions = draw(st.sampled_from(((1, 1), (0, 3), (2, 0), (3, 7), (2, 17), (1, 300))))
    codes = draw(code_tensors((batch, positions)))
    if draw(st.booleans(), label="transposed"):
        codes = codes.T.contiguous().T
    if draw(st.booleans(), label="previous"):
        kwargs["previous"] = draw(code_tensors((batch, kwargs["order"] - 1)))
    return Case((codes,), kwargs)


@st.composite
def strength_tables(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Draw strengths: many of them 0, some full, small ones among them."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    values = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 64, STRENGTH_MAX - 1, STRENGTH_MAX], dtype=torch.int8)
    return values[torch.randint(len(values), (num_rows,), generator=rng)]


@st.composite
def touches(draw: st.DrawFn, num_rows: int) -> dict[str, Any]:
    """Draw a window, from the first row on, across the end, all, nothing; and the rule of rise and decay."""
    first = draw(
        st.one_of(st.sampled_from((0, num_rows - 1, 10**15)), st.integers(0, 3 * num_rows)), label="first"
    )
    as_tensor = draw(st.booleans(), label="first as a tensor")
    return {
        "gain": draw(st.sampled_from((0, 1, 8, STRENGTH_MAX)), label="gain"),
        "first": torch.tensor(first) if as_tensor else first,
        "window": draw(
            st.one_of(st.sampled_from((0, 1, num_rows)), st.integers(0, num_rows)), label="window"
        ),
        "shift": draw(st.integers(0, 7), label="shift"),
    }


@st.composite
def named_rows(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Draw rows with duplicates and unused slots, in one or two dimensions, none at all among them."""
    shape = draw(st.sampled_from(((), (0,), (1,), (17,), (3, 11), (300,))), label="rows")
    rows = torch.randint(-1, num_rows, shape, generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    return rows // draw(st.sampled_from((1, 3)), label="duplicates")


@st.composite
def touch_strengths(draw: st.DrawFn) -> Case:
    strengths = draw(strength_tables(draw(st.sampled_from((1, 5, 300)), label="N")))
    kwargs = draw(touches(strengths.numel()))
    kind = draw(st.sampled_from(("new", "other", "itself", "strided")), label="out")
    if kind == "itself":
        kwargs["out"] = strengths
    elif kind != "new":
        step = 2 if kind == "strided" else 1
        kwargs["out"] = torch.full((step * strengths.numel(),), 7, dtype=torch.int8)[::step]
    return Case((strengths, draw(named_rows(strengths.numel()))), kwargs)


CASES: dict[str, SearchStrategy[Case]] = {
    "ngram_rows": ngram_rows(),
    "touch_strengths": touch_strengths(),
}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {}
"""Sums of absolute terms of the ops that subtract."""
