"""One model, trained by one rule: on a GPU the whole step is a CUDA graph, so that the host's speed does not count.

Legend: B batch, T bytes of a window, W validation windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.data import Corpus, Split, training_batch
from arbitor.optimized.training.recording import in_branches
from arbitor.optimized.training.schedule import rate
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel, GraphContext
from arbitor.reference.graph.model import LOSS_REFERENCE
from arbitor.reference.graph.stateful import Stateful
from arbitor.reference.presets import preset
from bench.learning.rules import (
    FIXED_SCALES,
    FLOAT_BYTES,
    MUON_BYTES,
    FloatOps,
    Rule,
    StraightThroughOps,
    integer_bytes,
)
from bench.learning.transformer import ByteTransformer

BETAS = (0.9, 0.95)
"""Of AdamW."""

EAGER_STEPS = 3
"""Steps before the first that is recorded: libraries set themselves up, kernels are compiled."""


@dataclass(frozen=True)
class Architecture:
    """What is trained: a byte transformer of so many layers and so wide, or a preset of the graph."""

    name: str
    width: int = 384
    num_layers: int = 4
    context: int = 256
    batch: int = 64
    preset: str | None = None


class Learner:
    """A model and how it takes a step.

    Attributes:
        model:       on the op set of its rule.
        num_weights: trainable ones.
        state_bytes: what training keeps between steps.
    """

    def __init__(
        self, architecture: Architecture, rule: Rule, *, seed: int, device: str, capture: bool = True
    ) -> None:
        self.architecture, self.rule, self.device = architecture, rule, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.ops = self._op_set()
        self.config = self._config()
        self.model = self._model(seed)
        self.rate = torch.zeros((), device=device)
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)
        self.ids_BT = torch.zeros(architecture.batch, architecture.context, dtype=torch.int64, device=device)
        self.optimizers = self._optimizers()
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # torch's Muon takes its rate from the host in every step.
        self.capture = capture and device == "cuda" and not rule.muon
        self.taken, self.last_loss = 0, LOSS_REFERENCE
        trained = {name: m.weight for name, m in self.model.ternary_modules().items() if not m.frozen}
        self.num_weights = sum(math.prod(weight.shape) for weight in trained.values())
        self.state_bytes = integer_bytes(trained) if rule.kind == "integer" else self._float_bytes()

    def step(self, ids_BT: Tensor, share: float) -> Tensor:
        """Take one step at a share of the rule's rate, and return its loss, [] on the device."""
        self.ids_BT.copy_(ids_BT)
        height = self.rule.rate * (1.0 if self.optimizers else self.config.theta)
        self.rate.fill_(share * height)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.Muon):
                optimizer.param_groups[0]["lr"] = share * height
        self.step_number.fill_(self.taken)
        size = self._vote_size()
        if not self.capture or self.taken < EAGER_STEPS:
            loss = self._take(size)
        else:
            if size not in self.recorded:
                self.recorded[size] = self._record(size)
            graph, loss = self.recorded[size]
            graph.replay()
        # Only this rule asks for the loss.
        if self.config.vote_rule == "sign":
            self.last_loss = loss.item()
        self.taken += 1
        return loss

    def bits_per_byte(self, windows_WT: Tensor) -> float:
        """Return the mean over validation windows."""
        nats = 0.0
        with torch.no_grad():
            for windows_BT in windows_WT.split(self.architecture.batch):
                nats += self._loss(windows_BT.to(self.device)).item() * windows_BT.shape[0]
        return nats / windows_WT.shape[0] / math.log(2)

    def _take(self, size: int) -> Tensor:
        loss = self._loss(self.ids_BT)
        # What a recorded step votes is undone by nobody, and a run whose step raises is over.
        with self.model.voting.taking(rate=self.rate, step=self.step_number, size=size, undo=False):
            loss.backward()
        self.model.step()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.optimizers:
            self.ops.refresh()
        return loss.detach()

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        branches = in_branches(self.model.voting) if self.rule.kind == "integer" else nullcontext()
        with branches, torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            loss = self._take(size)
        return graph, loss

    def _vote_size(self) -> int:
        """Return the size of sign votes by the loss of the step before: that of this one is known after it was recorded."""
        if self.config.vote_rule != "sign":
            return 1
        from arbitor.reference.ops import step_from_loss

        return step_from_loss(self.last_loss, LOSS_REFERENCE, self.config.max_vote_step)

    def _loss(self, ids_BT: Tensor) -> Tensor:
        return self.model.loss(ids_BT)

    def _op_set(self) -> Any:
        if self.rule.kind == "float":
            return FloatOps(self.dtype)
        if self.rule.kind == "straight-through":
            return StraightThroughOps(self.dtype)
        if self.device == "cuda":
            from arbitor.optimized import ops as optimized_ops

            return optimized_ops
        from arbitor.reference import ops as reference_ops

        return reference_ops

    def _config(self) -> ArbConfig:
        changes = dict(self.rule.config)
        if self.rule.kind != "integer":
            changes |= {"vote_rule": "stochastic", "orthogonal_steps": 0, **FIXED_SCALES}
        return replace(preset(self.architecture.preset or "tiny"), **changes)

    def _model(self, seed: int) -> Stateful:
        parts: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "seed": seed}
        if self.architecture.preset is not None:
            return ArbModel(self.config, ops=self.ops, **parts)
        context = GraphContext(self.ops, self.config, **parts)
        shape = self.architecture
        return ByteTransformer(context, width=shape.width, num_layers=shape.num_layers, length=shape.context)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return AdamW for every weight; or Muon for those whose gradients integer rules make orthogonal, AdamW for the rest."""
        if self.rule.kind == "integer":
            return []
        muon, adamw = self._masters()
        on_gpu = self.device == "cuda"
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                adamw,
                lr=self.rate,
                betas=BETAS,
                weight_decay=0.0,
                fused=on_gpu,
                foreach=False,
                capturable=on_gpu,
            )
        ]
        if muon:
            found.append(torch.optim.Muon(muon, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        return found

    def _masters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the float32 weights that Muon moves, and those that AdamW moves."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for module in self.model.ternary_modules().values():
            if not module.frozen:
                is_muons = self.rule.muon and getattr(module, "orthogonal", False)
                found[0 if is_muons else 1].append(module.weight.master)  # type: ignore[attr-defined]
        return found

    def _float_bytes(self) -> float:
        muon, adamw = (sum(each.numel() for each in masters) for masters in self._masters())
        return float(MUON_BYTES * muon + FLOAT_BYTES * adamw)


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
) -> dict[str, Any]:
    """Train one model and return what came of it: the curve, the bytes of its state, and how long its steps take.

    `seconds` is for all steps, without validation, and as if the first few, which compile kernels, were as fast as the rest
    (unless there are hardly more). The sign rule waits for its loss in each step, and records one for each size of its votes on
    the way.
    """
    with values_vouched_for(), _side_stream(device):
        learner = Learner(architecture, rule, seed=seed, device=device)
        every = max(1, math.ceil(steps / evaluations))
        curve, seconds, timed = [(0, learner.bits_per_byte(windows_WT))], 0.0, 0
        while learner.taken < steps:
            began, first, until = time.perf_counter(), learner.taken, min(learner.taken + every, steps)
            while learner.taken < until:
                # By now kernels are compiled and the step is recorded.
                if learner.taken == EAGER_STEPS + 1 < until:
                    synchronize(device)
                    began, first = time.perf_counter(), learner.taken
                ids_BT = training_batch(
                    corpus, split, batch=architecture.batch, context=architecture.context, seed=seed, micro_step=learner.taken,
                )  # fmt: skip
                learner.step(ids_BT, rate(learner.taken, steps, theta=1, gain=1.0, decay=rule.decay))
            synchronize(device)
            seconds, timed = seconds + time.perf_counter() - began, timed + until - first
            curve.append((learner.taken, learner.bits_per_byte(windows_WT)))
            progress(learner.taken)
    return {
        "weights": learner.num_weights,
        "state_bytes": learner.state_bytes,
        "steps": steps,
        "tokens": steps * architecture.batch * architecture.context,
        "seconds": round(seconds / timed * steps, 2),
        "val_bpb": curve[-1][1],
        "curve": curve,
    }


def synchronize(device: str) -> None:
    """Wait for the device, if there is something to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def _side_stream(device: str) -> AbstractContextManager[Any]:
    """Return a context in which work goes to a stream that a graph can be recorded on."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
