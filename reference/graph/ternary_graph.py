"""TernaryGraph: nodes are codes, and edges lead to the codes that follow. A position adds the node of its code to its stream.

Legend: B batch, P positions, R of them in all, D width, C code width, N codes, J neighbours, L nodes of all levels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import MAX_NEIGHBOURS, SCORE_MAX
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.module import ArbModule, PartList, used
from arbitor.reference.graph.spread import sent_rows
from arbitor.reference.graph.tables import TableModule, when_voting
from arbitor.reference.graph.uncompiled import uncompiled
from arbitor.reference.promises import differentiable_once

FULL_PATH_MAX_CODES = 4096
"""Most codes for which the nodes of all codes are computed. For larger tables only the nodes that a batch needs are."""

NODE_GAIN, HOP_GAIN, ADAPTER_GAIN = 0.25, 0.125, 0.25
"""Scales of W_node, W_upd and the B_k at the start. With them a node adds about a quarter of a unit to the stream."""

PATHS = ("full", "active")
"""Ways to compute: the nodes of all codes, or the nodes that a batch needs."""


class CodeVectors(Protocol):
    """The codebooks as the graph sees them. `MultimodalVQBridge` and `SharedVQ` fit."""

    @property
    def num_codes(self) -> int:
        """Number of ids of all modalities."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return the vectors of codes, [..., C], for ids int64 [...]."""


class EdgeTable(TernaryEmbedding, TableModule):
    """The neighbours that each row keeps: the most frequent targets of its pairs, each with a learned sign.

    Math:    step: `update_neighbours` with the pairs of accepted backward passes since the last step
    Shapes:  neighbours int32 [N, J], scores int8 [N, J]; forward: ids int64 [...] -> signs [..., J]
    Targets: rows of this table, or `num_targets` rows of another one
    Start:   no neighbours, scores 0, signs +1
    Source:  docs/spec/edges.md; REFACTOR14 (neighbour tables)
    """

    def __init__(
        self,
        context: GraphContext,
        num_rows: int,
        num_neighbours: int,
        *,
        num_targets: int | None = None,
        allow_loops: bool = False,
    ) -> None:
        checks.integer("num_neighbours", num_neighbours, 1, MAX_NEIGHBOURS)
        spread = context.spread_of_codes(num_rows)
        shape = (num_rows if spread is None else len(spread.rows), num_neighbours)
        super().__init__(context, *shape, start=lambda _: context.constant_weight(shape, trit=1, exponent=0))
        self.allow_loops, self.spread = allow_loops, spread
        empty = torch.full(shape, -1, dtype=torch.int32, device=context.device)
        self.add_table("neighbours", empty, -1, (num_rows if num_targets is None else num_targets) - 1)
        self.add_table("scores", torch.zeros(shape, dtype=torch.int8, device=context.device), 0, SCORE_MAX)

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        """Count the pairs of each pass: sources and targets, two tensors of ids of one shape, with -1 for none."""
        sources_M, targets_M = (
            torch.cat([ids.reshape(-1) for ids in side]) for side in zip(*passes, strict=True)
        )
        tables = (self.get_buffer("neighbours"), self.get_buffer("scores"), self.weight)
        allow_loops = self.allow_loops
        if self.spread is not None:
            # The rows of the tables are numbered from 0, and the targets are not.
            kept_M = self.spread.places(sources_M)
            sources_M = kept_M if allow_loops else torch.where(sources_M == targets_M, -1, kept_M)
            allow_loops = True
        self.ops.update_neighbours(*tables, sources_M, targets_M, allow_loops=allow_loops, out=tables)
        self.changed()

    def neighbours_of(self, ids: Tensor) -> Tensor:
        """Return the neighbours of rows, int32 [..., J], for ids int64 [...], whoever keeps the rows."""
        table_NJ = self.get_buffer("neighbours")
        if self.spread is None:
            return table_NJ[ids]
        return sent_rows(ids, self.spread, table_NJ.__getitem__, self.voting.ranks)


