"""Laws of the edges: a row sums its own neighbours and no others, gradients are adjoint, frequent neighbours are kept.

Legend: N nodes, D width, R rows, J slots of a row, M pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from .. import strategies as ss
from ..case import Case, calls, compare
from ..compare import exact, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, I8, ids, meta, ones, refusals, refused
from ..subject import Subject, needs_cuda

mutant = mutants_of("edges")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


KINDS = ("normal", "wild", "faint", "constant")
"""Kinds of floats whose products with each other stay finite."""


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


@calls("edge_sum", "edge_sum_input_grad", "edge_sum_sign_grad")
def edge_sum_calls(draw: st.DrawFn, op: str) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    num_nodes, width = draw(st.sampled_from((1, 3, 20))), draw(st.deferred(lambda: ss.sizes(130)))
    neighbours = draw(slot_tensors(num_nodes))
    floats = lambda *shape: draw(ss.activations(shape, dtype, exact=exact_sums, kinds=KINDS))  # noqa: E731
    num_rows = neighbours.shape[0]
    if op == "edge_sum":
        return Case((floats(num_nodes, width), neighbours, floats(*neighbours.shape)), sums_exact=exact_sums)
    grad = floats(num_rows, width)
    if op == "edge_sum_sign_grad":
        return Case((grad, floats(num_nodes, width), neighbours), sums_exact=exact_sums)
    kwargs = {"num_nodes": num_nodes}
    return Case((grad, neighbours, floats(*neighbours.shape)), kwargs, sums_exact=exact_sums)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


NODES = st.sampled_from((1, 3, 20))
WIDTHS = st.sampled_from((1, 12, 33))


def _floats(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return data.draw(ss.activations(shape, dtype, exact=True))


EMPTY_SLOTS_ARE_NODE_ZERO = mutant(
    "empty_slots_are_node_zero",
    "sums_RD += torch.where((of_slot >= 0)[:, None], term_RD, 0.0)",
    "sums_RD += term_RD",
    compared="edge_sum",
)
NEIGHBOURS_AT_HALF_THEIR_NUMBER = mutant(
    "neighbours_at_half_their_number",
    "signs_RJ[:, slot, None].to(wide) * h_ND[of_slot.clamp(min=0)].to(wide)",
    "signs_RJ[:, slot, None].to(wide) * h_ND[of_slot.clamp(min=0) // 2].to(wide)",
    compared="edge_sum",
)
SIGNS_FORGOTTEN = mutant(
    "signs_forgotten", "signs_RJ[:, slot, None].to(wide) * h_ND", "h_ND", compared="edge_sum"
)
A_NODE_KEEPS_ONE_ROW = mutant(
    "a_node_keeps_one_row",
    "sums_ND.index_add_(0, neighbours_RJ[named, slot], terms)",
    "sums_ND[neighbours_RJ[named, slot].to(torch.int64)] = terms",
    compared="edge_sum_input_grad",
)
NODE_GRADIENTS_WITHOUT_SIGNS = mutant(
    "node_gradients_without_signs",
    "signs_RJ[named, slot, None].to(torch.float64) * grad_RD[named]",
    "grad_RD[named]",
    compared="edge_sum_input_grad",
)
SIGN_GRADIENTS_OF_EMPTY_SLOTS = mutant(
    "sign_gradients_of_empty_slots",
    "torch.where(of_slot >= 0, dots_R, 0.0)",
    "dots_R",
    compared="edge_sum_sign_grad",
)


@law(
    num_nodes=NODES,
    width=WIDTHS,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        EMPTY_SLOTS_ARE_NODE_ZERO,
        NEIGHBOURS_AT_HALF_THEIR_NUMBER,
        SIGNS_FORGOTTEN,
        mutant(
            "a_mean_of_neighbours",
            "return sums_RD.to(h_ND.dtype)",
            "return (sums_RD / (neighbours_RJ >= 0).sum(dim=1, keepdim=True).clamp(min=1)).to(h_ND.dtype)",
            compared="edge_sum",
        ),
        A_NODE_KEEPS_ONE_ROW,
        NODE_GRADIENTS_WITHOUT_SIGNS,
        SIGN_GRADIENTS_OF_EMPTY_SLOTS,
        mutant(
            "sign_gradients_in_the_dtype_of_h",
            "h_ND[of_slot.clamp(min=0)].to(wide)).sum(dim=1)",
            "h_ND[of_slot.clamp(min=0)].to(wide)).sum(dim=1).to(h_ND.dtype).to(wide)",
            compared="edge_sum_sign_grad",
        ),
    ],
)
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
    same_sums(ops.edge_sum(h, neighbours, signs), m.to(dtype), "m")
    same_sums(ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=num_nodes), dh.to(dtype), "dh")
    same_sums(ops.edge_sum_sign_grad(dm, h, neighbours), da.to(torch.float32), "da")


@law(
    num_nodes=NODES,
    width=WIDTHS,
    data=st.data(),
    rejects=[EMPTY_SLOTS_ARE_NODE_ZERO, SIGNS_FORGOTTEN, A_NODE_KEEPS_ONE_ROW, NODE_GRADIENTS_WITHOUT_SIGNS],
)
def test_edge_sum_adjoint(ops: Subject, num_nodes: int, width: int, data: st.DataObject) -> None:
    """<dm, edge_sum(h, a)> = <edge_sum_input_grad(dm, a), h> = <edge_sum_sign_grad(dm, h), a>, exactly."""
    neighbours = data.draw(slot_tensors(num_nodes))
    h, dm = _floats(data, num_nodes, width), _floats(data, neighbours.shape[0], width)
    signs = _floats(data, *neighbours.shape)
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    forward = dot(dm, ops.edge_sum(h, neighbours, signs))
    assert forward == dot(ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=num_nodes), h)
    assert forward == dot(ops.edge_sum_sign_grad(dm, h, neighbours), signs)


@law(
    ids=ss.skewed_ids(-1),
    slots=st.sampled_from((1, 3)),
    width=WIDTHS,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[A_NODE_KEEPS_ONE_ROW],
)
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
    # This takes a minute in the interpreter.
    needs_cuda(subject, "more nodes than 16 bits can number")
    neighbours = torch.tensor([[0, num_nodes - 1], [-1, num_nodes - 2], [num_nodes - 1, num_nodes - 1]])
    case = Case((torch.ones(3, 2), neighbours, torch.ones(3, 2)), {"num_nodes": num_nodes}, sums_exact=True)
    compare(subject, "edge_sum_input_grad", case)


@law(width=WIDTHS, seed=ss.GENERATOR_SEEDS, data=st.data(), rejects=[NEIGHBOURS_AT_HALF_THEIR_NUMBER])
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
    same_sums(ops.edge_sum_input_grad(dm, renamed, signs, num_nodes=20), dh[order])


NODE_GRADIENTS_OF_EMPTY_SLOTS = mutant(
    "node_gradients_of_empty_slots",
    "        named = neighbours_RJ[:, slot] >= 0",
    "        neighbours_RJ = neighbours_RJ.clamp(min=0)\n        named = neighbours_RJ[:, slot] >= 0",
    compared="edge_sum_input_grad",
)


@law(
    width=WIDTHS,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[EMPTY_SLOTS_ARE_NODE_ZERO, NODE_GRADIENTS_OF_EMPTY_SLOTS, SIGN_GRADIENTS_OF_EMPTY_SLOTS],
)
def test_edge_sum_rows_are_independent(
    ops: Subject, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A NaN is seen by the rows that name its node, and by the node that its row names. An empty slot may hold a NaN."""
    neighbours = torch.tensor([[0, 1, -1], [2, -1, 3], [3, 3, 1]])
    h, dm = (_floats(data, rows, width, dtype=dtype).clone() for rows in (4, 3))
    signs = torch.where(neighbours < 0, float("nan"), _floats(data, 3, 3).clone()).to(dtype)
    sums = ops.edge_sum(h, neighbours, signs)
    back = ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=4)
    assert sums.isfinite().all() and back.isfinite().all(), "an empty slot shows"
    h[0] = dm[0] = float("nan")
    spoiled = ops.edge_sum(h, neighbours, signs)
    assert spoiled[0].isnan().all()
    same_sums(spoiled[1:], sums[1:], "sums beside a NaN")
    spoiled = ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=4)
    assert spoiled[:2].isnan().all()
    same_sums(spoiled[2:], back[2:], "gradients beside a NaN")
    of_signs = ops.edge_sum_sign_grad(dm, h, neighbours)
    exact(of_signs[neighbours < 0], torch.zeros(2))
    assert of_signs[0, :2].isnan().all() and of_signs[1:].isfinite().all()


