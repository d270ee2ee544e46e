"""The pass of a micro-batch (forward, backward, votes) and the step after it. On a GPU they are recorded and then replayed.

A pass has two CUDA graphs. The host reads the loss of the forward graph while the backward graph runs. A loss that is not finite
must change nothing, so the backward graph then votes at rate 0 and puts the count of faults back.

The step of the weights has a third graph, because its some hundred launches from Python would take as long as a backward pass. The
graph serves a step of one pass. A step of several passes, whose rows are united first, is launched, and so are the votes of the
sums of their gradients. Tables are always counted by launched kernels.

These sums lie in memory that no graph owns, because the next replay writes over all that a graph owns. A replay adds to them.

Each weight is unpacked once in a pass, for all products of its forward and its backward pass (`optimized.ops.unpacked`). So the
forward graph unpacks, and the backward graph reads what it has unpacked.

What several ranks exchange in a pass is in its graphs. A step of theirs has a graph for each part of the weights whose changes are
sent together. How much has changed is known to the device alone, so the changes are sent by launches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arbitor.optimized.distributed.run import recorded_exchanges
from arbitor.optimized.distributed.traffic import Recorded
from arbitor.optimized.layouts import DeviceWeight
from arbitor.optimized.training.recording import LAUNCHED_FIRST, Readout, in_branches, recorded
from arbitor.reference import checks
from arbitor.reference.graph.open_pass import Sums

if TYPE_CHECKING:
    from arbitor.optimized.ops.unpacked import Copies
    from arbitor.reference.graph import ArbModel
    from arbitor.reference.graph.open_pass import Key, Note, Sum
    from arbitor.reference.graph.stateful import Stateful


class Unpacking:
    """Makes the contexts of a model's passes, in each of which a weight is unpacked once."""

    def __init__(self, model: Stateful) -> None:
        """Begin before the first pass."""
        self._model = model
        self._copies: Copies | None = None

    def __call__(self) -> AbstractContextManager[None]:
        """Return the context of one pass."""
        weights = {name: module.weight for name, module in self._model.ternary_modules().items()}
        in_words = {name: weight for name, weight in weights.items() if isinstance(weight, DeviceWeight)}
        # A model on the reference needs no Triton.
        if not in_words:
            return nullcontext()
        if self._copies is None:
            from arbitor.optimized.ops.unpacked import Copies

            self._copies = Copies()
        return self._copies.in_pass(in_words, self._model.dtype)


class Passes:
    """Takes the passes of a model, launched from Python, one kernel after the other.

    What votes change is not copied first: the trainer ends with a pass that raises, and its model is not used again.

    Attributes:
        model:     as it was given.
        accum:     as it was given.
        unpacking: makes the context of a pass.
    """

    def __init__(self, model: ArbModel, *, accum: int = 1) -> None:
        """Begin with a model, and the number of passes of a step whose gradients are summed (`ArbModel.backward`)."""
        self.model, self.accum = model, accum
        self.unpacking = Unpacking(model)

    def take(self, ids_BT: Tensor, *, rate: float, step: int) -> float | None:
        """Run one pass, in which every weight behind the loss votes.

        Args:
            ids_BT: int64 [B, T], on the CPU or where the model is.
            rate, step: as `ArbModel.backward` takes them.

        Returns:
            Nats per byte; or None where the loss is not finite, in which case not one byte of the model has changed.
        """
        with self.unpacking():
            losses = self.model.losses(ids_BT.to(self.model.voting.faults.device))
            accepted = self.model.backward(losses, rate=rate, step=step, accum=self.accum, undo=False)
        if not accepted:
            return None
        return float(self.model.voting.ranks.mean(losses["bytes"].detach()))

    def step(self) -> None:
        """Take the step of the model that follows the passes since the last step, as `ArbModel.step` does."""
        self.model.step()

    def close(self) -> None:
        """Let go of what the passes hold of a device and of the group of ranks. Passes may be taken again after it."""


