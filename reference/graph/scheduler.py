"""The view of a position on a long past: near positions one by one, and older positions as summaries of ever larger blocks.

Legend: B batch, Q queries (positions that look), S slots that any of them sees, N rows of a log, K columns of a row,
b positions of the smallest block, w positions of the window, n_l = b 4**l positions of a block of level l.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import CONTEXT_CHILDREN
from arbitor.reference.ops.attention import block_sizes, place_in_log


@dataclass(frozen=True)
class Seen:
    """The rows that some queries see.

    Fields:
        places_BS: int64, rows of the log that at least one of the queries sees. Unused slots hold 0, a row that is always written.
        bias_BQS:  float32, added to the score of a query and a row: 0 for a position, ln n for a summary of n positions, -inf if
                   the query does not see the row.
        own_BQ:    int64, the places of the queries' own rows.
    """

    places_BS: Tensor
    bias_BQS: Tensor
    own_BQ: Tensor


class ContextAttentionScheduler:
    """The rows of a log that a position sees, as a pure function of the position, whatever else was read.

    Math:    start_0(p) = b max(0, floor((p + 1 - w) / b)): p sees start_0(p) .. p one by one
             start_{l+1}(p) = 4 n_l max(0, floor((start_l(p) - S n_l) / (4 n_l))): p sees the blocks of level l between
             start_{l+1}(p) and start_l(p), which are S to S + 3 blocks, or all there are; l < CONTEXT_LEVELS
    Cost:    at most w + b - 1 + CONTEXT_LEVELS (S + 3) rows a query, however long the past
    Log:     a row for every position and for every complete block, in the order in which they become known. Position s is at
             place s + sum over levels of floor(s / n_l). The blocks that end with it follow, small blocks first
    Source:  docs/spec/attention.md; REFACTOR14 (ContextAttentionScheduler, compressed temporal)
    """

    def __init__(self, config: ArbConfig) -> None:
        self.window, self.block, self.num_summaries = config.window, config.block, config.num_summaries
        self.sizes = block_sizes(config.block)

    def place_of_position(self, positions: Tensor) -> Tensor:
        """Return the place of each position in the log."""
        return place_in_log(positions, self.sizes)

    def place_of_block(self, level: int, blocks: Tensor) -> Tensor:
        """Return the place of each block of a level in the log."""
        return self.place_of_position((blocks + 1) * self.sizes[level] - 1) + 1 + level

    def log_size(self, positions: int) -> int:
        """Return the rows of the log after so many positions."""
        return positions + sum(positions // size for size in self.sizes)

    def middle(self, level: int, blocks: Tensor) -> Tensor:
        """Return the position whose rotary turn stands for a block: the middle, which is nearest to all its positions."""
        return blocks * self.sizes[level] + self.sizes[level] // 2

    def seen(self, first_B: Tensor, num_queries: int, ops: ModuleType | None = None) -> Seen:
        """Return what the positions first, first + 1, ... of each sequence see. Shapes depend on `num_queries` alone."""
        view = (reference_ops if ops is None else ops).visible_slots(
            first_B,
            num_queries=num_queries,
            window=self.window,
            block=self.block,
            num_summaries=self.num_summaries,
        )
        return Seen(*view)

    def places_of_parts(self, level: int, blocks: Tensor) -> Tensor:
        """Return the places of the rows that blocks average, int64 [blocks, parts]: positions, or four smaller blocks."""
        if level == 0:
            ahead = _count(self.block, blocks)
            return self.place_of_position(blocks[:, None] * self.block + ahead)
        return self.place_of_block(
            level - 1, blocks[:, None] * CONTEXT_CHILDREN + _count(CONTEXT_CHILDREN, blocks)
        )


def _count(num_slots: int, like: Tensor) -> Tensor:
    return torch.arange(num_slots, device=like.device)
