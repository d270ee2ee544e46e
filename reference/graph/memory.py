"""MemGram: a memory of what followed the same codes before, in tables whose rows belong to hashed n-grams of codes.

Legend: B batch, P positions, D width, M memory width, O orders of a table, N rows of a table, R rows named.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.constants import STRENGTH_MAX
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm, add_norm
from arbitor.reference.graph.module import ArbModule
from arbitor.reference.graph.tables import TableModule, when_voting

STRUCTURE_ORDERS, CONVERSATION_ORDERS = (2, 3), (4, 8)
"""Numbers of codes of the n-grams of each table. A code spans three bytes, and the next code starts a byte later, so n-grams span 4
to 10 bytes."""

STRUCTURE_RULE, CONVERSATION_RULE = (8, 2), (2, 4)
"""Gain and shift of each table. A strength gains `gain` each time its row is named, and loses its share 2**-shift at a visit of the
window. The strengths of both tables settle at 64 under an average load, those of the second four times as slowly.
"""


class MemoryTable(TernaryEmbedding, TableModule):
    """Rows named by hashed n-grams of codes, and the strength of each row.

    Math:    read: g(s) RMSNorm(W[row]) for each n-gram, with g = (1 + s) / 128 of the strength s now; 0 for a row of -1
             after a step: strengths in a window decay, and those of rows that accepted passes named rise (touch_strengths)
    Shapes:  codes int64 [B, P] -> rows int64 [O, B, P]; rows [...] -> [..., M] in the model's dtype; strengths int8 [N]
    Start:   strengths 0; the scale of the rows has no effect, since they are normed
    Source:  docs/spec/memory.md; REFACTOR12 (structure and conversation memory)
    """

    def __init__(self, context: GraphContext, orders: tuple[int, ...], rule: tuple[int, int]) -> None:
        super().__init__(context, context.config.memory_rows, context.config.memory_dim)
        self.num_rows, self.orders = context.config.memory_rows, orders
        self.gain, self.shift = rule
        zeros_N = torch.zeros(self.num_rows, dtype=torch.int8, device=context.device)
        self.add_table("strengths", zeros_N, 0, STRENGTH_MAX)

    def rows(self, codes_BP: Tensor, previous: Tensor | None) -> Tensor:
        """Return the row of each order's n-gram that ends at each position, int64 [O, B, P]; -1 for none.

        The order is the salt of the hash, so that a trigram does not share the row of the bigram that it ends with.
        """
        found = []
        for order in self.orders:
            before = None if previous is None else previous[:, previous.shape[1] - order + 1 :]
            table: dict[str, Any] = {"num_rows": self.num_rows, "salt": order, "previous": before}
            found.append(self.ops.ngram_rows(codes_BP, order=order, **table))
        return torch.stack(found)

    def read(self, codes_BP: Tensor, previous: Tensor | None, norm: TernaryRMSNorm) -> Tensor:
        """Return the rows of all n-grams, normed, each times the share g of its strength; zeros where there is none."""
        rows = self.rows(codes_BP, previous)
        values = when_voting(self.rows_or_zeros(rows), self, rows)
        strengths = self.get_buffer("strengths")[rows.clamp(min=0)].to(torch.float32)
        shares = torch.where(rows >= 0, (1 + strengths) / (1 + STRENGTH_MAX), 0.0)
        return norm(values) * shares[..., None].to(values.dtype)

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        """Let the strengths of this step's window decay, and raise those of the rows that some passes named."""
        strengths = self.get_buffer("strengths")
        rows = torch.cat([named.flatten() for (named,) in passes])
        # One row decays for each position. `step` counts passes, so that the windows of consecutive steps follow each other.
        window = min(self.num_rows, rows.numel() // len(self.orders))
        self.ops.touch_strengths(
            strengths,
            rows,
            gain=self.gain,
            first=self.voting.step * window // len(passes),
            window=window,
            shift=self.shift,
            out=strengths,
        )


class MemGram(ArbModule):
    """The memory in the stream. It adds to a position what the tables hold for its last codes.

    Math:    m = sum over tables and their orders of g(s) RMSNorm(W[row of the n-gram that ends here])
             e <- e + sigmoid(w . RMSNorm(e)) * W_out m
    Shapes:  e [B, P, D], codes int64 [B, P], previous int64 [B, codes_before] or None -> [B, P, D]
    Attributes:
        codes_before: number of codes before the first position that `previous` holds. A code is -1 where there was no position.
    Source:  docs/spec/memory.md; REFACTOR12 (MemGram, opt-in)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        width, memory_dim = context.config.width, context.config.memory_dim
        self.codes_before = max(STRUCTURE_ORDERS + CONVERSATION_ORDERS) - 1
        self.structure = MemoryTable(context, STRUCTURE_ORDERS, STRUCTURE_RULE)
        self.conversation = MemoryTable(context, CONVERSATION_ORDERS, CONVERSATION_RULE)
        self.row_norm = TernaryRMSNorm(context, memory_dim)
        num_reads = len(STRUCTURE_ORDERS + CONVERSATION_ORDERS)
        self.output = TernaryLinear(context, memory_dim, width, gain=1.0 / math.sqrt(num_reads))
        self.gate_norm = TernaryRMSNorm(context, width)
        self.gate = TernaryLinear(context, width, 1)

    def forward(self, e_BPD: Tensor, codes_BP: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return the stream with the memory added."""
        tables = (self.structure, self.conversation)
        structure_OBPM, conversation_OBPM = self.structure.voting.alongside(
            *(partial(table.read, codes_BP, previous, self.row_norm) for table in tables)
        )
        m_BPM = structure_OBPM.sum(dim=0) + conversation_OBPM.sum(dim=0)
        e_BPD, normed_BPD = add_norm(e_BPD, None, self.gate_norm)
        gate_BP1 = torch.sigmoid(self.gate(normed_BPD))
        return e_BPD + gate_BP1 * self.output(m_BPM)