class TernaryGraph(ArbModule):
    """The nodes of a batch's codes, after messages from their neighbours.

    Math:    h = W_node c; then `num_hops` times: m = sum_j a_j h_j over the neighbours of each node,
             h <- h + W_upd RMSNorm(W_msg m) + B_k A h, with a B_k for each hop; last, if `extra` is given,
             h <- h + W_upd RMSNorm(W_msg W_node extra)
    Shapes:  codes int64 [B, P], extra [B, P, C] or None -> [B, P, D]
    Paths:   `full` computes the nodes of all codes, then takes those of the batch. `active` computes the codes of the batch,
             their neighbours and so on, not deduplicated, so that output shapes depend on input shapes alone. The paths are equal
             but for rounding. By default the path is `full` for up to FULL_PATH_MAX_CODES codes, unless a batch is so small that
             `active` has fewer nodes
    Edges:   consecutive codes of each sequence, counted by a step after an accepted backward pass
    Source:  REFACTOR7 (hop), REFACTOR11 (active path), REFACTOR14 (tables); docs/spec/edges.md
    """

    def __init__(self, context: GraphContext, codes: CodeVectors) -> None:
        super().__init__(context)
        config = context.config
        # Only the bound method is kept, so that the codebooks are not submodules of the graph as well.
        self.fetch = codes.rows
        self.num_codes, self.num_hops = codes.num_codes, config.num_hops
        width, rank = config.width, config.hop_rank
        self.edges = EdgeTable(context, self.num_codes, config.num_neighbours)
        self.node = TernaryLinear(context, config.code_dim, width, gain=NODE_GAIN)
        self.message = TernaryLinear(context, width, width)
        self.message_norm = TernaryRMSNorm(context, width)
        self.update = TernaryLinear(context, width, width, gain=HOP_GAIN)
        self.adapter_down = TernaryLinear(context, width, rank)
        self.adapter_up = PartList(
            TernaryLinear(context, rank, width, gain=ADAPTER_GAIN) for _ in range(config.num_hops)
        )
        # Neighbours are read in every hop, and composites once.
        reads = self.num_hops + bool(config.composite_codes)
        for module, times in (
            # `node` reads the codes, the sums of the first hop, and the composites.
            (self.node, 1 + 1 + bool(config.composite_codes)),
            (self.message, reads),
            (self.update, reads),
            (self.adapter_down, self.num_hops),
        ):
            used(module, times)

    def forward(
        self, codes_BP: Tensor, extra_BPC: Tensor | None = None, *, path: str | None = None
    ) -> Tensor:
        """Return the node of each position."""
        checks.dtype_in("codes_BP", codes_BP, (torch.int64,))
        checks.one_of("path", path, (None, *PATHS))
        codes_R = codes_BP.reshape(-1)
        if path is None:
            path = self.cheaper_path(codes_R.numel())
        h_RD = self.full_nodes(codes_R) if path == "full" else self.active_nodes(codes_R)
        if extra_BPC is not None:
            extra_RC = extra_BPC.reshape(codes_R.numel(), -1)
            h_RD = h_RD + self.read(self.node(extra_RC))
        h_BPD = h_RD.reshape(*codes_BP.shape, -1)
        return when_voting(h_BPD, self.edges, codes_BP[:, :-1], codes_BP[:, 1:])

    def cheaper_path(self, num_positions: int) -> str:
        """Return the path for a number of positions. It depends on shapes alone."""
        reached = num_positions * self.edges.weight.shape[1] ** max(0, self.num_hops - 1)
        return "full" if self.num_codes <= min(FULL_PATH_MAX_CODES, reached) else "active"

    def full_nodes(self, codes_R: Tensor) -> Tensor:
        """Return the nodes of some codes, [R, D], out of the nodes of all codes."""
        every_N = torch.arange(self.num_codes, device=self.edges.device)
        c_NC, neighbours_NJ = self.vectors(every_N), self.edges.neighbours_of(every_N)
        signs_NJ, h_ND = self.edges(every_N), self.node(c_NC)
        for hop in range(self.num_hops):
            h_ND = self.after_hop(hop, h_ND, c_NC, neighbours_NJ, signs_NJ)
        # A sum of one term takes the nodes. Unlike an index, it has a gradient that adds up in the same order on every run.
        one_R1 = torch.ones(codes_R.numel(), 1, dtype=h_ND.dtype, device=h_ND.device)
        return self.gathered(h_ND, codes_R[:, None], one_R1)

    def active_nodes(self, codes_R: Tensor) -> Tensor:
        """Return the nodes of some codes, [R, D].

        Level 0 holds the codes, and level l + 1 the neighbours of level l. All levels that a hop needs lie in one tensor, one
        after the other, so that each matrix is applied once.
        """
        num_slots = self.edges.weight.shape[1]
        levels = [codes_R]
        for _ in range(self.num_hops):
            # The code of an empty slot is never read, so any code will do.
            reached = self.edges.neighbours_of(levels[-1].clamp(min=0))
            levels.append(reached.reshape(-1).to(torch.int64))
        sizes = [level.numel() for level in levels]
        ids_L = torch.cat(levels)
        c_LC = self.vectors(ids_L.clamp(min=0))
        # The neighbours of all levels but the last are summed.
        num_inner = ids_L.numel() - sizes[-1]
        signs_LJ, h_LD = self.edges(ids_L[:num_inner].clamp(min=0)), self.node(c_LC[:num_inner])
        # The neighbours of node l are the J nodes from R + l J on, because levels are laid out in that order.
        places_LJ = torch.arange(sizes[0], ids_L.numel(), device=codes_R.device).reshape(num_inner, num_slots)
        slots_LJ = torch.where(ids_L[places_LJ] < 0, -1, places_LJ)
        for hop in range(self.num_hops):
            num_nodes = sum(sizes[: self.num_hops - hop])
            h_LD = self.after_hop(hop, h_LD, c_LC, slots_LJ[:num_nodes], signs_LJ[:num_nodes])
        return h_LD

    def vectors(self, ids: Tensor) -> Tensor:
        """Return the vectors of codes as constants, because the codebooks learn by their own losses."""
        with torch.no_grad():
            return self.fetch(ids)

    def gathered(self, h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor) -> Tensor:
        """Return the sums over neighbours; differentiable in the nodes and in the signs."""
        return edge_sum(h_ND, neighbours_RJ, signs_RJ, self.ops)

    def after_hop(
        self, hop: int, h_ND: Tensor, c_NC: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor
    ) -> Tensor:
        """Return the first R nodes after they have read their neighbours. The first hop sums in the space of codes."""
        if hop == 0:
            m_RD = self.node(self.gathered(c_NC, neighbours_RJ, signs_RJ))
        else:
            m_RD = self.gathered(h_ND, neighbours_RJ, signs_RJ)
        h_RD = h_ND[: m_RD.shape[0]]
        return h_RD + self.read(m_RD) + self.adapter_up[hop](self.adapter_down(h_RD))

    def read(self, m_RD: Tensor) -> Tensor:
        """Return what sums of neighbours add to a node."""
        return self.update(self.message_norm(self.message(m_RD)))


def edge_sum(h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor, ops: ModuleType) -> Tensor:
    """Return `ops.edge_sum`, differentiable in the nodes and in the signs."""
    return uncompiled(_EdgeSumFunction.apply, h_ND, neighbours_RJ, signs_RJ, ops)


class _EdgeSumFunction(torch.autograd.Function):
    """`ops.edge_sum` with the gradients of nodes and signs."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, neighbours_RJ: Tensor, signs_RJ: Tensor, ops: Any) -> Tensor:
        ctx.save_for_backward(h_ND, neighbours_RJ, signs_RJ)
        ctx.ops = ops
        return ops.edge_sum(h_ND, neighbours_RJ, signs_RJ)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, neighbours_RJ, signs_RJ = ctx.saved_tensors
        grad_h = grad_signs = None
        if ctx.needs_input_grad[0]:
            grad_h = ctx.ops.edge_sum_input_grad(grad_RD, neighbours_RJ, signs_RJ, num_nodes=h_ND.shape[0])
        if ctx.needs_input_grad[2]:
            grad_signs = ctx.ops.edge_sum_sign_grad(grad_RD, h_ND, neighbours_RJ).to(signs_RJ.dtype)
        return grad_h, None, grad_signs, None
