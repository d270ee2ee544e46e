"""Edges: sums over the neighbours of a node, their gradients, and the table of neighbours that a stream of pairs keeps.

Legend: N nodes (rows of a table), D width, R rows that gather, J slots of a row, M pairs.
A slot names a neighbour by its row, or is empty (-1). Sums run in the order of the slots, in float32, or float64 for
float64 inputs, and are rounded once to the dtype that comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import SCORE_MAX
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["edge_sum", "edge_sum_input_grad", "edge_sum_sign_grad", "update_neighbours"]

_Row = tuple[list[int], list[int], list[bool]]
"""Neighbours and scores of a row, and which of its slots changed their neighbour."""


@op
def edge_sum(h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor) -> Tensor:
    """Return for each row the sum of its neighbours' vectors, each times the sign of its slot.

    Math:    m[r, d] = sum_j a[r, j] * h[neighbour[r, j], d]; an empty slot adds nothing, whatever its sign
    Shapes:  h float32, bfloat16 or float64 [N, D]; neighbours int32 or int64 [R, J], each -1 .. N - 1; signs dtype of h
             [R, J]; R may be 0
    Returns: dtype of h, [R, D]
    Raises:  TypeError or ValueError for a dtype, shape, device or neighbour that is not allowed
    Laws:    rows are independent; permuting nodes and renaming neighbours changes nothing
    Source:  docs/spec/edges.md; REFACTOR7 (graph hop)
    """
    checks.node_matrix("h_ND", h_ND)
    checks.edge_slots(neighbours_RJ, h_ND=h_ND)
    checks.edge_signs(signs_RJ, neighbours_RJ, "h_ND", h_ND)
    checks.values_between("neighbours_RJ", neighbours_RJ, -1, h_ND.shape[0] - 1)
    wide = wide_dtype(h_ND)
    sums_RD = torch.zeros(neighbours_RJ.shape[0], h_ND.shape[1], dtype=wide, device=h_ND.device)
    for slot in range(neighbours_RJ.shape[1]):
        of_slot = neighbours_RJ[:, slot].to(torch.int64)
        term_RD = signs_RJ[:, slot, None].to(wide) * h_ND[of_slot.clamp(min=0)].to(wide)
        sums_RD += torch.where((of_slot >= 0)[:, None], term_RD, 0.0)
    return sums_RD.to(h_ND.dtype)


@op
def edge_sum_input_grad(
    grad_RD: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor, *, num_nodes: int
) -> Tensor:
    """Return the gradient of the loss with respect to the nodes of `edge_sum`.

    Math:    dh[n, d] = sum over slots (r, j) with neighbour n of a[r, j] * dm[r, d], in float64, rounded once
    Shapes:  grad float32, bfloat16 or float64 [R, D]; neighbours int32 or int64 [R, J], each -1 .. N - 1; signs dtype of
             grad [R, J]; num_nodes N; R may be 0
    Returns: dtype of grad, [N, D]; zeros for a node that no slot names
    Raises:  TypeError or ValueError for a dtype, shape, device or neighbour that is not allowed
    Laws:    the adjoint of `edge_sum`: <dm, edge_sum(h)> = <edge_sum_input_grad(dm), h>
    Source:  docs/spec/edges.md
    """
    checks.integer("num_nodes", num_nodes, 1, 2**31 - 1)
    checks.edge_gradient("grad_RD", grad_RD, neighbours_RJ)
    checks.edge_signs(signs_RJ, neighbours_RJ, "grad_RD", grad_RD)
    checks.values_between("neighbours_RJ", neighbours_RJ, -1, num_nodes - 1)
    sums_ND = torch.zeros(num_nodes, grad_RD.shape[1], dtype=torch.float64, device=grad_RD.device)
    for slot in range(neighbours_RJ.shape[1]):
        named = neighbours_RJ[:, slot] >= 0
        terms = signs_RJ[named, slot, None].to(torch.float64) * grad_RD[named].to(torch.float64)
        sums_ND.index_add_(0, neighbours_RJ[named, slot], terms)
    return sums_ND.to(grad_RD.dtype)


@op
def edge_sum_sign_grad(grad_RD: Tensor, h_ND: Tensor, neighbours_RJ: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the signs of `edge_sum`.

    Math:    da[r, j] = sum_d dm[r, d] * h[neighbour[r, j], d]; 0 for an empty slot
    Shapes:  grad [R, D] and h [N, D] of one dtype, float32, bfloat16 or float64; neighbours int32 or int64 [R, J], each
             -1 .. N - 1; R may be 0
    Returns: float32 [R, J] (float64 for float64 inputs)
    Raises:  TypeError or ValueError for a dtype, shape, device or neighbour that is not allowed
    Laws:    adjoint to `edge_sum`: <edge_sum_sign_grad(dm, h), a> = <dm, edge_sum(h)>
    Source:  docs/spec/edges.md
    """
    checks.node_matrix("h_ND", h_ND)
    checks.edge_gradient("grad_RD", grad_RD, neighbours_RJ)
    checks.last_dim("grad_RD", grad_RD, h_ND.shape[1])
    checks.same_dtype("h_ND", h_ND, "grad_RD", grad_RD)
    checks.same_device(grad_RD=grad_RD, h_ND=h_ND)
    checks.values_between("neighbours_RJ", neighbours_RJ, -1, h_ND.shape[0] - 1)
    wide = wide_dtype(h_ND)
    grads_RJ = torch.zeros(neighbours_RJ.shape, dtype=wide, device=h_ND.device)
    for slot in range(neighbours_RJ.shape[1]):
        of_slot = neighbours_RJ[:, slot].to(torch.int64)
        dots_R = (grad_RD.to(wide) * h_ND[of_slot.clamp(min=0)].to(wide)).sum(dim=1)
        grads_RJ[:, slot] = torch.where(of_slot >= 0, dots_R, 0.0)
    return grads_RJ