class RecordedPasses(Passes):
    """Takes the passes of a model on CUDA from two graphs, once `LAUNCHED_FIRST` of them were accepted, and their steps from one.

    The first ones are launched, on the same buffers and with the same kernels as are then recorded. The graphs read and write
    the memory of the model as it is then, so it must not be moved. All passes have ids of one shape. Where other weights are frozen
    than when the passes were recorded, they are recorded anew.
    """

    def __init__(self, model: ArbModel, *, accum: int = 1) -> None:
        """See `Passes`."""
        super().__init__(model, accum=accum)
        device = model.voting.faults.device
        self._ids_BT: Tensor | None = None
        self._rate = torch.zeros((), device=device)
        # The rate at which the pass votes: 0 if its loss is not finite.
        self._rate_taken = torch.zeros((), device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._objective: Tensor | None = None
        self._seen_2 = Readout(torch.zeros(2, dtype=torch.float64, device=device))
        # The notes of a pass, with the rows where replays write them.
        self._notes: list[Note] = []
        # The memory to which passes add their gradients, by weight and part.
        self._totals: dict[Key, Sum] = {}
        # What of it a pass adds to. None until one was launched, which makes the memory.
        self._added: dict[Key, Sum] | None = None
        self._accepted = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._exchanges = Recorded()
        self._weights = tuple(model.ternary_modules().values())
        # Which of them were, when the passes were recorded.
        self._frozen: list[bool] = []
        # The notes that the last pass left, while the rows that a replay wrote for them are still there.
        self._left: list[Note] = []
        # Then its kernels are compiled, for the number of rows of one pass.
        self._lone_step_launched = False
        # By the tensor ids of the weights that one graph steps.
        self._step_graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def take(self, ids_BT: Tensor, *, rate: float, step: int) -> float | None:
        """See `Passes.take`; raises ValueError for ids of another shape than before."""
        checks.vote_rate(rate)
        checks.vote_clock(self.model.voting.seed, step, 0)
        if rate == 0:  # nothing votes: it is no pass like the others
            return super().take(ids_BT, rate=rate, step=step)
        voting = self.model.voting
        voting.check_ready()
        voting.check_fits(self.accum)
        self._fill(ids_BT, rate, step)
        frozen = self._frozen_now()
        if frozen != self._frozen:
            self.close()
            self._frozen, self._accepted = frozen, 0
        held = self._fill_totals()
        has_memory = self.accum == 1 or self._added is not None
        if self._accepted >= LAUNCHED_FIRST and not self._graphs and has_memory:
            self._graphs = self._record()
        # Whatever becomes of this pass, it writes over the rows of the one before.
        self._left = []
        objective, nats = self._replay(*self._graphs) if self._graphs else self._launch()
        if not math.isfinite(objective):
            self._objective, voting.torn = None, False
            return None
        self._accepted += 1
        # Copies, as the next replay writes over what this one left; and the step as a number, as the step rule is launched.
        self._left = [note.on(torch.clone) for note in self._notes]
        voting.leave(self._left, step=step)
        voting.hold({**held, **(self._added or {})}, accum=self.accum, rate=rate)
        voting.torn = False
        return nats

    def step(self) -> None:
        """See `Passes.step`. The step of a single pass that was replayed is replayed too, once such a step was launched."""
        voting, left, self._left = self.model.voting, self._left, []
        # Notes of other passes may have come, and these notes may have been delivered or forgotten.
        lone = bool(left) and len(voting.notes) == len(left) and all(map(is_, voting.notes, left))
        # A weight that was frozen since the pass has no part in the step.
        lone = lone and self._frozen_now() == self._frozen and not voting.totals
        if not (self._graphs and lone and self._lone_step_launched):
            super().step()
            self._lone_step_launched |= lone
            return
        with self.model.stepping():
            if not self._step_graphs:
                # The recorded step reads rows where replays write them, and no copies of them.
                voting.notes = list(self._notes)
            self.model.step_weights(self._replay_step)
            self.model.step_tables()

    def close(self) -> None:
        """See `Passes.close`. A group of ranks cannot be taken apart while there are graphs that exchange in it."""
        for graph in (*self._graphs, *self._step_graphs.values()):
            graph.reset()
        self._exchanges.close()
        self._graphs, self._left = [], []
        self._totals, self._added = {}, None
        self._step_graphs.clear()

    def _frozen_now(self) -> list[bool]:
        """Return which weights are frozen."""
        return [module.frozen for module in self._weights]

    def _fill(self, ids_BT: Tensor, rate: float, step: int) -> None:
        """Write what a pass reads into its buffers."""
        if self._ids_BT is None:
            self._ids_BT = torch.empty_like(ids_BT, device=self._rate.device)
        if ids_BT.shape != self._ids_BT.shape:
            raise ValueError(
                f"ids_BT has shape {tuple(ids_BT.shape)}, but must have that of all passes, {tuple(self._ids_BT.shape)}"
            )
        # Other memory would make the host wait for the step before, which still runs.
        pinned_BT = ids_BT.pin_memory() if ids_BT.is_cpu and self._ids_BT.is_cuda else ids_BT
        self._ids_BT.copy_(pinned_BT, non_blocking=True)
        self._rate.fill_(rate)
        self._step.fill_(step)

    def _fill_totals(self) -> Mapping[Key, Sum]:
        """Write the sums of the step so far into the memory to which passes add, and zeros where there is none. Return these sums.

        After each pass that was accepted the two are the same. A step, a load and other passes part them.
        """
        held = self.model.voting.totals
        for key, (_, total) in self._totals.items():
            if key not in held:
                total.grad_NK.zero_()
            elif held[key][1].grad_NK is not total.grad_NK:
                total.grad_NK.copy_(held[key][1].grad_NK)
        for key, (voter, total) in held.items():
            if key not in self._totals:
                self._totals[key] = voter, total.on(torch.clone)
        return held

    def _launch(self) -> list[float]:
        """Run the pass of the buffers, kernel by kernel, and return its objective and its nats per byte."""
        with self.unpacking():
            self._forward()
            self._seen_2.begin()
            seen = self._seen_2.numbers()
            if math.isfinite(seen[0]):
                self._backward()
            return seen

    def _replay(self, forward: torch.cuda.CUDAGraph, backward: torch.cuda.CUDAGraph) -> list[float]:
        """Do as `_launch` by the graphs. The backward graph is on its way before the host has seen the loss."""
        forward.replay()
        self._seen_2.begin()
        # The votes are on their way. Until their notes are left, whoever interrupts this leaves the model torn.
        self.model.voting.torn = True
        backward.replay()
        self._exchanges.replay()
        return self._seen_2.numbers()

    def _replay_step(self, tensor_ids: Sequence[int]) -> None:
        """Step the weights of some tensor ids by their graph, which the first such step records."""
        key = tuple(tensor_ids)
        if key not in self._step_graphs:
            self._step_graphs[key] = self._record_step(tensor_ids)
        self._step_graphs[key].replay()

    def _forward(self) -> None:
        assert self._ids_BT is not None
        losses, ranks = self.model.losses(self._ids_BT), self.model.voting.ranks
        self._objective = ranks.part(self.model.objective(losses))
        # What `ArbModel.backward` and `Passes.take` ask of the ranks one after the other.
        objective, nats = ranks.total(torch.stack([self._objective.detach(), losses["bytes"].detach()]))
        self._seen_2.tensor.copy_(torch.stack([objective, nats / ranks.count]))
        self._rate_taken.copy_(torch.where(objective.isfinite(), self._rate, 0.0))

    def _backward(self) -> None:
        assert self._objective is not None
        voting = self.model.voting
        left_before, step_before, faults_before = len(voting.notes), voting.step, voting.faults.clone()
        held = voting.sums
        # In a recording this is the memory that replays add to.
        voting.sums = Sums(dict(self._totals), self.accum, 0, 0.0) if self._totals else None
        try:
            with voting.taking(rate=self._rate_taken, step=self._step, accum=self.accum, undo=False):
                self._objective.backward()
            before, self._totals = self._totals, voting.totals
            self._added = {key: each for key, each in self._totals.items() if each is not before.get(key)}
        finally:
            voting.sums = held
        self._objective = None
        # A refused pass counts no faults. All else that a pass changes are counts of votes, and at rate 0 there are none.
        voting.faults.copy_(torch.where(self._seen_2.tensor[0].isfinite(), voting.faults, faults_before))
        # A replay runs no Python: `take` leaves these notes after each of them, and after passes that were launched.
        self._notes, voting.notes = voting.notes[left_before:], voting.notes[:left_before]
        voting.step = step_before

    def _record(self) -> list[torch.cuda.CUDAGraph]:
        """Record both passes; the second reads what the first leaves."""
        with (
            in_branches(self.model.voting),
            self.unpacking(),
            recorded_exchanges(self.model) as self._exchanges,
        ):
            return recorded(self._forward, self._backward)

    def _record_step(self, tensor_ids: Sequence[int]) -> torch.cuda.CUDAGraph:
        """Record the step of the weights of some tensor ids."""
        with in_branches(self.model.voting):
            [graph] = recorded(partial(self.model.step_some, tensor_ids))
        return graph
