"""Laws of the edges: a row sums its own neighbours and no others, gradients are adjoint, frequent neighbours are kept.

Legend: N nodes, D width, R rows, J slots of a row, M pairs.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from arbitor.reference.ops.packing import trits_of, weight_of_trits
from conformance import oracle
from conformance import strategies as ss
from conformance.cases import compare
from conformance.cases.case import Case
from conformance.cases.edges import KINDS, Tables, neighbour_tables, pair_tensors, slot_tensors
from conformance.compare import exact, unsigned_zeros
from conformance.law import law
from conformance.report import needs_cuda
from conformance.subject import Subject

NODES = st.sampled_from((1, 3, 20))
WIDTHS = st.sampled_from((1, 12, 33))


def _floats(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return data.draw(ss.activations(shape, dtype, exact=True))


def _equal(got: Tensor, want: Tensor, what: str = "output") -> None:
    """Compare sums that are exact in any order: equal bits, once their zeros have no sign."""
    exact(unsigned_zeros(got), unsigned_zeros(want.to(got.dtype)), what)


@law(num_nodes=NODES, width=WIDTHS, dtype=ss.DTYPES, data=st.data())
def test_edge_sum_by_edge(
    ops: Subject, num_nodes: int, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Edge by edge: each carries a times h to its row, a times dm back to its node, and <dm, h> to its sign."""
    neighbours = data.draw(slot_tensors(num_nodes))
    h, dm = (_floats(data, rows, width, dtype=dtype) for rows in (num_nodes, neighbours.shape[0]))
    signs = _floats(data, *neighbours.shape, dtype=dtype)
    wide_h, wide_dm, wide_a = (value.to(torch.float64) for value in (h, dm, signs))
    m, dh, da = torch.zeros_like(wide_dm), torch.zeros_like(wide_h), torch.zeros_like(wide_a)
    for row, slots in enumerate(neighbours.tolist()):
        for slot, node in enumerate(slots):
            if node >= 0:
                m[row] += wide_a[row, slot] * wide_h[node]
                dh[node] += wide_a[row, slot] * wide_dm[row]
                da[row, slot] = wide_dm[row] @ wide_h[node]
    _equal(ops.edge_sum(h, neighbours, signs), m.to(dtype), "m")
    _equal(ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=num_nodes), dh.to(dtype), "dh")
    _equal(ops.edge_sum_sign_grad(dm, h, neighbours), da.to(torch.float32), "da")


@law(num_nodes=NODES, width=WIDTHS, data=st.data())
def test_edge_sum_adjoint(ops: Subject, num_nodes: int, width: int, data: st.DataObject) -> None:
    """<dm, edge_sum(h, a)> = <edge_sum_input_grad(dm, a), h> = <edge_sum_sign_grad(dm, h), a>, exactly."""
    neighbours = data.draw(slot_tensors(num_nodes))
    h, dm = _floats(data, num_nodes, width), _floats(data, neighbours.shape[0], width)
    signs = _floats(data, *neighbours.shape)
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    forward = dot(dm, ops.edge_sum(h, neighbours, signs))
    assert forward == dot(ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=num_nodes), h)
    assert forward == dot(ops.edge_sum_sign_grad(dm, h, neighbours), signs)


