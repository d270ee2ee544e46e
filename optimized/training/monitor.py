"""What a run shows while it goes: metrics.jsonl, TensorBoard events, and a progress bar or plain lines.

Units: bits per byte (bpb), bytes per second (a token is a byte), share of trits changed by one step (flip
rate).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.events import EventFile
from arbitor.optimized.training.metrics import cut_metrics
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.whole_file import append_to

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Monitor:
    """Reports the progress of one run to its folder and to the console.

    Every call of ``log`` adds one line to ``metrics.jsonl`` and one record for each number to the event file.
    Both files are written at once, so that a killed run loses nothing that was reported.
    """

    def __init__(
        self, folder: RunFolder | None, *, steps: int, start_step: int = 0, console: Console | None = None
    ) -> None:
        """Open the files of a run, cutting what a resumed run will report again.

        Args:
            folder: the run folder, or None to write no files.
            steps: length of the whole run.
            start_step: steps taken before; what the files say about later ones is dropped.
            console: where to print, or None to print nothing. A bar on a terminal, plain lines elsewhere.

        Raises:
            TrainingError: a file cannot be written.
        """
        self._steps = steps
        self._step = start_step
        self._console = console
        self._val_bpb: float | int | None = None
        self._clock: tuple[float, int] | None = None
        self._metrics: IO[str] | None = None
        self._events: EventFile | None = None
        self._progress: tuple[Progress, TaskID] | None = None
        if folder is not None:
            try:
                # A run from step 0 reports that step again.
                last_kept = start_step if start_step > 0 else -1
                cut_metrics(folder.metrics, last_kept)
                self._metrics = append_to(folder.metrics)
                self._events = EventFile(folder.path, purge_step=last_kept + 1)
            except OSError as error:
                raise _write_error(folder.path, error) from error
        if console is not None and console.is_terminal:
            self._progress = _progress_bar(console, steps, start_step)

    def say(self, sentence: str) -> None:
        """Print one sentence."""
        if self._console is not None:
            self._console.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print one sentence on stderr, without end mark: something the user should know about."""
        if self._console is not None:
            with contextlib.suppress(OSError):
                print(f"arb: {shown(sentence)}.", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        self._step = step
        if self._clock is None:
            self._clock = (time.monotonic(), step)
        if self._progress is not None:
            bar, task = self._progress
            bar.update(task, completed=step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the numbers of a step.

        Args:
            step: steps taken.
            values: by name; None stands for a number that is not finite or not known. ``kinds``, ``codebooks`` and
                ``experts`` are groups of numbers, as a census makes them, and ``media`` is one, as a mix does.

        Raises:
            TrainingError: a file cannot be written.
        """
        self.advance(step)
        try:
            if self._metrics is not None:
                self._metrics.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
                self._metrics.flush()
            if self._events is not None:
                self._events.add(step, values)
        except OSError as error:
            raise _write_error(None, error) from error
        if values.get("val_bpb") is not None:
            self._val_bpb = values["val_bpb"]
        text = _readable(values)
        if self._progress is not None:
            bar, task = self._progress
            bar.update(task, numbers=_readable({"val_bpb": self._val_bpb, **values}, gap=" "))
        elif self._console is not None:
            self.say(f"step {step}/{self._steps}  {text}{self._remaining(step)}")

    def close(self) -> None:
        """Close the files and the bar. Safe to call more than once, and after a failed write."""
        if self._progress is not None:
            self._progress[0].stop()
            self._progress = None
        for file in (self._metrics, self._events):
            try:
                if file is not None:
                    file.close()
            except OSError:
                # The write that filled the disk has been reported already.
                continue
        self._metrics = self._events = None

    def _remaining(self, step: int) -> str:
        if self._clock is None or step <= self._clock[1] or step >= self._steps:
            return ""
        began, first = self._clock
        seconds = (time.monotonic() - began) / (step - first) * (self._steps - step)
        return f"  eta {int(seconds) // 60}:{int(seconds) % 60:02d}"


def _progress_bar(console: Console, steps: int, start_step: int) -> tuple[Progress, TaskID]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        # With all the numbers, a line still fits 80 columns.
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
        console=console,
    )
    # A new run validates the model before its first step, which shows nothing until it is done.
    numbers = "validation" if start_step == 0 else ""
    task = bar.add_task("training", total=steps, completed=start_step, numbers=numbers)
    bar.start()
    return bar, task


def _readable(values: Mapping[str, Any], gap: str = "  ") -> str:
    """Return the numbers of a step as a reader wants them, in a fixed order."""
    forms = (
        ("train_bpb", "bpb {:.3f}"),
        ("val_bpb", "val {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("flip_rate", "flips {:.3%}"),
    )
    return gap.join(form.format(values[name]) for name, form in forms if values.get(name) is not None)


def _write_error(path: Path | None, error: OSError) -> TrainingError:
    where = repr(str(error.filename or path or "the run folder"))
    return TrainingError(f"cannot write {where}: {error.strerror or error}")