@law(
    width=WIDTHS,
    dtype=ss.DTYPES,
    rejects=[EMPTY_SLOTS_ARE_NODE_ZERO, NODE_GRADIENTS_OF_EMPTY_SLOTS, SIGN_GRADIENTS_OF_EMPTY_SLOTS],
)
def test_edges_of_nothing(ops: Subject, width: int, dtype: torch.dtype) -> None:
    """No rows, and rows of empty slots, sum to nothing. No pairs change nothing."""
    h = torch.ones(4, width, dtype=dtype)
    for rows in (0, 2):
        neighbours, signs = torch.full((rows, 3), -1), torch.ones(rows, 3, dtype=dtype)
        dm = torch.ones(rows, width, dtype=dtype)
        exact(ops.edge_sum(h, neighbours, signs), torch.zeros(rows, width, dtype=dtype))
        exact(ops.edge_sum_input_grad(dm, neighbours, signs, num_nodes=4), torch.zeros_like(h))
        exact(ops.edge_sum_sign_grad(dm, h, neighbours), torch.zeros(rows, 3))


# Only the comparison with the reference rejects these.
mutant(
    "edge_sums_in_bfloat16",
    "sums_RD += torch.where((of_slot >= 0)[:, None], term_RD, 0.0)",
    "sums_RD = (sums_RD + torch.where((of_slot >= 0)[:, None], term_RD, 0.0)).to(torch.bfloat16).to(wide)",
    compared="edge_sum",
)


