"""The checkpoints of a run folder: which one is the newest, and how it is replaced without ever being without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arbitor.optimized.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    State,
    load_checkpoint,
    partial_of,
    rename,
    write_beside,
)

LATEST, PREVIOUS, BEST, FINAL = (f"{name}.safetensors" for name in ("latest", "previous", "best", "final"))
"""Files of a run folder: the newest state, the one before it, the best by validation, the end of the run."""


class CheckpointFolder:
    """The checkpoints of one run: ``latest`` and, so that one is always loadable, the ``previous`` one."""

    def __init__(self, folder: Path) -> None:
        """Open a run folder and remove what a killed run left half written."""
        self.folder = folder
        self._latest_is_good = False
        for name in (LATEST, PREVIOUS, BEST, FINAL):
            partial_of(folder / name).unlink(missing_ok=True)

    def save_latest(self, state: State, **metadata: Any) -> str:
        """Write ``latest``; what it held becomes ``previous``, unless it was found damaged.

        Between the two renames there is no ``latest``, and ``previous`` is what it was: a run killed there
        resumes from it.

        Args:
            state: as of ``ArbModel.state``.
            metadata: as for ``save_checkpoint``.

        Returns:
            The ``state_sha256`` of what was written.

        Raises:
            TrainingError: the disk is full or cannot be written; ``latest`` and ``previous`` are as before.
        """
        latest = self.folder / LATEST
        temporary, digest = write_beside(latest, state, **metadata)
        if self._latest_is_good:
            rename(latest, self.folder / PREVIOUS)
        rename(temporary, latest)
        self._latest_is_good = True
        return digest

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Read ``latest``, or ``previous`` where ``latest`` is refused.

        Returns:
            The checkpoint, or None where the folder has neither file; and one sentence for each file that was
            refused.

        Raises:
            CheckpointError: there are files, and none of them verifies.
        """
        refusals: list[str] = []
        for name in (LATEST, PREVIOUS):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                refusals.append(str(error))
                continue
            self._latest_is_good = name == LATEST
            return checkpoint, refusals
        if refusals:
            raise CheckpointError("; ".join(refusals) + "; no checkpoint is left to resume from")
        return None, refusals