@law(ids=ss.skewed_ids(-1), slots=st.sampled_from((1, 3)), width=WIDTHS, dtype=ss.DTYPES, data=st.data())
def test_edge_sum_input_grad_of_hubs(
    ops: Subject, ids: Tensor, slots: int, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A node of hundreds of edges, beside nodes of a few and of none."""
    exact_sums = data.draw(st.booleans(), label="exact")
    neighbours = functional.pad(ids, (0, -len(ids) % slots), value=-1).reshape(-1, slots).to(torch.int32)
    dm, signs = (
        data.draw(ss.activations((len(neighbours), columns), dtype, exact=exact_sums, kinds=KINDS))
        for columns in (width, slots)
    )
    case = Case((dm, neighbours, signs), {"num_nodes": 5}, sums_exact=exact_sums)
    compare(ops, "edge_sum_input_grad", case)


@pytest.mark.parametrize("num_nodes", [2**15 - 1, 2**15])
def test_edge_sum_input_grad_of_many_nodes(subject: Subject, num_nodes: int) -> None:
    """The last nodes, where their numbers no longer fit 16 bits and just before."""
    needs_cuda(subject, "more nodes than 16 bits can number")  # a minute in the interpreter
    neighbours = torch.tensor([[0, num_nodes - 1], [-1, num_nodes - 2], [num_nodes - 1, num_nodes - 1]])
    case = Case((torch.ones(3, 2), neighbours, torch.ones(3, 2)), {"num_nodes": num_nodes}, sums_exact=True)
    compare(subject, "edge_sum_input_grad", case)


@law(width=WIDTHS, seed=ss.GENERATOR_SEEDS, data=st.data())
def test_edge_sum_ignores_the_names_of_nodes(
    ops: Subject, width: int, seed: int, data: st.DataObject
) -> None:
    """Nodes in another order, under their new names: the same sums, the same gradients in that order."""
    neighbours = data.draw(slot_tensors(20)).to(torch.int64)
    h, dm = _floats(data, 20, width), _floats(data, neighbours.shape[0], width)
    signs = _floats(data, *neighbours.shape)
    order = torch.randperm(20, generator=ss.generator(seed))
    renamed = torch.where(neighbours < 0, -1, order.argsort()[neighbours.clamp(min=0)])
    exact(ops.edge_sum(h[order], renamed, signs), ops.edge_sum(h, neighbours, signs))
    dh = ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=20)
    _equal(ops.edge_sum_input_grad(dm, renamed, signs, num_nodes=20), dh[order])


@law(width=WIDTHS, dtype=ss.DTYPES, data=st.data())
def test_edge_sum_rows_are_independent(
    ops: Subject, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A NaN is seen by the rows that name its node, and by the node that its row names; an empty slot may hold one."""
    neighbours = torch.tensor([[0, 1, -1], [2, -1, 3], [3, 3, 1]])
    h, dm = (_floats(data, rows, width, dtype=dtype).clone() for rows in (4, 3))
    signs = torch.where(neighbours < 0, float("nan"), _floats(data, 3, 3).clone()).to(dtype)
    sums = ops.edge_sum(h, neighbours, signs)
    back = ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=4)
    assert sums.isfinite().all() and back.isfinite().all(), "an empty slot shows"
    h[0] = dm[0] = float("nan")
    spoiled = ops.edge_sum(h, neighbours, signs)
    assert spoiled[0].isnan().all()
    _equal(spoiled[1:], sums[1:], "sums beside a NaN")
    spoiled = ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=4)
    assert spoiled[:2].isnan().all()
    _equal(spoiled[2:], back[2:], "gradients beside a NaN")
    of_signs = ops.edge_sum_sign_grad(dm, h, neighbours)
    exact(of_signs[neighbours < 0], torch.zeros(2))
    assert of_signs[0, :2].isnan().all() and of_signs[1:].isfinite().all()


def _by_hand(tables: Tables, pairs: tuple[Tensor, Tensor], loops: bool) -> Tables:
    """Return the tables after the pairs, the rule told once more: by dictionaries, one pair of a target at a time."""
    neighbours, scores, signs = (value.clone() for value in tables)
    flat = oracle.unpack(signs.packed.tolist(), neighbours.numel())
    trits = torch.tensor(flat, dtype=torch.int8).reshape(neighbours.shape)
    counted = Counter(
        (i, j)
        for i, j in zip(*(p.tolist() for p in pairs), strict=True)
        if i >= 0 and j >= 0 and (loops or i != j)
    )
    for (source, target), count in sorted(counted.items()):
        for _ in range(min(count, 300)):  # beyond, nothing changes any more
            held = neighbours[source].tolist()
            if target in held:
                slot = held.index(target)
                scores[source, slot] = min(int(scores[source, slot]) + 1, 127)
            elif scores[source].gt(0).all():
                scores[source] -= 1
            else:
                slot = next(slot for slot, score in enumerate(scores[source].tolist()) if score <= 0)
                neighbours[source, slot], scores[source, slot] = target, 1
                trits[source, slot], signs.trit_accum[source, slot] = 1, 0
    made = weight_of_trits(trits, signs.exponents, signs.group_size, mantissa_bits=signs.mantissa_bits)
    counts = {"trit_accum": signs.trit_accum, "exponent_accum": signs.exponent_accum}
    return neighbours, scores, made.with_tensors(**counts)


