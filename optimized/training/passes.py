"""The pass of a micro-batch: forward, backward, votes. On a GPU it is recorded once and then replayed.

A pass is some thousand small kernels, and Python launches them more slowly than a GPU computes them. Two CUDA graphs take two
launches. There are two, since the host looks at the loss between them: a loss that is not finite must change nothing. The step
rule, which looks at what the passes left, is launched from Python while the device is still busy with the backward pass.
Replaying gives the bits that launching gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.graph.state import Left

LAUNCHED_FIRST = 2
"""Passes before the one that is recorded: kernels are compiled in them, and libraries set themselves up."""


class Passes:
    """Takes the passes of a model.

    Attributes:
        recording: whether passes are recorded; False where they are launched from Python, one kernel after the other.
    """

    def __init__(self, model: ArbModel, *, record: bool) -> None:
        """Begin with a model. Recording takes one on CUDA, built on the Triton op set, with the stochastic vote rule.

        The sign rule derives the size of a vote from the loss, on the host, so that no two of its passes need be the same.
        """
        self._model = model
        self.recording = record and model.config.vote_rule == "stochastic"
        self._launched = 0
        self._recorded: _RecordedPass | None = None

    def take(self, ids_BT: Tensor, *, rate: float, step: int) -> float | None:
        """Run one pass, in which every weight behind the loss votes.

        Args:
            ids_BT: int64 [B, T], on the CPU or where the model is; of one shape in all passes.
            rate, step: as `ArbModel.backward` takes them.

        Returns:
            Nats per byte; or None where the loss is not finite, in which case not one byte of the model has changed.
        """
        if self.recording and rate > 0 and self._launched >= LAUNCHED_FIRST:
            if self._recorded is None:
                self._recorded = _RecordedPass(self._model, ids_BT)
            return self._recorded.replay(ids_BT, rate=rate, step=step)
        self._launched += 1
        losses = self._model.losses(ids_BT.to(self._model.voting.faults.device))
        accepted = self._model.backward(losses, rate=rate, step=step)
        return losses["bytes"].item() if accepted else None


class _RecordedPass:
    """Two CUDA graphs with memory of their own, what they read, and what a backward pass leaves for the step."""

    def __init__(self, model: ArbModel, ids_BT: Tensor) -> None:
        device = model.voting.faults.device
        self._voting = model.voting
        self._ids_BT = ids_BT.to(device, copy=True)
        self._rate = torch.zeros((), device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._left: list[Left] = []
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward):
            losses = model.losses(self._ids_BT)
            objective = model.objective(losses)
            seen = objective.detach().double(), losses["bytes"].detach().double()
            self._seen_2 = torch.stack(seen)
        with (
            torch.cuda.graph(self._backward, pool=self._forward.pool()),
            self._voting.open(rate=self._rate, step=self._step, held=self._left),
        ):
            objective.backward()

    def replay(self, ids_BT: Tensor, *, rate: float, step: int) -> float | None:
        """See `Passes.take`."""
        self._ids_BT.copy_(ids_BT)
        self._rate.fill_(rate)
        self._step.fill_(step)
        self._forward.replay()
        objective, nats = self._seen_2.tolist()
        if not math.isfinite(objective):
            return None
        with self._voting.open(rate=rate, step=step):
            self._backward.replay()
            for note, seen in self._left:  # copies: the next replay writes over what this one leaves
                note(*(None if tensor is None else tensor.clone() for tensor in seen))
        return float(nats)
