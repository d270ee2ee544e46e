"""The folder of a run: its files, who may write in it, what is saved there, and what a run can go on from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbitor.optimized.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    State,
    load_checkpoint,
    put_checkpoint,
    save_checkpoint,
    write_checkpoint_beside,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.whole_file import partial_of, told, write_whole

RUNS_ROOT = Path("runs")
"""Where run folders go when none is named."""


@dataclass(frozen=True)
class Found:
    """What a run folder holds that a run can go on from.

    Attributes:
        checkpoint: the one to go on from, or None to start at step 0.
        settings: of the run it belongs to, or None for a new run.
        warnings: a sentence for each checkpoint that was refused.
        note: what happens now.
    """

    checkpoint: Checkpoint | None = None
    settings: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    note: str = ""


class RunFolder:
    """The folder of one run. Making one touches nothing; only the process that has it `owned` writes in it.

    Attributes:
        path: of the folder.
        config, summary: how the run was started and how it ended, JSON.
        metrics: a line of JSON for each report on the way.
        sample: bytes that the finished model was given, and what it added.
        report, loss_plot: pictures.
        latest, previous: checkpoints of the newest state and of the one before, so that one is always loadable.
        best, final: checkpoints of the best state by validation and of the last.
    """

    def __init__(self, path: Path) -> None:
        """Name the files of a folder, which need not be there."""
        self.path = path
        self.config, self.summary = path / "config.json", path / "summary.json"
        self.metrics, self.sample = path / "metrics.jsonl", path / "sample.txt"
        self.report, self.loss_plot = path / "report.png", path / "loss.png"
        self.latest, self.previous, self.best, self.final = (
            path / f"{name}.safetensors" for name in ("latest", "previous", "best", "final")
        )
        self._latest_is_good = False

    @classmethod
    def new(cls, preset: str) -> RunFolder:
        """Return the next free folder for a run of a preset: ``runs/<preset>-001`` and so on. It is not created."""
        number = 1
        while (path := RUNS_ROOT / f"{preset}-{number:03d}").exists():
            number += 1
        return cls(path)

    def __str__(self) -> str:
        return str(self.path)

    def _checkpoints(self) -> tuple[Path, ...]:
        return self.latest, self.previous, self.best, self.final

    def has_run(self) -> bool:
        """Return whether a run has been started in the folder."""
        return any(path.exists() for path in (self.config, self.metrics, *self._checkpoints()))

    def refuse_other_run(self) -> None:
        """Refuse to start a run in a folder that holds one.

        Raises:
            TrainingError: it does.
        """
        if self.has_run():
            raise TrainingError(
                f"the run folder {str(self)!r} already holds a run: continue it with --resume, or name another"
            )

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Create the folder, and keep every other process from training in it until the end of the block.

        What a killed run left half written is removed. The lock is the system's own, so a killed process leaves none behind.

        Raises:
            TrainingError: the folder cannot be created, or another process is training in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise TrainingError(
                f"cannot use the run folder {str(self)!r}: {error.strerror or error}"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise TrainingError(
                        f"another process is training in the run folder {str(self)!r}"
                    ) from error
                # Some network file systems have no locks: then there is nothing to hold.
            self._remove_partial_files()
            yield
        finally:
            os.close(descriptor)

    def _remove_partial_files(self) -> None:
        small = (self.config, self.summary, self.metrics, self.sample, self.report, self.loss_plot)
        for path in (*small, *self._checkpoints()):
            partial_of(path).unlink(missing_ok=True)

    def write_config(self, document: Mapping[str, Any]) -> None:
        """Write how the run was started.

        Raises:
            TrainingError: the disk is full or cannot be written; the old file is intact. So do the other writers.
        """
        _write_json(self.config, document)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write how the run ended."""
        _write_json(self.summary, summary)

    def write_sample(self, sample: bytes) -> None:
        """Write what the finished model was given and what it added."""
        with told(repr(str(self.sample))):
            write_whole(self.sample, sample)

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
        temporary, digest = write_checkpoint_beside(self.latest, state, **metadata)
        try:
            if self._latest_is_good:
                put_checkpoint(self.latest, self.previous)
            put_checkpoint(temporary, self.latest)
        except TrainingError:
            temporary.unlink(missing_ok=True)
            raise
        self._latest_is_good = True
        return digest

    def save_best(self, state: State, **metadata: Any) -> str:
        """Write ``best``, as `save_checkpoint` does."""
        return save_checkpoint(self.best, state, **metadata)

    def save_final(self, state: State, **metadata: Any) -> str:
        """Write ``final``, as `save_checkpoint` does."""
        return save_checkpoint(self.final, state, **metadata)

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Read ``latest``, or ``previous`` where ``latest`` is refused.

        Returns:
            The checkpoint, or None where the folder has neither file; and one sentence for each file that was
            refused.

        Raises:
            CheckpointError: there are files, and none of them verifies.
        """
        refusals: list[str] = []
        sound = _first_sound((self.latest, self.previous), refusals.append)
        if sound is not None:
            path, checkpoint = sound
            self._latest_is_good = path == self.latest
            return checkpoint, refusals
        if refusals:
            raise CheckpointError("; ".join(refusals) + "; no checkpoint is left to resume from")
        return None, refusals

    def load_best(self, refused: Callable[[str], None]) -> Checkpoint:
        """Read ``best``, or the newest of the other checkpoints where it is missing or refused.

        Args:
            refused: is told one sentence for each file that was refused.

        Raises:
            TrainingError: the folder holds no checkpoint that verifies.
        """
        sound = _first_sound((self.best, self.final, self.latest, self.previous), refused)
        if sound is None:
            raise TrainingError(f"the folder {str(self)!r} holds no checkpoint that can be used")
        return sound[1]

    def find(self) -> Found:
        """Return what to resume. A run killed before its first checkpoint, or before its first file, starts at step 0.

        Raises:
            TrainingError: there are checkpoints, and none of them can be trusted; or there is none, and ``config.json`` does
                not say how the run was started.
        """
        checkpoint, refusals = self.load_newest()
        if checkpoint is not None:
            warnings = tuple(f"{refusal}; going on from the one before it" for refusal in refusals)
            note = f"resuming {str(self)!r} at step {checkpoint.step}"
            return Found(checkpoint, checkpoint.run, warnings, note)
        settings = _read_json(self.config).get("run") if self.config.exists() else None
        if self.config.exists() and not (isinstance(settings, dict) and "data_sha256" in settings):
            raise TrainingError(f"{str(self.config)!r} does not say how the run was started")
        return Found(None, settings, note=f"{str(self)!r} holds no checkpoint yet: starting at step 0")


def _first_sound(paths: tuple[Path, ...], refused: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """Return the first checkpoint that is there and verifies, and tell of those before it that do not."""
    for path in paths:
        if not path.exists():
            continue
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            refused(str(error))
    return None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with told(repr(str(path))):
        write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that a run wrote.

    Raises:
        TrainingError: the file is unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise TrainingError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{str(path)!r} does not hold a JSON object")
    return value
