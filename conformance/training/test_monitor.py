"""Metrics, events and plot of a run, fresh and resumed."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from arbitor.optimized.training import events, metrics
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.metrics import cut_metrics, read_metrics, thinned_metrics
from arbitor.optimized.training.monitor import Monitor
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.runtime import StopRequest


def events_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Scalars as TensorBoard itself reads them, purged steps left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_monitor_writes_metrics_and_events(tmp_path: Path) -> None:
    monitor = Monitor(RunFolder(tmp_path), steps=4)
    monitor.log(0, {"val_bpb": 8.5})
    monitor.log(2, {"train_bpb": 4.25, "val_bpb": None, "skipped": 0})
    # Readable before the monitor is closed.
    lines = RunFolder(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "val_bpb": 8.5},
        {"step": 2, "train_bpb": 4.25, "val_bpb": None, "skipped": 0},
    ]
    assert events_of(tmp_path, "train_bpb") == [(2, 4.25)]
    assert events_of(tmp_path, "val_bpb") == [(0, 8.5)]
    files = monitor._metrics
    assert files is not None and not files.closed
    monitor.close()
    assert files.closed
    monitor.close()


def test_monitor_of_a_resumed_run_cuts_what_comes_again(tmp_path: Path) -> None:
    first = Monitor(RunFolder(tmp_path), steps=9)
    for step in range(1, 8):
        first.log(step, {"train_bpb": float(step)})
    first.close()
    with open(RunFolder(tmp_path).metrics, "a") as file:
        # Torn by a crash.
        file.write('{"step": 3, "train_')
    second = Monitor(RunFolder(tmp_path), steps=9, start_step=5)
    assert [line["step"] for line in read_metrics(RunFolder(tmp_path).metrics)] == [1, 2, 3, 4, 5]
    second.log(6, {"train_bpb": 60.0})
    second.close()
    assert events_of(tmp_path, "train_bpb") == [*((float(s), float(s)) for s in range(1, 6)), (6, 60.0)]


def test_cut_metrics_keeps_the_lines_as_they_are(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).metrics
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1,   "a": 0.10}\n[]\n{"step": "2"}\n{"step": 4}\n{"step": 3}\n')
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1,   "a": 0.10}\n{"step": 3}\n'


def test_the_end_of_a_line_that_is_too_long_is_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of as many bytes as are allowed still counts."""
    path, kept = tmp_path / "metrics.jsonl", '{"step": 1, "a": 0.25}'
    monkeypatch.setattr(metrics, "LINE_BYTES", len(kept))
    for end in ("", "\n"):
        path.write_text(f"{kept}\n{'x' * 2 * len(kept)}" + '{"step": 7}\n{"step": 2}' + end)
        assert read_metrics(path) == [{"step": 1, "a": 0.25}, {"step": 2}]
        cut_metrics(path, 9)
        assert path.read_text() == kept + '\n{"step": 2}\n'


