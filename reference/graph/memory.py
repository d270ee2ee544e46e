"""MemGram: what followed from the same codes before, remembered in tables whose rows are hashed n-grams of codes.

Legend: B batch, P positions, D width, M memory width, O orders of a table, N rows of a table, R rows named.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.constants import STRENGTH_MAX
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.module import ArbModule, TableModule, when_voting

STRUCTURE_ORDERS, CONVERSATION_ORDERS = (2, 3), (4, 8)
"""Codes of the n-grams that each table holds. A code spans three bytes and the next one starts a byte later: 4 to 10 bytes."""

STRUCTURE_RULE, CONVERSATION_RULE = (8, 2), (2, 4)
"""Gain and shift of each table: what a strength gains each time its row is named, and the share 2**-shift of it that it loses
at a visit of the window. Both settle at 64 under an average load, the second four times as slowly.
"""


class MemoryTable(TernaryEmbedding, TableModule):
    """Rows named by hashed n-grams of codes, and how strong each is.

    Math:    read: g(s) RMSNorm(W[row]) for each n-gram, g = (1 + s) / 128 of the moment; 0 for a row of -1
             after a step, of accepted passes: strengths of a window decay, those of the rows named rise (touch_strengths)
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

        The order is the salt, so that a trigram does not share the row of the bigram it ends with.
        """
        found = []
        for order in self.orders:
            before = None if previous is None else previous[:, previous.shape[1] - order + 1 :]
            table: dict[str, Any] = {"num_rows": self.num_rows, "salt": order, "previous": before}
            found.append(self.ops.ngram_rows(codes_BP, order=order, **table))
        return torch.stack(found)

    def read(self, rows: Tensor, norm: TernaryRMSNorm) -> Tensor:
        """Return the rows, normed, each times the share that its strength gives it; zeros for a row of -1."""
        values = when_voting(self.rows_or_zeros(rows), self, rows)
        strengths = self.get_buffer("strengths")[rows.clamp(min=0)].to(torch.float32)
        shares = torch.where(rows >= 0, (1 + strengths) / (1 + STRENGTH_MAX), 0.0)
        return norm(values) * shares[..., None].to(values.dtype)

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        """Let the strengths of this step's window decay, and raise those of the rows that some passes named."""
        strengths = self.get_buffer("strengths")
        rows = torch.cat([named.flatten() for (named,) in passes])
        # One row decays for each position. `step` counts passes, so that windows of consecutive steps follow each other.
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
    """Adds to a position what its last codes were worth before.

    Math:    m = sum over tables and their orders of g(s) RMSNorm(W[row of the n-gram that ends here])
             e <- e + sigmoid(w . RMSNorm(e)) * W_out m
    Shapes:  e [B, P, D], codes int64 [B, P], previous int64 [B, codes_before] or None -> [B, P, D]
    Attributes:
        codes_before: codes before the first position that `previous` holds, -1 where there was none.
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
        """Return the stream with what the memory adds to it."""
        tables = (self.structure, self.conversation)
        m_BPM = sum(table.read(table.rows(codes_BP, previous), self.row_norm).sum(dim=0) for table in tables)
        gate_BP1 = torch.sigmoid(self.gate(self.gate_norm(e_BPD)))
        return e_BPD + gate_BP1 * self.output(m_BPM)