@law(
    num_nodes=st.sampled_from((1, 2, 9)),
    slots=st.sampled_from((1, 2, 5, 16)),
    loops=st.booleans(),
    data=st.data(),
)
def test_update_neighbours_by_hand(
    ops: Subject, num_nodes: int, slots: int, loops: bool, data: st.DataObject
) -> None:
    """A batch does what its pairs do one after the other, sorted by source and target."""
    num_targets = 30 if loops else num_nodes
    tables = data.draw(neighbour_tables(num_nodes, num_targets, slots))
    pairs = data.draw(pair_tensors(num_nodes, num_targets))
    exact(ops.update_neighbours(*tables, *pairs, allow_loops=loops), _by_hand(tables, pairs, loops))


@law(tables=neighbour_tables(9, 9, 3), pairs=pair_tensors(9, 9, 40), seed=ss.GENERATOR_SEEDS)
def test_update_neighbours_ignores_the_order_of_pairs(
    ops: Subject, tables: Tables, pairs: tuple[Tensor, Tensor], seed: int
) -> None:
    order = torch.randperm(pairs[0].numel(), generator=ss.generator(seed))
    shuffled = tuple(part[order] for part in pairs)
    exact(ops.update_neighbours(*tables, *shuffled), ops.update_neighbours(*tables, *pairs))


@law(
    slots=st.sampled_from((1, 3, 10)),
    batches=st.lists(pair_tensors(2, 30, 40), min_size=1, max_size=3),
    data=st.data(),
)
def test_update_neighbours_keeps_frequent_targets(
    ops: Subject, slots: int, batches: list[tuple[Tensor, Tensor]], data: st.DataObject
) -> None:
    """The promise of heavy hitters: what more than one in J + 1 pairs of a source name is among its neighbours."""
    _, _, signs = data.draw(neighbour_tables(2, 30, slots))
    tables = (torch.full((2, slots), -1, dtype=torch.int32), torch.zeros(2, slots, dtype=torch.int8), signs)
    for pairs in batches:
        tables = ops.update_neighbours(*tables, *pairs, allow_loops=True)
    named = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    for source in range(2):
        targets = named[1][(named[0] == source) & (named[1] >= 0)].tolist()
        held = tables[0][source][tables[1][source] > 0].tolist()
        for target, count in Counter(targets).items():
            assert target in held or count * (slots + 1) <= len(targets), f"{count} of {len(targets)}"


@law(tables=neighbour_tables(20, 20, 10), pairs=pair_tensors(20, 20, 40))
def test_update_neighbours_touches_sources_alone(
    ops: Subject, tables: Tables, pairs: tuple[Tensor, Tensor]
) -> None:
    """Rows that are no source keep every byte; signs change only in slots that took another neighbour, exponents never."""
    neighbours, scores, signs = ops.update_neighbours(*tables, *pairs)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[pairs[0][pairs[0] >= 0]] = False
    exact(neighbours[untouched], tables[0][untouched])
    exact(scores[untouched], tables[1][untouched])
    exact((signs.exponents, signs.exponent_accum), (tables[2].exponents, tables[2].exponent_accum))
    same = neighbours == tables[0]
    moved = (trits_of(signs) != trits_of(tables[2])) | (signs.trit_accum != tables[2].trit_accum)
    assert not moved[untouched].any()
    assert trits_of(signs)[~same].eq(1).all() and signs.trit_accum[~same].eq(0).all(), (
        "an old sign on a new neighbour"
    )


@law(width=WIDTHS, dtype=ss.DTYPES)
def test_edges_of_nothing(ops: Subject, width: int, dtype: torch.dtype) -> None:
    """No rows, and rows of empty slots, sum to nothing; no pairs change nothing."""
    h = torch.ones(4, width, dtype=dtype)
    for rows in (0, 2):
        neighbours, signs = torch.full((rows, 3), -1), torch.ones(rows, 3, dtype=dtype)
        dm = torch.ones(rows, width, dtype=dtype)
        exact(ops.edge_sum(h, neighbours, signs), torch.zeros(rows, width, dtype=dtype))
        exact(ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=4), torch.zeros_like(h))
        exact(ops.edge_sum_sign_grad(dm, h, neighbours), torch.zeros(rows, 3))
