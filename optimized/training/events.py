"""The TensorBoard event file of a run: scalars and histograms, under tags that put kinds side by side."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EVENT_FILE_VERSION = "brain.Event:2"
"""What the first record of a TensorBoard event file has to say."""

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{19})\.arb")
"""Name of an event file, with its number: nanoseconds since 1970, or one more than the largest before it."""

Histogram = list[tuple[int, int]]
"""Whole numbers and how often each occurred, in ascending order."""


_PREFIXES = {"kinds": "", "codebooks": "codes_", "experts": "expert_", "media": ""}
"""Groups of numbers in a line of metrics, and how the tags of each begin."""


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a folder."""
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]


class EventFile:
    """A TensorBoard event file, written at once: no thread that could fail unseen when the disk is full."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        """Open a new file; readers drop what others in the folder say of a step and later ones.

        Raises:
            OSError: it cannot be written; so do the other methods.
        """
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event_pb2 = event_pb2
        # Readers take the files in the order of their names. A clock that was set back would put this one before the others.
        numbers = [int(path.name.split(".")[3]) for path in event_files(folder)]
        number = max([time.time_ns(), *(number + 1 for number in numbers)])
        self._file = open(folder / f"events.out.tfevents.{number}.arb", "xb", buffering=0)  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(file_version=EVENT_FILE_VERSION)
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=log)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a line of metrics, groups of them flattened; None is left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary()
        for tag, value in tagged(values):
            if isinstance(value, list):
                _fill(summary.value.add(tag=tag).histo, value)
            else:
                summary.value.add(tag=tag, simple_value=value)
        self._write(step=step, summary=summary)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._event_pb2.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())


def tagged(values: Mapping[str, Any]) -> Iterator[tuple[str, float | int | Histogram]]:
    """Yield tag and value of all that a line of metrics says: ``flip_rate``, ``flip_rate/attention``, ``codes_used/...``.

    A tag is what is measured, then of what: TensorBoard groups by the part before the stroke.
    """
    for name, value in values.items():
        if name not in _PREFIXES:
            if value is not None:
                yield name, value
            continue
        for of, numbers in value.items():
            prefix = _PREFIXES[name]
            for what, number in numbers.items():
                if what == "exponents":
                    yield f"exponents/{of}", [(int(e), count) for e, count in number["counts"].items()]
                    for part in ("min", "mean", "max"):
                        yield f"exponent_{part}/{of}", number[part]
                elif what == "load":
                    yield f"expert_load/{of}", list(enumerate(number))
                # Sizes never change.
                elif what not in ("weights", "codes") and number is not None:
                    yield f"{prefix}{what}/{of}", number


def _fill(message: Any, histogram: Histogram) -> None:
    """Write a histogram of whole numbers: each has a bucket of its own, from half below it to half above."""
    numbers = [number for number, _ in histogram]
    message.min, message.max = numbers[0], numbers[-1]
    message.num = sum(count for _, count in histogram)
    message.sum = sum(number * count for number, count in histogram)
    message.sum_squares = sum(number * number * count for number, count in histogram)
    counts = dict(histogram)
    # The first bucket is all that is below.
    message.bucket_limit.append(numbers[0] - 0.5)
    message.bucket.append(0)
    for number in range(numbers[0], numbers[-1] + 1):
        message.bucket_limit.append(number + 0.5)
        message.bucket.append(counts.get(number, 0))