@op
def update_neighbours(
    neighbours_NJ: Tensor,
    scores_NJ: Tensor,
    signs: TernaryWeight,
    sources_M: Tensor,
    targets_M: Tensor,
    *,
    allow_loops: bool = False,
    out: tuple[Tensor, Tensor, TernaryWeight] | None = None,
) -> tuple[Tensor, Tensor, TernaryWeight]:
    """Return the table of neighbours after a batch of pairs (source -> target), kept by the heavy-hitter rule.

    Math:    pairs with a -1, and loops (i -> i) unless allowed, are left out. For each source, its distinct targets in
             ascending order, each with the number c of its pairs; a slot is free where its score is not above 0:
             (a) a slot holds the target: score <- min(score + c, 127)
             (b) else some slot is free: the lowest free one takes the target, with score min(c, 127)
             (c) else m = min(c, smallest score): all scores of the row <- score - m; if c > m, the lowest slot that is now
                 free takes the target, with score min(c - m, 127)
             A slot that takes a target gets the trit +1 with an empty accumulator; its group keeps its exponent and count
    Shapes:  neighbours int32 [N, J], J <= 16, -1 where a slot never held one; scores int8 [N, J], 0 .. 127; signs a weight of
             N rows and J columns; sources int64 [M], each -1 .. N - 1; targets int64 [M], each -1 .. N - 1. With
             `allow_loops` targets may name rows of another table, each -1 .. 2**31 - 1
    Returns: neighbours, scores, signs, new; or those of `out` (may be the inputs themselves), overwritten. In place only
             rows of sources are touched
    Overflow: scores saturate at 127
    Raises:  TypeError or ValueError for a dtype, shape, device, weight, source or target that is not allowed
    Laws:    the order of pairs changes nothing; a target of more than (pairs of its source) / (J + 1) pairs is kept; rows
             that are no source keep every byte
    Source:  docs/spec/edges.md; Misra and Gries 1982; REFACTOR14 (neighbour tables)
    """
    checks.neighbour_tables(neighbours_NJ, scores_NJ, signs, out)
    checks.edge_pairs(sources_M, targets_M, neighbours_NJ)
    checks.flag("allow_loops", allow_loops)
    num_nodes = neighbours_NJ.shape[0]
    checks.values_between("sources_M", sources_M, -1, num_nodes - 1)
    checks.values_between("targets_M", targets_M, -1, 2**31 - 1 if allow_loops else num_nodes - 1)
    pairs = _counted(sources_M, targets_M, allow_loops)
    ids = torch.tensor(sorted({source for source, _, _ in pairs}), dtype=torch.int64, device=signs.device)
    held = zip(neighbours_NJ[ids].tolist(), scores_NJ[ids].tolist(), strict=True)
    empty = [False] * neighbours_NJ.shape[1]
    rows = {source: (*row, empty.copy()) for source, row in zip(ids.tolist(), held, strict=True)}
    for source, target, count in pairs:
        _count_target(rows[source], target, count)
    return _written(neighbours_NJ, scores_NJ, signs, ids, list(rows.values()), out)


