"""The learning of a run of `arb finetune`: adapters over a frozen base, moved by torch's AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.optimized.distributed.run import add_up
from arbitor.optimized.training.adapter_files import write_adapter
from arbitor.optimized.training.adapter_state import AdapterState, named_parameters
from arbitor.optimized.training.checkpoint import Checkpoint, adapter_sha256
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.schedule import learning_rate
from arbitor.reference.graph.adapters import attach, stacks_of

if TYPE_CHECKING:
    from arbitor.optimized.training.options import Settings
    from arbitor.optimized.training.run_folder import RunFolder
    from arbitor.reference.graph import ArbModel


class Adaptation:
    """The adapters of a run, and the optimizer that moves them.

    Attributes:
        model: with the adapters; everything else of it is frozen.
        adapters: by the names of their linears.
        optimizer: of their matrices.
    """

    def __init__(self, model: ArbModel, settings: Settings, checkpoint: Checkpoint | None) -> None:
        """Give a model adapters: new ones, or those of a checkpoint with what AdamW keeps for them.

        Args:
            model: loaded.
            settings: of the run.
            checkpoint: to go on from, or None.

        Raises:
            TrainingError: the checkpoint has no adapters.
            ValueError: a target names no linear that can have one.
        """
        if checkpoint is not None and checkpoint.adapter is None:
            raise TrainingError("the checkpoint has no adapters, but its run has: it cannot go on from it")
        # These are settings of every run that is opened here.
        assert settings.lora_rank and settings.lora_alpha and settings.lora_targets
        assert settings.learning_rate is not None and settings.weight_decay is not None
        self.model, self._steps, self._flat = model, settings.steps, settings.learning_rate
        if checkpoint is None or checkpoint.adapter is None:
            try:
                self.adapters = attach(
                    model, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=settings.lora_targets
                )
            except ValueError as error:
                # The setting has another name than the argument.
                raise ValueError(str(error).replace("targets ", "lora_targets ", 1)) from error
        else:
            self.adapters = checkpoint.adapter.attach_to(model)
        self._parameters = named_parameters(self.adapters)
        self.optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=self._flat, weight_decay=settings.weight_decay
        )
        if checkpoint is not None and checkpoint.adapter is not None:
            checkpoint.adapter.load_moments(self.optimizer, self.adapters)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(step, self._steps, flat=self._flat)

    def step(self, step: int, *, losses: int) -> dict[str, float]:
        """Move the adapters by the mean gradient of some micro-batches, and drop the gradients.

        The gradients are summed over ranks first, so that every rank takes the same step. The losses of all ranks reach the same
        matrices. A gradient that is not finite moves nothing: its rows are counted with those of `Voting.faults`. A matrix that no
        loss has reached stays as it is.

        Args:
            step: steps taken before.
            losses: micro-batches whose losses were finite on all ranks.

        Returns:
            ``grad_norm``: norm of the mean gradient of all adapters.
        """
        grads = [each.grad for each in self._parameters.values() if each.grad is not None]
        norm = 0.0
        if grads and losses:
            add_up(self.model, grads)
            for grad in grads:
                grad.div_(losses)
            norm = float(torch.stack([grad.norm() for grad in grads]).norm())
            # Where the norm is finite, so is every gradient, and the host has waited for the device once.
            faulty = 0 if math.isfinite(norm) else _faulty_rows(grads)
            # Every rank has found them, and the faults of all ranks are added up.
            self.model.voting.faults += faulty if self.model.voting.ranks.number == 0 else 0
            if not faulty:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(step)
                self.optimizer.step()
                # What a ledger holds was computed with the adapters before.
                self.model.voting.version += 1
        self.optimizer.zero_grad()
        return {"grad_norm": norm}

    @torch.no_grad()
    def change(self) -> float:
        """Return the norm of all changes together, (alpha / R) B A of every adapter."""
        squares: list[Tensor] = []
        for each in self.adapters.values():
            # The norm of a product, from the small products of its factors.
            gram = (each.a_RK @ each.a_RK.T) * (each.b_NR.T @ each.b_NR)
            squares.append(each.factor**2 * gram.sum())
        return math.sqrt(max(float(torch.stack(squares).sum()), 0.0))

    def metrics(self, taken: dict[str, float]) -> dict[str, Any]:
        """Return the metrics of a step, None where a number is not finite."""
        values = {**taken, "adapter_norm": self.change()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def state(self) -> AdapterState:
        """Return the floats of a checkpoint."""
        state = AdapterState.of(self.model, self.optimizer)
        assert state is not None
        return state

    def sha256(self) -> str:
        """Return the digest of the floats of a checkpoint."""
        return adapter_sha256(self.state())

    def description(self) -> str:
        """Return what learns, in a sentence."""
        numbers = sum(each.numel() for each in self._parameters.values())
        ranks = sorted({each.rank for each in self.adapters.values()})
        return (
            f"adapters: {len(self.adapters):,} of rank {', '.join(map(str, ranks))}, {numbers:,} floats that AdamW moves; "
            "the base is frozen"
        )


def _faulty_rows(grads: list[Tensor]) -> int:
    """Return how many rows of gradients have an element that is not finite."""
    return int(torch.stack([(~grad.isfinite()).any(dim=1).sum() for grad in grads]).sum())


def open_adaptation(model: ArbModel, settings: Settings, checkpoint: Checkpoint | None) -> Adaptation | None:
    """Return the adaptation of a run, or None for a run that trains ternary weights.

    Args:
        model, settings, checkpoint: as for `Adaptation`.

    Raises:
        TrainingError, ValueError: as `Adaptation`.
    """
    if settings.lora_rank is None:
        return None
    return Adaptation(model, settings, checkpoint)


def write_best(folder: RunFolder, adaptation: Adaptation, base: str, warn: Callable[[str], None]) -> None:
    """Write the adapters of the best model of a run, or of its last where none is kept, in peft's format.

    Args:
        folder: of the run.
        adaptation: of the run.
        base: what the run began with.
        warn: is told one sentence for each checkpoint that is refused.

    Raises:
        TrainingError: the disk is full or cannot be written.
    """
    best = folder.load_best(warn).adapter
    assert best is not None
    write_adapter(folder.adapter, best, base=base, stacks=stacks_of(adaptation.model))
