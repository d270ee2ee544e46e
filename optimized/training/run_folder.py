"""The folder of a run: which files it has, who may write in it, and how small files are written whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arbitor.optimized.training.checkpoint_folder import BEST, FINAL, LATEST, PREVIOUS
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.monitor import METRICS

CONFIG, SUMMARY, SAMPLE = "config.json", "summary.json", "sample.txt"
"""File names in the run folder: how the run was started, how it ended, and what it wrote."""

RUNS_ROOT = Path("runs")
"""Where run folders go when none is named."""


def new_run_folder(preset: str) -> Path:
    """The next free folder for a run of a preset: ``runs/<preset>-001`` and so on. Not created."""
    number = 1
    while (RUNS_ROOT / f"{preset}-{number:03d}").exists():
        number += 1
    return RUNS_ROOT / f"{preset}-{number:03d}"


def has_run(folder: Path) -> bool:
    """Whether a run has been started in a folder."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, LATEST, PREVIOUS, BEST, FINAL))


def refuse_other_run(folder: Path) -> None:
    """Refuse to start a run in a folder that holds one.

    Raises:
        TrainingError: it does.
    """
    if has_run(folder):
        raise TrainingError(
            f"the run folder {str(folder)!r} already holds a run: continue it with --resume, or name another"
        )


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Create a run folder and keep every other process from training in it until the end of the block.

    The lock is the system's own, so a killed process leaves none behind.

    Raises:
        TrainingError: the folder cannot be created, or another process is training in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TrainingError(
            f"cannot use the run folder {str(folder)!r}: {error.strerror or error}"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise TrainingError(
                    f"another process is training in the run folder {str(folder)!r}"
                ) from error
            # Some network file systems have no locks: then there is nothing to hold.
        yield
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file whole: readers see the old one or the new one.

    Raises:
        TrainingError: the disk is full or cannot be written; the old file is intact.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole, keys in the order given.

    Raises:
        TrainingError: as ``write_file``.
    """
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a run wrote.

    Raises:
        TrainingError: the file is missing, unreadable or not a JSON object.
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
