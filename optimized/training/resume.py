"""What a run folder holds that a run can go on from, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbitor.optimized.training.checkpoint import Checkpoint
from arbitor.optimized.training.checkpoint_folder import CheckpointFolder
from arbitor.optimized.training.data import Corpus
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.plan import Settings
from arbitor.optimized.training.run_folder import CONFIG, read_json


@dataclass
class Found:
    """What a run folder holds.

    Attributes:
        store: its checkpoints, or None before the folder is there.
        checkpoint: the one to go on from, or None to start at step 0.
        settings: of the run it belongs to, or None for a new run.
        warnings: a sentence for each checkpoint that was refused.
        note: what happens now.
    """

    store: CheckpointFolder | None = None
    checkpoint: Checkpoint | None = None
    settings: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    note: str = ""


def look_into(folder: Path) -> Found:
    """Find what to resume. A run killed before its first checkpoint, or before its first file, starts at step 0.

    Raises:
        TrainingError: there are checkpoints, and none of them can be trusted.
    """
    store = CheckpointFolder(folder)
    checkpoint, refusals = store.load_newest()
    if checkpoint is not None:
        warnings = tuple(f"{refusal}; going on from the one before it" for refusal in refusals)
        note = f"resuming {str(folder)!r} at step {checkpoint.step}"
        return Found(store, checkpoint, checkpoint.run, warnings, note)
    config = folder / CONFIG
    settings = read_json(config).get("run") if config.exists() else None
    return Found(store, None, settings, note=f"{str(folder)!r} holds no checkpoint yet: starting at step 0")


def check_data(corpus: Corpus, settings: Settings, recorded: Mapping[str, Any] | None) -> None:
    """Refuse to go on with other bytes than the run was started with.

    Args:
        corpus: the bytes now.
        settings: of the run now.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError: the digests differ.
    """
    if recorded is not None and recorded["data_sha256"] != corpus.sha256:
        raise TrainingError(
            f"the run was started with data {recorded['data']!r} of {recorded['data_bytes']} bytes with SHA-256 "
            f"{recorded['data_sha256'][:12]}... and cannot go on with data {settings.data!r} of "
            f"{corpus.data_N.numel()} bytes with SHA-256 {corpus.sha256[:12]}..."
        )