# --- what is refused -------------------------------------------------------------------------------------------------


_BF16, _I32, _I64 = torch.bfloat16, torch.int32, torch.int64


def _slots(*values: int, dtype: torch.dtype = _I32) -> Callable[[], Tensor]:
    """Return a maker of one row of neighbours."""
    return lambda: torch.tensor([values], dtype=dtype)


_H, _ROW = ones(4, 5), ones(1, 2)


# fmt: off
test_refusals_of_edges = refusals(
    "edges",
    refused("edge_sum", "neighbour N", ValueError, "neighbours_RJ", _H, _slots(0, 4), _ROW),
    refused("edge_sum", "neighbour -2", ValueError, "neighbours_RJ", _H, _slots(0, -2), _ROW),
    refused("edge_sum", "int8 neighbours", TypeError, "neighbours_RJ", _H, _slots(0, 1, dtype=I8), _ROW),
    refused("edge_sum", "one dimension", ValueError, "neighbours_RJ", _H, ids(0, 1), ones(2)),
    refused("edge_sum", "no slots", ValueError, "neighbours_RJ", _H, ones(1, 0, dtype=_I32), ones(1, 0)),
    refused("edge_sum", "signs of another shape", ValueError, "signs_RJ", _H, _slots(0, 1), ones(2, 1)),
    refused("edge_sum", "signs of another dtype", TypeError, "signs_RJ", _H, _slots(0, 1), ones(1, 2, dtype=_BF16)),
    refused("edge_sum", "float16", TypeError, "h_ND", ones(4, 5, dtype=F16), _slots(0, 1), ones(1, 2, dtype=F16)),
    refused("edge_sum", "no columns", ValueError, "h_ND", ones(4, 0), _slots(0, 1), _ROW),
    refused("edge_sum", "no nodes", ValueError, "h_ND", ones(0, 5), _slots(-1, -1), _ROW),
    refused("edge_sum", "another device", ValueError, "neighbours_RJ", _H, meta(1, 2, dtype=_I32), _ROW),
    refused("edge_sum", "signs elsewhere", ValueError, "signs_RJ", _H, _slots(0, 1), meta(1, 2)),
    refused("edge_sum_sign_grad", "nodes of one dimension", ValueError, "h_ND", ones(1, 5), ones(5), _slots(0, 1)),
    refused("edge_sum_sign_grad", "no nodes", ValueError, "h_ND", ones(1, 5), ones(0, 5), _slots(-1, -1)),
    refused("edge_sum_input_grad", "neighbour N", ValueError,
            "neighbours_RJ", ones(1, 5), _slots(0, 4), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "no nodes", ValueError,
            "num_nodes", ones(1, 5), _slots(-1, -1), _ROW, num_nodes=0),
    refused("edge_sum_input_grad", "nodes that are no integer", TypeError,
            "num_nodes", ones(1, 5), _slots(0, 1), _ROW, num_nodes=4.0),
    refused("edge_sum_input_grad", "other rows", ValueError,
            "grad_RD", ones(2, 5), _slots(0, 1), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "a vector", ValueError, "grad_RD", ones(1), _slots(0, 1), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "float16", TypeError,
            "grad_RD", ones(1, 5, dtype=F16), _slots(0, 1), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "signs of another dtype", TypeError,
            "signs_RJ", ones(1, 5), _slots(0, 1), ones(1, 2, dtype=_BF16), num_nodes=4),
    refused("edge_sum_sign_grad", "neighbour -2", ValueError, "neighbours_RJ", ones(1, 5), _H, _slots(0, -2)),
    refused("edge_sum_sign_grad", "one node", ValueError, "h_ND", ones(1, 5), ones(5), _slots(0, 0)),
    refused("edge_sum_sign_grad", "other columns", ValueError, "grad_RD", ones(1, 6), _H, _slots(0, 1)),
    refused("edge_sum_sign_grad", "two dtypes", TypeError, "h_ND", ones(1, 5, dtype=_BF16), _H, _slots(0, 1)),
    refused("edge_sum_sign_grad", "other rows", ValueError, "grad_RD", ones(2, 5), _H, _slots(0, 1)),
    refused("edge_sum_sign_grad", "two devices", ValueError, "h_ND", ones(1, 5), meta(4, 5), _slots(0, 1)),
    rejects=[
        mutant(
            "edges_unchecked",
            'checks.values_between("neighbours_RJ", neighbours_RJ, -1, h_ND.shape[0] - 1)',
            "pass",
            times=2
        ),
    ],
)
# fmt: on
