"""A step of generation: read the id that was predicted, predict the next. On a GPU it is recorded once and then replayed.

What a step launches is the same for every position of a ledger, so that one CUDA graph serves until the ledger is given more
memory. The draw and what follows it belong to the step: the id is appended to the ledger. A block that is complete is summarised by
launches of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arbitor.optimized.training.recording import LAUNCHED_FIRST, in_branches, recorded
from arbitor.reference.graph.ledger import KVLedger

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel

Choose = Callable[[Tensor], Tensor]
"""What is predicted from logits [B, V]: int64 [B]. A recorded step needs one that leaves all work to the device."""


class Reader:
    """Takes steps over a ledger that has read a prompt, launched from Python, one kernel after the other."""

    def __init__(self, model: ArbModel, ledger: KVLedger) -> None:
        """Begin with a model and what it has read."""
        self.model, self.ledger = model, ledger

    def step(self, choose: Choose) -> None:
        """Read the one id of each sequence that is unread, and append the one that is chosen to follow it."""
        self.model(None, ledger=self.ledger, choose=choose)


class RecordedReader(Reader):
    """Takes the same steps on CUDA from a graph, once `LAUNCHED_FIRST` were launched on the memory that the ledger has.

    To be used without gradients and under `values_vouched_for`, as the checks of values wait for the device. The graph reads
    the memory of the model as it is then: it must not be moved.
    """

    def __init__(self, model: ArbModel, ledger: KVLedger) -> None:
        """Begin with a model and what it has read."""
        super().__init__(model, ledger)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._choose: Choose | None = None
        self._places: list[tuple[int, int]] = []
        self._launched = 0

    def step(self, choose: Choose) -> None:
        """See `Reader.step`."""
        self.ledger.reserve(1)
        if self._places != self.ledger.places() or self._choose is not choose:
            self._places, self._choose, self._graph, self._launched = self.ledger.places(), choose, None, 0
        if self._launched < LAUNCHED_FIRST:
            super().step(choose)
            self._launched += 1
            return
        if self._graph is None:
            with in_branches(self.model.voting, "reads_apart"):
                [self._graph] = recorded(self._read)
        self.ledger.replay()
        self._graph.replay()
        self.ledger.replayed()

    def _read(self) -> None:
        assert self._choose is not None
        self.ledger.follow(self._choose(self.model.read(None, self.ledger)[:, -1]))
