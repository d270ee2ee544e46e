"""Edges. See `arbitor.reference.ops.edges`."""

from __future__ import annotations

from torch import Tensor

from arbitor.optimized.kernels import edges as kernels
from arbitor.optimized.kernels.launch import values_between
from arbitor.optimized.layouts import AnyWeight
from arbitor.optimized.ops.layout import deliver, deliver_table, table_target, target_of
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = ["edge_sum", "edge_sum_input_grad", "edge_sum_sign_grad", "update_neighbours"]


def _nodes_grad(grad: Tensor, *, h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor) -> Tensor:
    """Return the gradient of `edge_sum` with respect to the nodes."""
    return edge_sum_input_grad(grad, neighbours_RJ, signs_RJ, num_nodes=h_ND.shape[0])


def _signs_grad(grad: Tensor, *, h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor) -> Tensor:
    """Return the gradient of `edge_sum` with respect to the signs, in their dtype."""
    return edge_sum_sign_grad(grad, h_ND, neighbours_RJ).to(signs_RJ.dtype)


@op(h_ND=_nodes_grad, signs_RJ=_signs_grad)
def edge_sum(h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor) -> Tensor:
    """See reference; float64 is not supported."""
    checks.node_matrix("h_ND", h_ND)
    checks.dtype_in("h_ND", h_ND, DTYPES)
    checks.edge_slots(neighbours_RJ, h_ND=h_ND)
    checks.edge_signs(signs_RJ, neighbours_RJ, "h_ND", h_ND)
    values_between("neighbours_RJ", neighbours_RJ, -1, h_ND.shape[0] - 1)
    return kernels.gather_sums(h_ND, neighbours_RJ, signs_RJ)


@op()
def edge_sum_input_grad(
    grad_RD: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor, *, num_nodes: int
) -> Tensor:
    """See reference; float64 is not supported."""
    checks.integer("num_nodes", num_nodes, 1, 2**31 - 1)
    checks.edge_gradient("grad_RD", grad_RD, neighbours_RJ)
    checks.dtype_in("grad_RD", grad_RD, DTYPES)
    checks.edge_signs(signs_RJ, neighbours_RJ, "grad_RD", grad_RD)
    values_between("neighbours_RJ", neighbours_RJ, -1, num_nodes - 1)
    return kernels.node_grads(grad_RD, neighbours_RJ, signs_RJ, num_nodes)


@op()
def edge_sum_sign_grad(grad_RD: Tensor, h_ND: Tensor, neighbours_RJ: Tensor) -> Tensor:
    """See reference; float64 is not supported."""
    checks.node_matrix("h_ND", h_ND)
    checks.edge_gradient("grad_RD", grad_RD, neighbours_RJ)
    checks.last_dim("grad_RD", grad_RD, h_ND.shape[1], DTYPES)
    checks.same_dtype("h_ND", h_ND, "grad_RD", grad_RD)
    checks.same_device(grad_RD=grad_RD, h_ND=h_ND)
    values_between("neighbours_RJ", neighbours_RJ, -1, h_ND.shape[0] - 1)
    return kernels.sign_grads(grad_RD, h_ND, neighbours_RJ)


@op()
def update_neighbours(
    neighbours_NJ: Tensor,
    scores_NJ: Tensor,
    signs: AnyWeight,
    sources_M: Tensor,
    targets_M: Tensor,
    *,
    allow_loops: bool = False,
    out: tuple[Tensor, Tensor, AnyWeight] | None = None,
) -> tuple[Tensor, Tensor, AnyWeight]:
    """See reference. In place, on contiguous tables and signs in device layout, only rows of sources are read or written."""
    checks.neighbour_tables(neighbours_NJ, scores_NJ, signs, out)
    checks.edge_pairs(sources_M, targets_M, neighbours_NJ)
    checks.flag("allow_loops", allow_loops)
    num_nodes = neighbours_NJ.shape[0]
    values_between("sources_M", sources_M, -1, num_nodes - 1)
    values_between("targets_M", targets_M, -1, 2**31 - 1 if allow_loops else num_nodes - 1)
    into = (None, None, None) if out is None else out
    neighbours, scores = table_target(neighbours_NJ, into[0]), table_target(scores_NJ, into[1])
    target = target_of(signs, into[2])
    kernels.update_(neighbours, scores, target, sources_M, targets_M, allow_loops)
    updated = deliver(target, signs, into[2])
    if out is None:
        return neighbours, scores, updated
    deliver_table(neighbours, out[0])
    deliver_table(scores, out[1])
    return out