def test_thinned_metrics_are_few_and_have_the_ends_of_long_runs(tmp_path: Path) -> None:
    """Validations at a rhythm of their own are there, however the lines are thinned."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i, **({"val_bpb": 2.0} if i % 7 == 3 else {})} for i in range(5000)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    thinned = thinned_metrics(path, 100)
    assert 100 < len(thinned) <= 200 and thinned[-1]["step"] >= 4990
    assert 90 <= sum("val_bpb" in line for line in thinned) <= 130
    assert max(b["step"] - a["step"] for a, b in itertools.pairwise(thinned)) <= 51
    assert thinned_metrics(path, 5001) == read_metrics(path) == lines
    assert thinned_metrics(tmp_path / "none", 5) == []


def test_a_clock_that_is_set_back_loses_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Monitor(RunFolder(tmp_path), steps=4)
    for step in (1, 2, 3):
        first.log(step, {"train_bpb": float(step)})
    first.close()
    now = time.time_ns()
    monkeypatch.setattr(events, "time", SimpleNamespace(time_ns=lambda: now - 10**15, time=lambda: now / 1e9))
    second = Monitor(RunFolder(tmp_path), steps=4, start_step=2)
    second.log(3, {"train_bpb": 30.0})
    second.close()
    assert events_of(tmp_path, "train_bpb") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_monitor_prints_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    monitor = Monitor(None, steps=100, console=Console(file=out, width=40))
    monitor.log(0, {"val_bpb": 8.0})
    values = {"train_bpb": 3.21987, "val_bpb": 3.5, "tokens_per_second": 12345.6, "flip_rate": 0.00123}
    monitor.log(50, {**values, "rate": 1.25})
    monitor.log(100, {"train_bpb": None})
    monitor.close()
    zero, fifty, end = out.getvalue().splitlines()
    assert zero == "step 0/100  val 8.000"
    assert fifty.startswith("step 50/100  bpb 3.220  val 3.500  12,346 tokens/s  flips 0.123%  eta 0:0")
    assert end.startswith("step 100/100")


def test_monitor_draws_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    monitor = Monitor(None, steps=100, console=Console(file=out, width=120, force_terminal=True))
    monitor.log(50, {"train_bpb": 3.21987, "flip_rate": 0.00123, "tokens_per_second": 10.0})
    monitor.close()
    for part in ("50/100", "bpb 3.220", "10 tokens/s", "flips 0.123%", "eta"):
        assert part in out.getvalue()


@pytest.mark.parametrize(("start_step", "says"), [(0, True), (7, False)])
def test_a_bar_says_that_a_new_run_validates_first(start_step: int, says: bool) -> None:
    """The bar stood at 0 without a word, for ten seconds and more on busy cores."""
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    Monitor(None, steps=100, start_step=start_step, console=console).close()
    assert f"{start_step}/100" in out.getvalue()
    assert ("validation" in out.getvalue()) == says


def test_a_stop_is_told_below_the_bar() -> None:
    """A bar leaves the cursor in its line, and the sentence stood behind it."""
    reader, terminal = os.openpty()
    os.set_blocking(reader, False)
    kept = os.dup(2)
    try:
        with StopRequest(announced=True).listening() as request:
            os.dup2(terminal, 2)
            signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(kept, 2)
        told = os.read(reader, 1000)
        for descriptor in (kept, terminal, reader):
            os.close(descriptor)
    assert request.signal_number == signal.SIGINT
    assert told == b"\r\narb: stopping after this step; again to quit now.\r\n"


def test_monitor_reports_a_full_disk_in_one_sentence(tmp_path: Path) -> None:
    monitor = Monitor(RunFolder(tmp_path), steps=4)
    assert monitor._metrics is not None
    monitor._metrics.close()
    monitor._metrics = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(TrainingError, match=r"cannot write .*No space left on device"):
        monitor.log(1, {"train_bpb": 1.0})
    monitor.close()


def test_monitor_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot write"):
        Monitor(RunFolder(tmp_path / "missing"), steps=1)


def test_monitor_writes_groups_of_numbers(tmp_path: Path) -> None:
    """Lines hold the metrics as they are. In events the metric's name comes first, and counts are histograms."""
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    exponents = {"min": -4, "mean": -3.5, "max": -2, "counts": {"-4": 6, "-2": 2}}
    groups = {
        "kinds": {"head": {"weights": 96, "flip_rate": 0.25, "exponents": exponents}},
        "codebooks": {"text": {"codes": 8, "used": 3, "dead": 1}},
        "experts": {"layers.0": {"load": [5, 0, 1], "max_over_mean": 2.5}},
    }
    monitor = Monitor(RunFolder(tmp_path), steps=4)
    monitor.log(1, {"train_bpb": None, "flip_rate": 0.5, **groups})
    monitor.close()
    assert read_metrics(RunFolder(tmp_path).metrics) == [
        {"step": 1, "train_bpb": None, "flip_rate": 0.5, **groups}
    ]
    reader = EventAccumulator(str(tmp_path), size_guidance={HISTOGRAMS: 0})
    reader.Reload()
    tags = {tag: reader.Scalars(tag)[0].value for tag in reader.Tags()["scalars"]}
    assert tags == {
        "flip_rate": 0.5,
        "flip_rate/head": 0.25,
        "exponent_min/head": -4,
        "exponent_mean/head": -3.5,
        "exponent_max/head": -2,
        "codes_used/text": 3,
        "codes_dead/text": 1,
        "expert_max_over_mean/layers.0": 2.5,
    }
    assert sorted(reader.Tags()["histograms"]) == ["expert_load/layers.0", "exponents/head"]
    spread = reader.Histograms("exponents/head")[0].histogram_value
    assert (spread.min, spread.max, spread.num, spread.sum, spread.sum_squares) == (-4, -2, 8, -28, 104)
    assert spread.bucket_limit == [-4.5, -3.5, -2.5, -1.5] and spread.bucket == [0, 6, 0, 2]
    assert reader.Histograms("expert_load/layers.0")[0].histogram_value.bucket == [0, 5, 0, 1]