def _counted(sources_M: Tensor, targets_M: Tensor, allow_loops: bool) -> list[list[int]]:
    """Return [source, target, number of pairs] of all pairs that count, by source, then by target."""
    counts = (sources_M >= 0) & (targets_M >= 0)
    if not allow_loops:
        counts &= sources_M != targets_M
    pairs = torch.stack([sources_M[counts], targets_M[counts]], dim=1)
    # `unique` gives the pairs in ascending order.
    distinct, number = pairs.unique(dim=0, return_counts=True)
    return torch.cat([distinct, number[:, None]], dim=1).tolist()


def _count_target(row: _Row, target: int, count: int) -> None:
    """Apply the rule to one row, for one target."""
    neighbours, scores, taken = row
    if target in neighbours:
        slot = neighbours.index(target)
        scores[slot] = min(scores[slot] + count, SCORE_MAX)
        return
    if min(scores) > 0:
        loss = min(count, *scores)
        scores[:] = [score - loss for score in scores]
        count -= loss
    if count > 0:
        slot = next(slot for slot, score in enumerate(scores) if score <= 0)
        neighbours[slot], scores[slot], taken[slot] = target, min(count, SCORE_MAX), True


def _written(
    neighbours_NJ: Tensor,
    scores_NJ: Tensor,
    signs: TernaryWeight,
    ids: Tensor,
    rows: list[_Row],
    out: tuple[Tensor, Tensor, TernaryWeight] | None,
) -> tuple[Tensor, Tensor, TernaryWeight]:
    """Return the tables with some rows exchanged, in `out` if there is one."""
    neighbours_NJ, scores_NJ, trits = neighbours_NJ.clone(), scores_NJ.clone(), trits_of(signs)
    trit_accum = signs.trit_accum.clone()
    if rows:
        neighbours, scores, taken = (
            torch.tensor(part, device=ids.device) for part in zip(*rows, strict=True)
        )
        neighbours_NJ[ids], scores_NJ[ids] = neighbours.to(torch.int32), scores.to(torch.int8)
        trits[ids] = torch.where(taken, 1, trits[ids])
        trit_accum[ids] = torch.where(taken, 0, trit_accum[ids])
    fresh = weight_of_trits(
        trits, signs.exponents, signs.group_size, mantissa_bits=signs.mantissa_bits
    ).with_tensors(trit_accum=trit_accum, exponent_accum=signs.exponent_accum.clone())
    if out is None:
        return neighbours_NJ, scores_NJ, fresh
    out[0].copy_(neighbours_NJ)
    out[1].copy_(scores_NJ)
    fresh.into(out[2])
    return out
