"""Trainer settings that suit each preset, so that ``arb train --preset P`` needs no others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerDefaults:
    """What a run uses where the command line says nothing.

    Attributes:
        steps: optimisation steps.
        batch: windows of a micro-batch.
        context: bytes of a window.
        accum: micro-batches of a step.
        eval_interval: steps between validations.
        save_interval: steps between checkpoints.
        log_interval: steps between lines of metrics.
        eval_windows: validation windows, at most.
        sample_bytes: length of the text generated at the end.
    """

    steps: int = 1000
    batch: int = 16
    context: int = 256
    accum: int = 1
    eval_interval: int = 100
    save_interval: int = 100
    log_interval: int = 10
    eval_windows: int = 256
    sample_bytes: int = 256


_BY_PRESET = {
    "tiny": TrainerDefaults(steps=500, batch=32, context=128, eval_windows=256),
    "small": TrainerDefaults(steps=1000, batch=64, context=256, eval_windows=512),
}


def trainer_defaults(preset: str) -> TrainerDefaults:
    """The settings for a preset; large ones share a cautious set, as one step of theirs fills a GPU.

    Args:
        preset: name of a configuration; one that is no preset gets the cautious set too.
    """
    return _BY_PRESET.get(preset, TrainerDefaults(batch=4, context=128))
