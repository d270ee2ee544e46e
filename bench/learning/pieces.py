"""A long run in pieces: the state of a learner and what is known of its run, in one safetensors file that is replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from arbitor.optimized.training.tensor_file import (
    DamagedFileError,
    read_entries,
    read_tensor,
    write_safetensors,
)
from arbitor.optimized.training.whole_file import write_whole
from bench.learning.learner import Learner

KEY = "run"
"""Entry of the header that the history is under."""


@dataclass
class History:
    """What is known of a run so far.

    Fields:
        taken:   steps.
        loss:    loss of the last step where the rule asks for it, in nats.
        curve:   (step, bits per byte of the validation windows).
        use:     for each point of the curve how codes and experts are used, if the model has some.
        flips:   (step, share of trits that it changed by kind of weight), for a step before each later point of the curve.
        seconds: of the steps that are like most.
        timed:   how many these are.
        slow_seconds: of the others: they compile, record or count.
        slow:    how many these are.
        commits: commits that took steps, in their order.
    """

    taken: int = 0
    loss: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    use: list[dict[str, Any]] = field(default_factory=list)
    flips: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    timed: int = 0
    slow_seconds: float = 0.0
    slow: int = 0
    commits: list[str] = field(default_factory=list)


def save(path: Path, learner: Learner, history: History, job: Mapping[str, Any]) -> None:
    """Write the state of a learner, in place of an earlier piece of the same run.

    Args:
        path: of the file.
        learner: between two steps.
        history: of its run.
        job: what the run is, JSON data. Only the same job goes on from the file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.tensors().items()}
    text = json.dumps({"job": job, "history": asdict(history)})
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file: IO[bytes]) -> None:
        write_safetensors(file, tensors, {KEY: text})

    write_whole(path, write)


def load(path: Path, learner: Learner, job: Mapping[str, Any]) -> History | None:
    """Give a learner that took no step the state of a file, and return the history of its run; None without a file.

    Raises:
        ValueError: the file is damaged, is of another job, or holds other tensors than the learner has.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:
            text, entries = read_entries(file, KEY)
            held = json.loads(text)
            history = History(**held["history"])
        except (DamagedFileError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no piece of a run: {error}") from None
        if held["job"] != json.loads(json.dumps(job)):
            raise ValueError(f"{path} is a piece of another run: {held['job']}, where {job} was asked for")
        own = learner.tensors()
        wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}
        if wanted != entries:
            raise ValueError(f"{path} holds other tensors than this run has")
        loaded: dict[str, Tensor] = {
            name: read_tensor(file, dtype, shape) for name, (dtype, shape) in entries.items()
        }
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])
    learner.loaded(history.taken, history.loss)
    history.curve = [(int(step), float(bpb)) for step, bpb in history.curve]
    history.flips = [(int(step), dict(rates)) for step, rates in history.flips]
    return history
