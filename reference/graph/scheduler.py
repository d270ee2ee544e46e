"""The view of a position on a long past: near positions one by one, and older positions as summaries of ever larger blocks.

Legend: B batch, Q queries (positions that look), S slots that any of them sees, N rows of a log, K columns of a row,
b positions of the smallest block, w positions of the window, n_l = b 4**l positions of a block of level l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arbitor.reference.config import ArbConfig

LEVELS = 8
"""Number of block sizes. With blocks of 64 the largest block holds a million positions. Positions before the last visible block are
forgotten."""

CHILDREN = 4
"""Blocks of a level that make one block of the next level."""


@dataclass(frozen=True)
class Seen:
    """The rows that some queries see.

    Fields:
        places_BS: int64, rows of the log that at least one of the queries sees. Unused slots hold 0, a row that is always written.
        bias_BQS:  float32, added to the score of a query and a row: 0 for a position, ln n for a summary of n positions, -inf if
                   the query does not see the row.
    """

    places_BS: Tensor
    bias_BQS: Tensor


class ContextAttentionScheduler:
    """The rows of a log that a position sees, as a pure function of the position, whatever else was read.

    Math:    start_0(p) = b max(0, floor((p + 1 - w) / b)): p sees start_0(p) .. p one by one
             start_{l+1}(p) = 4 n_l max(0, floor((start_l(p) - S n_l) / (4 n_l))): p sees the blocks of level l between
             start_{l+1}(p) and start_l(p), which are S to S + 3 blocks, or all there are; l < LEVELS
    Cost:    at most w + b - 1 + LEVELS (S + 3) rows a query, however long the past
    Log:     a row for every position and for every complete block, in the order in which they become known. Position s is at
             place s + sum over levels of floor(s / n_l). The blocks that end with it follow, small blocks first
    Source:  docs/spec/attention.md; REFACTOR14 (ContextAttentionScheduler, compressed temporal)
    """

    def __init__(self, config: ArbConfig) -> None:
        self.window, self.block, self.num_summaries = config.window, config.block, config.num_summaries
        self.sizes = tuple(config.block * CHILDREN**level for level in range(LEVELS))

    def starts(self, positions: Tensor) -> list[Tensor]:
        """Return start_0 .. start_LEVELS of int64 positions, each in the shape of `positions`."""
        found = [self.block * ((positions + 1 - self.window) // self.block).clamp(min=0)]
        for size in self.sizes:
            parent = CHILDREN * size
            found.append(parent * ((found[-1] - self.num_summaries * size) // parent).clamp(min=0))
        return found

    def place_of_position(self, positions: Tensor) -> Tensor:
        """Return the place of each position in the log."""
        return positions + sum((positions // size for size in self.sizes), torch.zeros_like(positions))

    def place_of_block(self, level: int, blocks: Tensor) -> Tensor:
        """Return the place of each block of a level in the log."""
        return self.place_of_position((blocks + 1) * self.sizes[level] - 1) + 1 + level

    def log_size(self, positions: int) -> int:
        """Return the rows of the log after so many positions."""
        return positions + sum(positions // size for size in self.sizes)

    def middle(self, level: int, blocks: Tensor) -> Tensor:
        """Return the position whose rotary turn stands for a block: the middle, which is nearest to all its positions."""
        return blocks * self.sizes[level] + self.sizes[level] // 2

    def seen(self, first_B: Tensor, num_queries: int) -> Seen:
        """Return what the positions first, first + 1, ... of each sequence see. Shapes depend on `num_queries` alone."""
        first_B1 = first_B[:, None]
        ahead_Q = torch.arange(num_queries, device=first_B.device)
        oldest, newest = self.starts(first_B1), self.starts(first_B1 + num_queries - 1)
        starts = [start_BQ[:, :, None] for start_BQ in self.starts(first_B1 + ahead_Q)]
        last_BQ1 = (first_B1 + ahead_Q)[:, :, None]

        exact_BS = oldest[0] + _count(self.window + self.block + num_queries - 2, first_B)
        visible = [(exact_BS[:, None] >= starts[0]) & (exact_BS[:, None] <= last_BQ1)]
        within = [exact_BS < first_B1 + num_queries]
        places, weights = [self.place_of_position(exact_BS)], [0.0]
        for level, size in enumerate(self.sizes):
            slots = self.num_summaries + CHILDREN - 1 + math.ceil((num_queries - 1) / size)
            blocks_BS = oldest[level + 1] // size + _count(slots, first_B)
            begin_B1S = (blocks_BS * size)[:, None]
            visible.append((begin_B1S >= starts[level + 1]) & (begin_B1S < starts[level]))
            within.append(blocks_BS * size < newest[level])
            places.append(self.place_of_block(level, blocks_BS))
            weights.append(math.log(size))
        bias = [
            torch.where(sees_BQS, weight, -torch.inf)
            for sees_BQS, weight in zip(visible, weights, strict=True)
        ]
        places_BS = torch.where(torch.cat(within, dim=1), torch.cat(places, dim=1), 0)
        return Seen(places_BS, torch.cat(bias, dim=2))

    def places_of_parts(self, level: int, blocks: Tensor) -> Tensor:
        """Return the places of the rows that blocks average, int64 [blocks, parts]: positions, or four smaller blocks."""
        if level == 0:
            ahead = _count(self.block, blocks)
            return self.place_of_position(blocks[:, None] * self.block + ahead)
        return self.place_of_block(level - 1, blocks[:, None] * CHILDREN + _count(CHILDREN, blocks))


def _count(num_slots: int, like: Tensor) -> Tensor:
    return torch.arange(num_slots, device=like.device)
