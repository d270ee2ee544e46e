"""What is known of a run: how it was started, how far it has come, and how well. A run under way has facts as a finished one has.

A run folder may come from a stranger. Facts are taken from headers of checkpoints, whose digests were verified, and where there is
none from ``config.json``. Numbers of the other files are taken where they are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.metrics import thinned_metrics
from arbitor.optimized.training.plan import preset_in_words
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.schedule import gain_of, learning_rate, rate
from arbitor.reference.audit import AuditReport, audit
from arbitor.reference.config import ArbConfig

REPORT_LINES = 2000
"""Lines of metrics that a picture shows, and validations beside: more than it has points across."""

MOST_BASELINES = 16
"""Baselines that a folder can name."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        run: its settings, and what its data was, as ``config.json`` and checkpoints have them.
        config: of its model.
        step: steps taken.
        seconds: that training took so far.
        val_bpb, best_bpb: bits per byte of the newest validation and of the best; None where there was none.
        baselines: bits per byte of what counting achieves, by name.
        state_sha256: of the model at that step, or None where no checkpoint has it.
        adapter_sha256: of its adapters at that step, or None where it has none or no checkpoint has them.
        versions: of what it was run with.
        metrics: lines of metrics, of many as many as a picture can show.
    """

    run: Mapping[str, Any]
    config: ArbConfig
    step: int
    seconds: float
    val_bpb: float | None
    best_bpb: float | None
    baselines: Mapping[str, float]
    state_sha256: str | None = None
    adapter_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()

    def audit(self) -> AuditReport:
        """Return the sizes of its model."""
        return audit(self.config)

    def bytes_of_steps(self, steps: int) -> int:
        """Return how many bytes the windows of some steps have."""
        run = self.run
        return int(steps * run["accum"] * run["batch"] * run["context"])

    def planned_rate(self) -> Callable[[int], float]:
        """Return the rate of a step, as the schedule of now has it."""
        steps, theta = self.run["steps"], self.config.theta
        # In a run from before there were sums, each micro-batch voted.
        shared_by = self.run["accum"] if self.run.get("accum_votes", True) else 1
        flat = self.run.get("learning_rate")
        if flat is not None:
            return lambda step: learning_rate(step, steps, flat=flat)
        gain = gain_of(self.run.get("rate"), theta)
        return lambda step: rate(step, steps, theta=theta, gain=gain, votes=shared_by)

    def rate_in_words(self) -> tuple[str, str]:
        """Return what the rate is of, and its unit: of the votes, or of AdamW in a run with adapters."""
        if self.run.get("learning_rate") is not None:
            return "learning rate of AdamW", "learning rate"
        return "rate of the votes", "votes per rms of a row"

    def words(self) -> dict[str, str]:
        """Return the facts as a page says them, by name."""
        run, made_of = self.run, self.audit()
        words = {
            "preset": preset_in_words(run, self.config.name),
            **self._words_of_adapters(),
            "weights": f"{made_of.weights:,}",
            "state": f"{made_of.canonical_bytes:,} bytes",
            "tables": f"{sum(table.bytes for table in made_of.tables):,} bytes",
            "steps": f"{self.step:,} of {run['steps']:,}",
            "tokens": f"{self.bytes_of_steps(self.step):,} bytes read",
            "time": f"{self.seconds:,.0f} s",
            "validation": _bpb(self.val_bpb),
            "best": _bpb(self.best_bpb),
            "seed": f"{run['seed']}",
            "data": f"{Path(run['data']).name} ({run['data_bytes']:,} bytes)",
            "device": ", ".join(f"{run.get(name)}" for name in ("device", "backend", "dtype")),
        }
        return words if self.state_sha256 is None else {**words, "state_sha256": self.state_sha256}

    def _words_of_adapters(self) -> dict[str, str]:
        """Return what a page says of adapters, or nothing for a run without them."""
        run = self.run
        if run.get("lora_rank") is None:
            return {}
        return {
            "base": f"{Path(run['init_from']).name}",
            "adapters": f"rank {run['lora_rank']}, alpha {run['lora_alpha']:g}, {run['lora_targets']}",
        }


def read_facts(folder: RunFolder) -> tuple[RunFacts, list[str]]:
    """Return the facts of a run, and one sentence for each checkpoint that was refused. Nothing is written, and no tensor is read.

    Raises:
        TrainingError: the folder holds no run, or nothing in it says how the run was started.
    """
    start = folder.read_start()
    try:
        metrics = thinned_metrics(folder.metrics, REPORT_LINES)
    except OSError as error:
        raise TrainingError(f"cannot read {str(folder.metrics)!r}: {error.strerror or error}") from error
    header = start.header or {}
    lines = [line for line in metrics if 0 <= line["step"] <= start.run["steps"]]
    step = max([line["step"] for line in lines[-1:]] + [header.get("step", 0)])
    seconds = [number(line.get("seconds")) or 0.0 for line in lines[-1:]]
    values = [(line["step"], number(line.get("val_bpb"))) for line in lines]
    measured = [value for _, value in values if value is not None]
    learned = [value for at, value in values if value is not None and (at > 0 or start.run.get("init_from"))]
    best = number(header.get("best_bpb"))
    learned += [] if best is None else [best]
    facts = RunFacts(
        run=start.run,
        config=start.config,
        step=step,
        seconds=max([*seconds, header.get("progress", {}).get("seconds", 0.0)]),
        val_bpb=measured[-1] if measured else None,
        best_bpb=min(learned, default=None),
        baselines=_baselines(start.document.get("baselines")),
        state_sha256=header["state_sha256"] if header.get("step") == step else None,
        adapter_sha256=header["adapter"]["sha256"]
        if header.get("step") == step and "adapter" in header
        else None,
        versions=_strings(start.document.get("versions")),
        metrics=lines,
    )
    return facts, start.refusals


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 and math.isfinite(value) else None


def _bpb(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f} bpb"


def _baselines(found: Any) -> dict[str, float]:
    values = {name: number(value) for name, value in found.items()} if isinstance(found, dict) else {}
    known = {name: value for name, value in values.items() if value is not None}
    return known if len(known) <= MOST_BASELINES else {}


def _strings(found: Any) -> dict[str, str]:
    entries = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in entries if isinstance(value, str)}
