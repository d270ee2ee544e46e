"""ByteNgrams: what runs of bytes mean as wholes, in one table whose rows belong to hashed runs.

Legend: B batch, T bytes, P = T - 2 positions, O orders, D width, M width of a row, R rows named.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbitor.reference.config import NGRAM
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear
from arbitor.reference.graph.module import ArbModule

ORDERS = (3, 4, 5, 6)
"""Numbers of bytes of the runs that end with a position."""


class ByteNgrams(ArbModule):
    """A vector for each run of bytes, added to the position that the run ends with.

    A position is a linear map of its three bytes, so that it says nothing of their being together. Here the run itself names a row.

    Math:    m = sum over orders of W[row of the run of so many bytes that ends with the position]; 0 for a run that is cut off by
             the start of the text. The result is W_out m
    Shapes:  ids int64 [B, T], previous int64 [B, bytes_before] or None -> [B, P, D]
    Start:   rows of zeros, so that a run that was never met says nothing
    Attributes:
        bytes_before: number of bytes before the first id that `previous` holds. It is -1 where there was no byte.
    Source:  docs/spec/memory.md; hashed n-grams of bytes as in Pagnoni et al., "Byte Latent Transformer", 2024
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        shape = (context.config.ngram_rows, context.config.ngram_dim)
        self.num_rows, self.orders = shape[0], ORDERS
        self.bytes_before = max(self.orders) - 1
        self.table = TernaryEmbedding(
            context, *shape, start=lambda _: context.constant_weight(shape, trit=0, exponent=0)
        )
        self.output = TernaryLinear(
            context, shape[1], context.config.width, gain=1.0 / math.sqrt(len(self.orders))
        )

    def forward(self, ids_BT: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return what the runs that end with each position add to it."""
        m_OBPM = self.table.rows_or_zeros(self.rows(ids_BT, previous))
        return self.output(m_OBPM.sum(dim=0))

    def rows(self, ids_BT: Tensor, previous: Tensor | None) -> Tensor:
        """Return the row of each order's run that ends with each position, int64 [O, B, P]; -1 for none.

        The order is the salt of the hash, so that runs of several lengths share the table and no row on purpose.
        """
        found = []
        for order in self.orders:
            before = None if previous is None else previous[:, previous.shape[1] - order + 1 :]
            rows_BT = self.ops.ngram_rows(
                ids_BT, order=order, num_rows=self.num_rows, salt=order, previous=before
            )
            found.append(rows_BT[:, NGRAM - 1 :])
        return torch.stack(found)
