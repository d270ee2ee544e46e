"""The pass of a micro-batch: forward, backward, votes. On a GPU it is recorded once and then replayed.

There are two CUDA graphs, since the host looks at the loss between them: a loss that is not finite must change nothing. The
step rule, which looks at the notes that the passes left, is launched from Python while the device is still busy with the backward
pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arbitor.optimized.training.recording import LAUNCHED_FIRST, recorded
from arbitor.reference import checks

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.graph.voting import Note


class Passes:
    """Takes the passes of a model, launched from Python, one kernel after the other.

    What votes change is not copied first: the trainer ends with a pass that raises, and its model is not used again.
    """

    def __init__(self, model: ArbModel) -> None:
        """Begin with a model."""
        self.model = model

    def take(self, ids_BT: Tensor, *, rate: float, step: int) -> float | None:
        """Run one pass, in which every weight behind the loss votes.

        Args:
            ids_BT: int64 [B, T], on the CPU or where the model is.
            rate, step: as `ArbModel.backward` takes them.

        Returns:
            Nats per byte; or None where the loss is not finite, in which case not one byte of the model has changed.
        """
        losses = self.model.losses(ids_BT.to(self.model.voting.faults.device))
        accepted = self.model.backward(losses, rate=rate, step=step, undo=False)
        if not accepted:
            return None
        return float(self.model.voting.ranks.mean(losses["bytes"].detach()))


class RecordedPasses(Passes):
    """Takes the passes of a model on CUDA from two graphs, once `LAUNCHED_FIRST` of them were accepted.

    The first ones are launched, on the same buffers and with the same kernels as are then recorded. The graphs read and write
    the memory of the model as it is then: it must not be moved, and what is frozen must stay so. All passes have ids of one shape.
    """

    def __init__(self, model: ArbModel) -> None:
        """Begin with a model."""
        super().__init__(model)
        device = model.voting.faults.device
        self._ids_BT: Tensor | None = None
        self._rate = torch.zeros((), device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._objective: Tensor | None = None
        self._seen_2 = torch.zeros(2, dtype=torch.float64, device=device)
        self._notes: list[Note] = []
        self._accepted = 0
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def take(self, ids_BT: Tensor, *, rate: float, step: int) -> float | None:
        """See `Passes.take`; raises ValueError for ids of another shape than before."""
        checks.vote_rate(rate)
        checks.vote_clock(self.model.voting.seed, step, 0)
        if rate == 0:  # nothing votes: it is no pass like the others
            return super().take(ids_BT, rate=rate, step=step)
        self._fill(ids_BT, rate, step)
        if self._accepted >= LAUNCHED_FIRST and self._graphs is None:
            self._graphs = self._record()
        forward, backward = self._runs()
        forward()
        objective, nats = self._seen_2.tolist()
        if not math.isfinite(objective):
            self._objective = None
            return None
        backward()
        self._accepted += 1
        # Copies, as the next replay writes over what this one left; and the step as a number, as the step rule is launched.
        self.model.voting.leave([note.on(torch.clone) for note in self._notes], step=step)
        return float(nats)

    def _fill(self, ids_BT: Tensor, rate: float, step: int) -> None:
        """Write what a pass reads into its buffers."""
        if self._ids_BT is None:
            self._ids_BT = torch.empty_like(ids_BT, device=self._rate.device)
        if ids_BT.shape != self._ids_BT.shape:
            raise ValueError(
                f"ids_BT has shape {tuple(ids_BT.shape)}, but must have that of all passes, {tuple(self._ids_BT.shape)}"
            )
        self._ids_BT.copy_(ids_BT)
        self._rate.fill_(rate)
        self._step.fill_(step)

    def _runs(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """What runs the forward and the backward pass of the buffers."""
        if self._graphs is None:
            return self._forward, self._backward
        forward, backward = self._graphs
        return forward.replay, backward.replay

    def _forward(self) -> None:
        assert self._ids_BT is not None
        losses = self.model.losses(self._ids_BT)
        self._objective = self.model.objective(losses)
        self._seen_2.copy_(torch.stack([self._objective.detach(), losses["bytes"].detach()]))

    def _backward(self) -> None:
        assert self._objective is not None
        voting = self.model.voting
        left_before = len(voting.notes)
        with voting.taking(rate=self._rate, step=self._step, undo=False):
            self._objective.backward()
        self._objective = None
        # A replay runs no Python: `take` leaves these notes after each of them, and after passes that were launched.
        self._notes, voting.notes = voting.notes[left_before:], voting.notes[:left_before]

    def _record(self) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """Record both passes; the second reads what the first leaves."""
        forward, backward = recorded(self._forward, self._backward)
        return forward, backward
