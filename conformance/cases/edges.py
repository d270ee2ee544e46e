"""Calls to compare of the family edges.

Legend: N nodes, D width, R rows, J slots of a row, M pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.cases.case import Case

MAGNITUDES: dict[str, Callable[..., Any]] = {}
"""Sums of absolute terms of the ops that subtract."""

KINDS = ("normal", "wild", "faint", "constant")
"""Kinds of floats whose products with each other stay finite."""

Tables = tuple[Tensor, Tensor, TernaryWeight]


@st.composite
def slot_tensors(draw: st.DrawFn, num_nodes: int, rows: int | None = None) -> Tensor:
    """Draw neighbours [R, J]: any, all one node, mostly empty, or a neighbour of each row's own; int32 or int64."""
    num_rows = draw(st.sampled_from((0, 1, 2, 5, 17)), label="R") if rows is None else rows
    num_slots = draw(st.sampled_from((1, 2, 3, 10, 16, 19)), label="J")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    kind = draw(st.sampled_from(("any", "some empty", "mostly empty", "one", "own")), label="neighbours")
    ids = torch.randint(num_nodes, (num_rows, num_slots), generator=rng)
    if kind == "one":
        ids = torch.full_like(ids, num_nodes - 1)
    if kind == "own":
        ids = torch.arange(ids.numel()).reshape(ids.shape) % num_nodes
    if kind in ("some empty", "mostly empty"):
        share = 0.3 if kind == "some empty" else 0.9
        ids = torch.where(torch.rand(ids.shape, generator=rng) < share, -1, ids)
    ids = ids.to(draw(st.sampled_from((torch.int32, torch.int64)), label="ids"))
    return ids.T.contiguous().T if draw(st.booleans(), label="transposed ids") else ids


@st.composite
def edge_case(draw: st.DrawFn, *, which: str) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    num_nodes, width = draw(st.sampled_from((1, 3, 20))), draw(st.deferred(lambda: ss.sizes(130)))
    neighbours = draw(slot_tensors(num_nodes))
    floats = lambda *shape: draw(ss.activations(shape, dtype, exact=exact_sums, kinds=KINDS))  # noqa: E731
    num_rows = neighbours.shape[0]
    if which == "edge_sum":
        return Case((floats(num_nodes, width), neighbours, floats(*neighbours.shape)), sums_exact=exact_sums)
    grad = floats(num_rows, width)
    if which == "edge_sum_sign_grad":
        return Case((grad, floats(num_nodes, width), neighbours), sums_exact=exact_sums)
    kwargs = {"num_nodes": num_nodes}
    return Case((grad, neighbours, floats(*neighbours.shape)), kwargs, sums_exact=exact_sums)


@st.composite
def neighbour_tables(draw: st.DrawFn, num_nodes: int, num_targets: int, num_slots: int) -> Tables:
    """Draw tables: never used, filled, with low scores of which some are 0, or with scores near the rail."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    kind = draw(st.sampled_from(("new", "full", "low", "high")), label="tables")
    shape = (num_nodes, num_slots)
    names = torch.rand(num_nodes, max(num_targets, num_slots), generator=rng).argsort(dim=1)[:, :num_slots]
    neighbours = torch.where(names < num_targets, names, -1)
    low, high = {"low": (0, 4), "high": (124, 128)}.get(kind, (0, 128))
    scores = torch.randint(low, high, shape, generator=rng)
    if kind == "new":
        neighbours = torch.full(shape, -1)
    scores = torch.where(neighbours < 0, 0, scores)
    return neighbours.to(torch.int32), scores.to(torch.int8), draw(ss.weights(shape))


@st.composite
def pair_tensors(draw: st.DrawFn, num_nodes: int, num_targets: int, most: int = 300) -> tuple[Tensor, Tensor]:
    """Draw pairs: any, from few sources, or many times the same; with some that are left out."""
    count = draw(st.sampled_from([size for size in (0, 1, 7, 40, most) if size <= most]), label="M")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    few = draw(st.sampled_from((1, 3, 1000)), label="spread")
    sources = torch.randint(num_nodes, (count,), generator=rng) % few
    # a skew, so that some targets are frequent
    targets = (torch.rand(count, generator=rng) ** 3 * num_targets).to(torch.int64).clamp(max=num_targets - 1)
    sources = torch.where(torch.rand(count, generator=rng) < 0.05, -1, sources)
    targets = torch.where(torch.rand(count, generator=rng) < 0.05, -1, targets)
    return sources.clamp(max=num_nodes - 1), targets


@st.composite
def update_neighbours(draw: st.DrawFn) -> Case:
    num_nodes, num_slots = draw(st.sampled_from((1, 2, 9, 20))), draw(st.sampled_from((1, 2, 5, 10, 16)))
    loops = draw(st.booleans(), label="another table")
    num_targets = draw(st.sampled_from((1, 30, 2**31 - 1))) if loops else num_nodes
    tables = draw(neighbour_tables(num_nodes, min(num_targets, 30), num_slots))
    pairs = draw(pair_tensors(num_nodes, num_targets))
    kwargs: dict[str, Any] = {"allow_loops": loops}
    out = draw(st.sampled_from(("none", "itself", "another")), label="out")
    if out == "itself":
        kwargs["out"] = tables
    if out == "another":
        scores = torch.full_like(tables[1], 99)
        kwargs["out"] = (torch.full_like(tables[0], 7), scores, blank_like(tables[2]))
    return Case((*tables, *pairs), kwargs)


def blank_like(weight: TernaryWeight) -> TernaryWeight:
    """Return a weight of the same kind with other bytes, to be overwritten."""
    return weight.with_tensors(
        **{name: torch.zeros_like(tensor) for name, tensor in weight.tensors().items()}
    )


CASES: dict[str, SearchStrategy[Case]] = {
    "edge_sum": edge_case(which="edge_sum"),
    "edge_sum_input_grad": edge_case(which="edge_sum_input_grad"),
    "edge_sum_sign_grad": edge_case(which="edge_sum_sign_grad"),
    "update_neighbours": update_neighbours(),
}
"""Calls to compare, by op."""
