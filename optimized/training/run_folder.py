"""The folder of a run: its files, who may write in it, what is saved there, and what a run can go on from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbitor.optimized.training.adapter_files import CONFIG_FILE, TENSORS_FILE
from arbitor.optimized.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    HeaderCheck,
    OtherRulesError,
    State,
    load_checkpoint,
    load_header,
    put_checkpoint,
    save_checkpoint,
    write_checkpoint_beside,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.events import event_files
from arbitor.optimized.training.metrics import last_step
from arbitor.optimized.training.options import BOUND
from arbitor.optimized.training.regular import json_object, kind_of
from arbitor.optimized.training.run_header import check_header, check_settings
from arbitor.optimized.training.sizes import config_of
from arbitor.optimized.training.whole_file import made_folder, partial_of, told, write_whole
from arbitor.reference.config import ArbConfig

RUNS_ROOT = Path("runs")
"""Where run folders go when none is named."""


@dataclass(frozen=True)
class Found:
    """What a run folder holds that a run can go on from.

    Attributes:
        checkpoint: the one to go on from, or None to start at step 0.
        settings: of the run it belongs to, or None for a new run.
        model: the configuration of its model as JSON data, or None for a new run.
        warnings: a sentence for each checkpoint that was refused.
        note: what happens now.
        beginning: what ``config.json`` says that the run began with, where it began with the weights of another.
    """

    checkpoint: Checkpoint | None = None
    settings: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    note: str = ""
    beginning: Any = None


@dataclass(frozen=True)
class Start:
    """How a run was started, as its folder says it.

    Attributes:
        run: its settings, checked.
        config: of its model.
        header: of its newest checkpoint, or None where it has none.
        document: what ``config.json`` holds beside; empty where it cannot be used.
        refusals: one sentence for each file that was refused.
    """

    run: Mapping[str, Any]
    config: ArbConfig
    header: Mapping[str, Any] | None
    document: Mapping[str, Any]
    refusals: list[str]


CODEC_FILE = "codec.safetensors"
"""File of a run folder that holds the codec of a run that learns from speech, written as a checkpoint is."""


class RunFolder:
    """The folder of one run. To name one touches nothing; only the process that has it `owned` writes in it.

    Attributes:
        path: of the folder.
        config, summary: how the run was started and how it ended, JSON.
        metrics: a line of JSON for each report on the way.
        sample: bytes that the finished model was given, and what it added.
        report, loss_plot: pictures.
        latest, previous: checkpoints of the newest state and of the one before, so that one is always loadable.
        best, final: checkpoints of the best state by validation and of the last.
        codec: checkpoint of the codec of a run that learns from speech.
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
        self.codec = path / CODEC_FILE
        self._latest_is_good = False

    @classmethod
    @contextlib.contextmanager
    def new(cls, preset: str) -> Iterator[RunFolder]:
        """Make the next free folder for a run of a preset: ``runs/<preset>-001`` and so on.

        No other process is given a folder that is there. If the block raises before something is in the folder, it is removed.

        Raises:
            TrainingError: the folder cannot be created.
        """
        for number in itertools.count(1):
            folder = cls(RUNS_ROOT / f"{preset}-{number:03d}")
            if os.path.lexists(folder.path):
                continue
            with contextlib.ExitStack() as stack:
                with folder._told():
                    is_new = stack.enter_context(made_folder(folder.path))
                # Otherwise another process was faster.
                if is_new:
                    yield folder
                    return

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an OSError of making or opening the folder into a sentence."""
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot use the run folder {str(self)!r}: {error.strerror or error}"
            ) from error

    def __str__(self) -> str:
        return str(self.path)

    @property
    def adapter(self) -> Path:
        """Folder of the best adapters in peft's format, of a run that has adapters."""
        return self.path / "adapter"

    def _checkpoints(self) -> tuple[Path, ...]:
        return self.latest, self.previous, self.best, self.final

    def _files(self) -> tuple[Path, ...]:
        """Return every file that is written whole."""
        small = (self.config, self.summary, self.metrics, self.sample, self.report, self.loss_plot)
        return (
            *small,
            *self._checkpoints(),
            self.codec,
            self.adapter / CONFIG_FILE,
            self.adapter / TENSORS_FILE,
        )

    def files_there(self) -> list[Path]:
        """Return those files of a run that the folder has."""
        return [path for path in self._files() if os.path.lexists(path)]

    def has_run(self) -> bool:
        """Return whether a run has been started in the folder."""
        return any(os.path.lexists(path) for path in (self.config, self.metrics, *self._checkpoints()))

    def refuse_no_run(self) -> None:
        """Refuse to go on where no run has been started.

        Raises:
            TrainingError: the folder is not there, or holds no run.
        """
        if not self.has_run():
            there = "holds no run" if self.path.is_dir() else "is no folder of a run"
            raise TrainingError(
                f"{str(self)!r} {there}, so there is nothing to go on with: without --resume a run begins there"
            )

    def reset(self) -> None:
        """Remove the files of the run that the folder holds, so that another can begin. Features and other files stay.

        Raises:
            TrainingError: a file cannot be removed.
        """
        if not self.has_run():
            return
        # First what a run is resumed from: a folder that is half removed must not go on as the old run.
        for path in (*self._checkpoints(), *self._files(), *event_files(self.path)):
            with told(repr(str(path))):
                path.unlink(missing_ok=True)

    def refuse_other_run(self, *, is_reset: bool = False) -> None:
        """Refuse to start a run in a folder that holds one, or where a folder cannot be.

        Args:
            is_reset: whether a run that is there will be removed first.

        Raises:
            TrainingError: it does; or there is something else than a folder in its place.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            there = kind_of(self.path.lstat().st_mode)
            raise TrainingError(f"the run folder {str(self)!r} is {there}, but must be a folder")
        if self.has_run() and not is_reset:
            raise TrainingError(
                f"the run folder {str(self)!r} already holds a run: continue it with --resume, remove it with "
                "--reset, or name another"
            )

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Create the folder, and keep every other process from training in it until the end of the block.

        What a killed run left half written is removed. The lock is the system's own, so a killed process leaves none behind.

        Raises:
            TrainingError: the folder cannot be created, or another process is training in it.
        """
        with contextlib.ExitStack() as stack:
            with self._told():
                stack.enter_context(made_folder(self.path))
                descriptor = os.open(self.path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
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

    def _remove_partial_files(self) -> None:
        for path in self._files():
            with told(f"in the run folder {str(self)!r}"):
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

    def load_newest(self, check: HeaderCheck | None = None) -> tuple[Checkpoint | None, list[str]]:
        """Read ``latest``, or ``previous`` where ``latest`` is refused.

        Args:
            check: as for `load_checkpoint`.

        Returns:
            The checkpoint, or None where the folder has neither file; and one sentence for each file that was
            refused.

        Raises:
            CheckpointError: there are files, and none of them verifies; or as `load_checkpoint` for other rules.
        """
        refusals: list[str] = []
        sound = _first_sound((self.latest, self.previous), refusals.append, check)
        if sound is not None:
            path, checkpoint = sound
            self._latest_is_good = path == self.latest
            return checkpoint, refusals
        if refusals:
            raise CheckpointError("; ".join(refusals) + "; no checkpoint is left to resume from")
        return None, refusals

    def load_best(self, refused: Callable[[str], None], *, any_rules: bool = False) -> Checkpoint:
        """Read ``best``, or the newest of the other checkpoints where it is missing or refused.

        Args:
            refused: is told one sentence for each file that was refused.
            any_rules: as for `load_checkpoint`.

        Raises:
            OtherRulesError: as `load_checkpoint`.
            TrainingError: the folder holds no checkpoint that verifies.
        """
        paths = (self.best, self.final, self.latest, self.previous)
        sound = _first_sound(paths, refused, check_header, any_rules=any_rules)
        if sound is None:
            raise TrainingError(f"the folder {str(self)!r} holds no checkpoint that can be used")
        return sound[1]

    def find(self) -> Found:
        """Return what to resume. A run killed before its first checkpoint starts at step 0. Nothing is written.

        Raises:
            TrainingError: there are checkpoints, and none of them can be trusted; or there is none, although steps were taken
                or ``config.json`` does not say how the run was started; or the newest is of another run.
        """
        checkpoint, refusals = self.load_newest(check_header)
        warnings = [f"{refusal}; going on from the one before it" for refusal in refusals]
        if checkpoint is None:
            self._refuse_lost_steps()
            document = json_object(self.config)
            self._recorded_config(document)
            note = f"{str(self)!r} holds no checkpoint yet: starting at step 0"
            return Found(None, document["run"], document["model"], note=note)
        document = {}
        try:
            document = json_object(self.config)
            self._refuse_checkpoint_of_another_run(checkpoint, document)
        except CheckpointError:
            raise
        except TrainingError as error:
            warnings.append(f"{error}; the checkpoint says how the run was started")
        finished = checkpoint.step == checkpoint.run["steps"]
        note = f"resuming {str(self)!r} at step {checkpoint.step}"
        if finished:
            note = f"{str(self)!r} is finished: all of its {checkpoint.step} steps are taken, and only its last files are written"
        beginning = _writable(document.get("beginning"))
        return Found(checkpoint, checkpoint.run, checkpoint.config, tuple(warnings), note, beginning)

    def read_start(self) -> Start:
        """Return how the run was started: as its newest checkpoint says, else as ``config.json`` does. No tensor is read.

        Raises:
            TrainingError: the folder holds no run, or neither says it.
        """
        if not self.has_run():
            raise TrainingError(f"{str(self)!r} holds no run")
        refusals: list[str] = []
        document: Mapping[str, Any] = {}
        try:
            document = json_object(self.config)
        except TrainingError as error:
            refusals.append(str(error))
        for path in self._checkpoints():
            if os.path.lexists(path):
                try:
                    header = load_header(path, check_header)
                except CheckpointError as error:
                    refusals.append(str(error))
                    continue
                return Start(header["run"], config_of(header["config"]), header, document, refusals)
        if refusals:
            raise TrainingError("; ".join(refusals))
        config = self._recorded_config(document)
        return Start(document["run"], config, None, document, refusals)

    def _recorded_config(self, document: Mapping[str, Any]) -> ArbConfig:
        """Return the configuration of the model that ``config.json`` has recorded, after its settings were checked."""
        try:
            check_settings(document.get("run"))
            return config_of(document["model"])
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            raise TrainingError(
                f"{str(self.config)!r} does not say how the run was started: {error}"
            ) from error

    def _refuse_lost_steps(self) -> None:
        """Refuse to start a run again whose checkpoints are gone: what is left of it would be overwritten."""
        left = [path for path in (self.best, self.final, self.summary) if os.path.lexists(path)]
        try:
            if last_step(self.metrics) > 0:
                left.append(self.metrics)
        except OSError as error:
            raise TrainingError(f"cannot read {str(self.metrics)!r}: {error.strerror or error}") from error
        if left:
            raise TrainingError(
                f"{str(self)!r} has {left[0].name} but neither {self.latest.name} nor {self.previous.name}, so there is no "
                "checkpoint to resume from: put one back, or begin in another folder"
            )

    def _refuse_checkpoint_of_another_run(self, checkpoint: Checkpoint, document: Mapping[str, Any]) -> None:
        recorded = document.get("run")
        if not isinstance(recorded, dict):
            raise TrainingError(f"{str(self.config)!r} does not say how the run was started")
        # The steps may be more in one than in the other, where the process was killed that added some.
        for name in (*(name for name in BOUND if name != "steps"), "data_sha256"):
            if name in recorded and name in checkpoint.run and recorded[name] != checkpoint.run[name]:
                raise CheckpointError(
                    f"the newest checkpoint in {str(self)!r} is of another run: {name} is {checkpoint.run[name]!r} there and "
                    f"{recorded[name]!r} in {self.config.name}"
                )


def _first_sound(
    paths: tuple[Path, ...],
    refused: Callable[[str], None],
    check: HeaderCheck | None,
    *,
    any_rules: bool = False,
) -> tuple[Path, Checkpoint] | None:
    """Return the first checkpoint that is there and verifies, and tell of those before it that do not."""
    for path in paths:
        if not os.path.lexists(path):
            continue
        try:
            return path, load_checkpoint(path, check, any_rules=any_rules)
        except OtherRulesError:
            # All files of a run learned by the same rules.
            raise
        except CheckpointError as error:
            refused(str(error))
    return None


def _writable(value: Any) -> Any:
    """Return a value as it was read from a file, or None where it cannot be written again: a stranger's may hold NaN."""
    try:
        json.dumps(value, indent=2, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with told(repr(str(path))):
        write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
