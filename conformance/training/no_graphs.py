"""Recorded passes without CUDA graphs, where a replay launches what was recorded, on memory that it writes over; losses of NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training.passes import RecordedPasses
from arbitor.reference.graph import ArbModel, TernaryEmbedding, TernaryModule, voting
from arbitor.reference.graph.open_pass import Note

POISON = -7
"""What a replay leaves in memory that it uses otherwise."""


class Launches:
    """Stands in for a CUDA graph where there is none: a replay launches what was recorded, until the graph is reset."""

    def __init__(self, run: Any) -> None:
        self.replay = run

    def reset(self) -> None:
        del self.replay


def without_graphs(monkeypatch: pytest.MonkeyPatch, replayed: list[str]) -> None:
    """Let recorded passes and steps run on the CPU, on memory that every replay writes over, as the memory of CUDA graphs."""

    voting_pass = voting.Pass

    def record(passes: RecordedPasses) -> list[Any]:
        in_graphs = [note.on(torch.clone) for note in passes._notes]
        # Graphs add to the memory that was there when they were recorded.
        totals = dict(passes._totals)
        unpacking = ExitStack()

        def forward() -> None:
            replayed.append("forward")
            # A replay unpacks anew what was unpacked while the pass was recorded.
            unpacking.enter_context(passes.unpacking())
            for note in in_graphs:
                note.on(lambda tensor: tensor.fill_(POISON))
            passes._forward()

        def backward() -> None:
            replayed.append("backward")
            strayed, torn = passes.model.voting.strayed, passes.model.voting.torn
            passes.model.voting.torn = False
            python, passes._totals = (passes._totals, passes._added), dict(totals)
            with unpacking, monkeypatch.context() as patch:
                # A recording does not read its rate, which counts as above 0.
                patch.setattr(voting, "Pass", lambda **given: voting_pass(**{**given, "moves": True}))
                passes._backward()
            # A replay runs no Python.
            passes.model.voting.strayed, passes.model.voting.torn = strayed, torn
            assert passes._totals.keys() == totals.keys(), "a recording would have been refused"
            assert all(passes._totals[key][1].grad_NK is total.grad_NK for key, (_, total) in totals.items())
            passes._totals, passes._added = python
            for note, new in zip(in_graphs, passes._notes, strict=True):
                for old_tensor, tensor in zip(note.seen, new.seen, strict=True):
                    if old_tensor is not None and tensor is not None:
                        old_tensor.copy_(tensor)
            passes._notes = in_graphs

        return [Launches(forward), Launches(backward)]

    def record_step(passes: RecordedPasses, tensor_ids: Sequence[int]) -> Any:
        in_graphs, its_ids = list(passes._notes), tuple(tensor_ids)

        def step() -> None:
            replayed.append("step")
            step_without_a_trace(passes.model, in_graphs, its_ids)

        return Launches(step)

    monkeypatch.setattr(RecordedPasses, "_record", record)
    monkeypatch.setattr(RecordedPasses, "_record_step", record_step)


def step_without_a_trace(model: ArbModel, notes: list[Note], tensor_ids: Sequence[int]) -> None:
    """Step some weights as notes say and leave no sign of it in the modules, as a replay runs no Python."""
    modules, version = model.ternary_modules().values(), model.voting.version
    kept = [
        (module, module.voted, module.steps, list(getattr(module, "used_rows", ()))) for module in modules
    ]
    for module in modules:
        module.forget_votes()
    for note in notes:
        if note.tell.__name__ == TernaryModule.note_vote.__name__:
            note.tell(*note.seen)
    model.step_some(tensor_ids)
    for module, voted, steps, rows in kept:
        module.voted, module.steps = voted, steps
        if isinstance(module, TernaryEmbedding):
            module.used_rows[:] = rows
    model.voting.version = version


FIRST_BYTES = {"accepted": 100, "refused": 200, "not a number": 201}
"""First byte of the first window, by what becomes of a pass. Two kinds have a loss of NaN: one with gradients that are numbers."""


def some_losses_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss be NaN by the first byte, inside of a graph as outside."""
    real = ArbModel.losses

    def losses(model: ArbModel, ids_BT: Tensor) -> dict[str, Tensor]:
        found, first = real(model, ids_BT), ids_BT[0, 0]
        nats = torch.where(first == FIRST_BYTES["refused"], math.nan, found["bytes"])
        return {**found, "bytes": nats * torch.where(first == FIRST_BYTES["not a number"], math.nan, 1.0)}

    monkeypatch.setattr(ArbModel, "losses", losses)
