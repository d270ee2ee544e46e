"""The rows of a KV ledger: tensors that grow, and the log of what the attention of a layer keeps.

Legend: B batch (sequences), P positions of one pass, K columns of a row, S slots, Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arbitor.reference.graph.rotary import turns_at, with_turned_key
from arbitor.reference.graph.scheduler import Seen

if TYPE_CHECKING:
    from arbitor.reference.graph.ledger import KVLedger


class GrowingRows:
    """Rows of several sequences in one tensor [B, capacity, ...], whose capacity doubles when it is full."""

    def __init__(
        self, batch: int, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = torch.zeros(batch, 0, *shape, dtype=dtype, device=device)

    def reserve(self, size: int) -> None:
        """Make room for so many rows of each sequence; new ones are 0."""
        capacity = self.rows.shape[1]
        if size > capacity:
            grown = self.rows.new_zeros(self.rows.shape[0], max(size, 2 * capacity), *self.rows.shape[2:])
            grown[:, :capacity] = self.rows
            self.rows = grown

    def write(self, places_BQ: Tensor, values: Tensor, size: int, sequences: Tensor | None = None) -> None:
        """Write values [B, Q, ...] to places below `size`; with `sequences` int64 [b], of those sequences only."""
        self.reserve(size)
        if sequences is None:
            sequences = torch.arange(self.rows.shape[0], device=self.rows.device)
        self.rows[sequences[:, None], places_BQ] = values

    def read(self, places_BS: Tensor) -> Tensor:
        """Return the rows [B, S, ...] at places int64 [B, S]."""
        return rows_at(self.rows, places_BS)


class LayerLedger:
    """What the attention of one layer keeps: the log of its rows. See `ContextAttentionScheduler` for their order.

    A row is [rotary key; normed latent; rotary key turned to the row's position].
    """

    def __init__(self, ledger: KVLedger) -> None:
        config = ledger.config
        self.ledger = ledger
        self.rotary_dim = config.rotary_dim
        columns = config.kv_latent + 2 * config.rotary_dim
        self.log = GrowingRows(ledger.batch, (columns,), dtype=ledger.dtype, device=ledger.device)

    @property
    def first_B(self) -> Tensor:
        """Return the first position of this pass, of each sequence, int64."""
        return self.ledger.first_B

    @property
    def is_empty(self) -> bool:
        """Return whether no position of any sequence came before this pass."""
        return not any(self.ledger.positions)

    def append(self, rows_BPK: Tensor) -> None:
        """Write the rows of this pass, and the summaries of the blocks that they complete.

        A single position sees no block that it completes: a block is seen once it lies before the window, and this one ends
        here. Its summaries are left to the end of the pass, so that what it launches is the same for every position.
        """
        ledger, scheduler, count = self.ledger, self.ledger.scheduler, rows_BPK.shape[1]
        ledger.expect(count)
        places_BP = scheduler.place_of_position(ledger.first_B[:, None] + ledger.ahead(count))
        self.log.write(places_BP, rows_BPK.detach(), scheduler.log_size(max(ledger.positions) + count))
        if count > 1:
            self.summarise(count)

    def summarise(self, count: int) -> None:
        """Write the summaries of the blocks that the `count` positions of this pass complete."""
        positions, block = self.ledger.positions, self.ledger.scheduler.sizes[0]
        for first in sorted(set(positions)):
            if (first + count) // block != first // block:
                here = [sequence for sequence, position in enumerate(positions) if position == first]
                self._summarise(torch.tensor(here, device=self.ledger.device), first, first + count)

    def _summarise(self, sequences: Tensor, first: int, end: int) -> None:
        """Write the summaries of the blocks that end within first .. end - 1, of some sequences."""
        scheduler, averaged = self.ledger.scheduler, self.log.rows.shape[-1] - self.rotary_dim
        size = scheduler.log_size(end)
        for level, block in enumerate(scheduler.sizes):
            if end // block == first // block:
                return  # a larger block ends only where a smaller one does
            blocks = torch.arange(first // block, end // block, device=self.ledger.device)
            parts = self.log.rows[
                sequences[:, None, None], scheduler.places_of_parts(level, blocks), :averaged
            ]
            rows = with_turned_key(
                mean_of_parts(parts), turns_at(scheduler.middle(level, blocks), self.rotary_dim)
            )
            self.log.write(
                scheduler.place_of_block(level, blocks).expand(len(sequences), -1), rows, size, sequences
            )

    def seen(self, num_queries: int, skipped: int = 0) -> Seen:
        """Return what the positions from first_B + skipped on see; found once a pass, for all layers."""
        return self.ledger.seen(num_queries, skipped)


def rows_at(rows: Tensor, places_BS: Tensor) -> Tensor:
    """Return the rows [B, S, ...] of [B, N, ...] at places int64 [B, S]."""
    return rows[torch.arange(rows.shape[0], device=rows.device)[:, None], places_BS]


def mean_of_parts(parts_BncK: Tensor) -> Tensor:
    """Return the mean of the parts of each block, [B, blocks, K], summed in float32 or better."""
    wide = torch.promote_types(parts_BncK.dtype, torch.float32)
    return parts_BncK.to(wide).mean(dim=2).to(parts_BncK.dtype)
