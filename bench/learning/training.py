"""A run of a learner from its first step to its last, in one piece or in several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.data import Corpus, Split, training_batch
from arbitor.optimized.training.schedule import rate
from bench.learning.learner import EAGER_STEPS, Architecture, Learner
from bench.learning.pieces import History, load, save
from bench.learning.rules import Rule


def train(
    architecture: Architecture,
    rule: Rule,
    corpus: Corpus,
    split: Split,
    windows_WT: Tensor,
    *,
    seed: int,
    steps: int,
    device: str,
    evaluations: int = 10,
    progress: Callable[[int], None] = lambda step: None,
    piece: Path | None = None,
    job: Mapping[str, Any] | None = None,
    commit: str = "",
    until: float = math.inf,
) -> dict[str, Any]:
    """Train one model and return what came of it: the curve, the bytes of its state, and how long its steps take.

    `seconds` is for all steps, without validation, and as if the first few of each piece, which compile kernels, and the one before
    each validation, whose flips are counted, were as fast as the rest (unless there are no others). The sign rule waits for its
    loss in each step, and records one for each size of its votes on the way.

    Args:
        architecture, rule, corpus, split, windows_WT, seed, steps: what is trained, on what, and what judges it.
        device: `cpu` or `cuda`.
        evaluations: points of the curve after the first.
        progress: is told the number of steps at each of them.
        piece: file that the run goes on from, if it is there, and is written to when the run ends or its time does.
        job: what the run is, for the file.
        commit: what takes the steps of this piece.
        until: `time.monotonic()` after which no step but the first of a piece is taken. The result then says that the run is
            `unfinished`.

    Raises:
        ValueError: the file is damaged or of another run.
    """
    with values_vouched_for(), side_stream(device):
        learner = Learner(architecture, rule, seed=seed, device=device)
        history = None if piece is None else load(piece, learner, job or {})
        if history is None:
            history = History()
            _evaluate(learner, windows_WT, history)
        if commit not in history.commits:
            history.commits.append(commit)
        every, began_at = max(1, math.ceil(steps / evaluations)), learner.taken
        clock = Clock(history, warm=began_at + EAGER_STEPS + 1, device=device)
        # A piece takes a step at least, or runs that start slowly would never end.
        goes_on = lambda: learner.taken == began_at or time.monotonic() < until  # noqa: E731
        while learner.taken < steps and goes_on():
            stop = min(steps, (learner.taken // every + 1) * every)
            before: dict[str, dict[str, Tensor]] = {}
            clock.start(learner.taken)
            while learner.taken < stop and goes_on():
                is_last = learner.taken == stop - 1
                if is_last or learner.taken == clock.warm:
                    clock.start(learner.taken)
                if is_last:
                    before = learner.trits()
                ids_BT = training_batch(
                    corpus, split, batch=architecture.batch, context=architecture.context, seed=seed, micro_step=learner.taken,
                )  # fmt: skip
                learner.step(ids_BT, rate(learner.taken, steps, theta=1, gain=1.0, decay=rule.decay))
            clock.stop(learner.taken, slow=learner.taken == stop)
            if learner.taken == stop:
                if before:
                    history.flips.append((stop, learner.flip_rates(before)))
                _evaluate(learner, windows_WT, history)
                progress(learner.taken)
        history.taken, history.loss = learner.taken, learner.last_loss
        if piece is not None:
            save(piece, learner, history, job or {})
    done = {
        "weights": learner.num_weights,
        "state_bytes": learner.state_bytes,
        "steps": steps,
        "tokens": steps * architecture.batch * architecture.context,
        "seconds": round(clock.seconds_a_step() * steps, 2),
        "val_bpb": history.curve[-1][1],
        "curve": history.curve,
        "commit": ", then ".join(history.commits),
        **({"use": history.use} if history.use else {}),
        **({"flips": history.flips} if history.flips else {}),
    }
    return {**done, "unfinished": history.taken} if history.taken < steps else done


class Clock:
    """Times the steps of a piece, those that show what a step takes apart from the others.

    Attributes:
        warm: steps of the run after which kernels are compiled and the step is recorded.
    """

    def __init__(self, history: History, *, warm: int, device: str) -> None:
        """Add to what a history has."""
        self.warm = warm
        self._history, self._device = history, device
        self._began: tuple[float, int] | None = None

    def start(self, taken: int) -> None:
        """Begin with the step after `taken`. What was timed until then counts, unless it warmed up."""
        synchronize(self._device)
        if self._began is not None:
            self.stop(taken)
        self._began = time.perf_counter(), taken

    def stop(self, taken: int, *, slow: bool = False) -> None:
        """End with the step `taken`.

        Args:
            taken: steps of the run.
            slow: whether the steps since the start did more than others.
        """
        if self._began is None:
            return
        synchronize(self._device)
        began, first = self._began
        self._began = None
        seconds, steps = time.perf_counter() - began, taken - first
        if slow or first < self.warm:
            self._history.slow_seconds += seconds
            self._history.slow += steps
        else:
            self._history.seconds += seconds
            self._history.timed += steps

    def seconds_a_step(self) -> float:
        """Return what a step takes."""
        history = self._history
        if history.timed:
            return history.seconds / history.timed
        return history.slow_seconds / max(1, history.slow)


def _evaluate(learner: Learner, windows_WT: Tensor, history: History) -> None:
    """Add a point to the curve of a run."""
    use = learner.use(windows_WT)
    bpb = learner.bits_per_byte(windows_WT) if use is None else use.pop("val_bpb")
    history.curve.append((learner.taken, bpb))
    if use is not None:
        history.use.append(use)


def judge(
    architecture: Architecture,
    rule: Rule,
    windows_WT: Tensor,
    *,
    seed: int,
    device: str,
    piece: Path,
    job: Mapping[str, Any],
) -> float:
    """Return the bits per byte of some windows by the model of a run that has ended.

    Raises:
        ValueError: the file of the run is missing, damaged or of another run.
    """
    with values_vouched_for(), side_stream(device):
        learner = Learner(architecture, rule, seed=seed, device=device)
        history = load(piece, learner, job)
        if history is None:
            raise ValueError(f"{piece} is not there, but a run is judged by the weights that it ended with")
        return learner.bits_per_byte(windows_WT)


def synchronize(device: str) -> None:
    """Wait for the device, if there is something to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def side_stream(device: str) -> AbstractContextManager[Any]:
    """Return a context in which work goes to a stream that a graph can be recorded on."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
