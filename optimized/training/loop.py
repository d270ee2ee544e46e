"""The trainer: from bytes to a run folder.

A run is a pure function of its settings. The batches, the dither and the rate of a step depend only on the
seed and the step, so a run that was killed and resumed ends with the same weights as one that never was.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training import run_folder
from arbitor.optimized.training.baselines import baseline_bpb
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.checkpoint import check_fits, save_checkpoint, state_sha256
from arbitor.optimized.training.checkpoint_folder import BEST, FINAL, CheckpointFolder
from arbitor.optimized.training.data import (
    Corpus,
    Split,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.optimized.training.defaults import trainer_defaults
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT, validation_bpb
from arbitor.optimized.training.generate import generate
from arbitor.optimized.training.monitor import METRICS, Monitor, read_metrics
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.plan import Settings, TrainOptions, decide
from arbitor.optimized.training.recording import records
from arbitor.optimized.training.report import LOSS_PLOT, REPORT, plot_loss, write_report
from arbitor.optimized.training.resume import Found, check_data, look_into
from arbitor.optimized.training.runtime import (
    Runtime,
    Stopped,
    StopRequest,
    choose_runtime,
    deterministic,
    device_name,
    versions,
)
from arbitor.optimized.training.schedule import rate
from arbitor.reference.audit import audit

if TYPE_CHECKING:
    from rich.console import Console

    from arbitor.reference.graph import ArbModel

MAX_SKIPPED_IN_A_ROW = 100
"""Micro-batches without a finite loss after which a run gives up."""

SAMPLE_PROMPT_BYTES = 48
"""How much of the validation bytes the sample at the end continues."""

SAMPLE_TEMPERATURE = 0.8
"""Temperature of the sample at the end."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        summary: what ``summary.json`` holds.
        prompt, sample: bytes that the finished model was given, and what it added.
        folder: the run folder, or None where nothing was written.
    """

    summary: dict[str, Any]
    prompt: bytes
    sample: bytes
    folder: Path | None


@dataclass
class Progress:
    """Counters that a resumed run carries on.

    Attributes:
        seconds: wall-clock time of the training so far.
        nats, losses: sum and number of the losses since the last line of metrics.
        skipped: micro-batches without a finite loss.
        skipped_in_a_row: those since the last finite one.
        faulty_rows: gradient rows that were not finite and cast no votes.
    """

    seconds: float = 0.0
    nats: float = 0.0
    losses: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    faulty_rows: int = 0


@dataclass
class _Run:
    """All that the steps of a run work with."""

    settings: Settings
    runtime: Runtime
    model: ArbModel
    passes: Passes
    corpus: Corpus
    split: Split
    windows_WT: torch.Tensor
    baselines: Mapping[str, float]
    census: Census
    monitor: Monitor
    request: StopRequest
    folder: Path | None
    store: CheckpointFolder | None
    metadata: dict[str, Any]
    step: int = 0
    best_bpb: float | None = None
    val_bpb: float | None = None
    progress: Progress = field(default_factory=Progress)
    clock: float = 0.0
    saved: tuple[int, str] | None = None  # step and state_sha256 of the newest checkpoint

    def count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now

    def checkpoint_metadata(self) -> dict[str, Any]:
        self.count_time()
        progress = {**asdict(self.progress), "faulty_rows": self.faulty_rows()}
        state = {"step": self.step, "best_bpb": self.best_bpb, "progress": progress}
        return {**self.metadata, **state}

    def rate(self, step: int) -> float:
        settings = self.settings
        return rate(step, settings.steps, theta=self.model.config.theta, accum=settings.accum)

    def faulty_rows(self) -> int:
        return self.progress.faulty_rows + int(self.model.voting.faults)

    def save_latest(self) -> None:
        if self.store is not None:
            self.saved = self.step, self.store.save_latest(self.model.state(), **self.checkpoint_metadata())


def train(options: TrainOptions, *, console: Console | None = None) -> TrainResult:
    """Train a model, or go on with a run, and write its folder.

    SIGINT and SIGTERM end the run between two steps, with a checkpoint.

    Args:
        options: what to do.
        console: where to report, or None for silence.

    Returns:
        The summary and a sample of the finished model.

    Raises:
        TrainingError: anything the user can act on: data, folder, checkpoint, device, disk, a loss that stays
            not finite.
        Stopped: a signal asked for it.
        ValueError: a setting is out of range.
    """
    if options.resume and options.run is None:
        raise ValueError("run is not set, but must name the folder of the run to resume")
    folder = options.run
    if folder is None and options.save:
        folder = run_folder.new_run_folder(Path(options.preset or "tiny").stem)
    with ExitStack() as stack:
        request = stack.enter_context(StopRequest().listening())
        found = Found()
        if options.resume and folder is not None:
            stack.enter_context(run_folder.owned(folder))
            found = look_into(folder)
        elif folder is not None:
            run_folder.refuse_other_run(folder)
        settings = decide(options, found.settings)
        runtime = choose_runtime(settings.device, settings.backend, settings.dtype)
        stack.enter_context(deterministic((found.settings or {}).get("threads")))
        stack.enter_context(values_vouched_for())
        corpus = load_corpus(settings.data)
        check_data(corpus, settings, found.settings)
        split = split_corpus(corpus, settings.context)
        windows_WT = validation_windows(corpus, split, count=settings.eval_windows, context=settings.context)
        model, config = _build(settings, runtime)
        record = records(settings.cuda_graph, runtime, vote_rule=model.config.vote_rule)
        if found.checkpoint is not None:
            check_fits(found.checkpoint, config, model)
            model.load_state(found.checkpoint.state)
        if folder is not None and not options.resume:  # created only now that nothing can be refused any more
            stack.enter_context(run_folder.owned(folder))
            run_folder.refuse_other_run(folder)
            found.store = CheckpointFolder(folder)
        settings = replace(
            settings,
            device=runtime.device,
            backend=runtime.backend,
            dtype=str(runtime.dtype).removeprefix("torch."),
        )
        recorded = {
            **settings.as_json(),
            "data_bytes": corpus.data_N.numel(),
            "data_sha256": corpus.sha256,
            "threads": torch.get_num_threads(),
        }
        if folder is not None:
            document = {"model": config, "run": recorded, "versions": versions()}
            run_folder.write_json(folder / run_folder.CONFIG, document)
        checkpoint = found.checkpoint
        start = checkpoint.step if checkpoint is not None else 0
        monitor = Monitor(folder, steps=settings.steps, start_step=start, console=console)
        stack.callback(monitor.close)
        for warning in found.warnings:
            monitor.warn(warning)
        if found.note:
            monitor.say(found.note)
        run = _Run(
            settings=settings,
            runtime=runtime,
            model=model,
            passes=RecordedPasses(model) if record else Passes(model),
            corpus=corpus,
            split=split,
            windows_WT=windows_WT,
            baselines=baseline_bpb(corpus, split.train, windows_WT),
            census=Census(model),
            monitor=monitor,
            request=request,
            folder=folder,
            store=found.store if options.save else None,
            metadata={"config": config, "seed": settings.seed, "run": recorded},
            clock=time.monotonic(),
        )
        if checkpoint is not None:
            run.step = checkpoint.step
            run.best_bpb = checkpoint.best_bpb
            run.progress = Progress(**checkpoint.progress)
        try:
            _steps(run)
        except (Stopped, TrainingError):
            # What ended the run says more than why its report can't be had, whatever that is.
            with suppress(Exception):
                run.count_time()
                _report(run)
            raise
        return _finish(run)


def _build(settings: Settings, runtime: Runtime) -> tuple[ArbModel, dict[str, Any]]:
    from arbitor.reference.graph import ArbModel

    config = settings.model_config()
    model = ArbModel(
        config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=settings.seed
    )
    return model, json.loads(config.to_json())


def _steps(run: _Run) -> None:
    """Take every step that is left."""
    settings = run.settings
    if run.step == 0:
        _validate(run)
        run.monitor.log(0, {"val_bpb": run.val_bpb})
        run.save_latest()  # so that there is a previous one from the first save on, and a full disk shows at once
    logged_at, logged_step = time.monotonic(), run.step
    while run.step < settings.steps:
        _stop_if_asked(run)
        now_logging = (run.step + 1) % settings.log_interval == 0 or run.step + 1 == settings.steps
        counted = _step(run, measured=now_logging)
        run.step += 1
        run.monitor.advance(run.step)
        now_validating = run.step % settings.eval_interval == 0 or run.step == settings.steps
        values: dict[str, Any] = {}
        if counted is not None:
            seconds = time.monotonic() - logged_at
            taken = (run.step - logged_step) * settings.accum * settings.batch * settings.context
            values = {
                "train_bpb": run.progress.nats / run.progress.losses / NATS_PER_BIT
                if run.progress.losses
                else None,
                "rate": run.rate(run.step - 1),
                "flip_rate": counted.pop("flip_rate"),
                "tokens_per_second": taken / seconds if seconds > 0 else None,
                "seconds": run.progress.seconds + time.monotonic() - run.clock,
                "skipped": run.progress.skipped,
                "faulty_rows": run.faulty_rows(),
            }
            run.progress.nats, run.progress.losses = 0.0, 0
        if now_validating:
            _validate(run)
            values["val_bpb"] = run.val_bpb
        if values:
            run.monitor.log(run.step, {**values, **(counted or {})})
        if now_logging:
            logged_at, logged_step = time.monotonic(), run.step
        if run.step % settings.save_interval == 0 or run.step == settings.steps:
            run.save_latest()


def _step(run: _Run, *, measured: bool) -> dict[str, Any] | None:
    """Take one step: a vote from every micro-batch, then the step rule. Returns the census of it, if asked for."""
    settings, progress = run.settings, run.progress
    step_rate = run.rate(run.step)
    for micro_step in range(run.step * settings.accum, (run.step + 1) * settings.accum):
        ids_BT = training_batch(
            run.corpus,
            run.split,
            batch=settings.batch,
            context=settings.context,
            seed=settings.seed,
            micro_step=micro_step,
        )
        nats = run.passes.take(ids_BT, rate=step_rate, step=micro_step)
        if nats is not None:
            progress.nats += nats
            progress.losses += 1
            progress.skipped_in_a_row = 0
            continue
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped == 1:
            run.monitor.warn(f"step {run.step + 1}: the loss is not finite, so this micro-batch is skipped")
        if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the loss was not finite in {MAX_SKIPPED_IN_A_ROW} micro-batches in a row, up to step "
                f"{run.step + 1}; they changed nothing, and the run stops here"
            )
    if not measured:
        run.model.step()
        return None
    run.census.before_step()
    run.model.step()
    return run.census.after_step()


def _validate(run: _Run) -> None:
    """Measure the model, and keep it where it is the best so far."""
    run.val_bpb = validation_bpb(
        run.model, run.windows_WT, batch=run.settings.batch, device=run.runtime.device
    )
    better = run.val_bpb is not None and (run.best_bpb is None or run.val_bpb < run.best_bpb)
    if better and run.step > 0:
        run.best_bpb = run.val_bpb
        if run.store is not None and run.folder is not None:
            path = run.folder / BEST
            save_checkpoint(path, run.model.state(), **run.checkpoint_metadata())


def _stop_if_asked(run: _Run) -> None:
    if run.request.signal_number is None:
        return
    name = signal.Signals(run.request.signal_number).name
    done = f"stopped by {name} after step {run.step} of {run.settings.steps}"
    if run.store is None:
        raise Stopped(run.request.signal_number, f"{done}; nothing was saved")
    run.save_latest()
    raise Stopped(run.request.signal_number, f"{done}; the checkpoint is written, go on with --resume")


def _report(run: _Run) -> None:
    """Draw the page of a run that has lines of metrics, as far as it has come."""
    metrics = read_metrics(run.folder / METRICS) if run.folder is not None else []
    if run.folder is None or not metrics:
        return
    settings, made_of = run.settings, audit(run.model.config)
    tokens = run.step * settings.accum * settings.batch * settings.context
    facts = {
        "preset": settings.preset,
        "weights": f"{made_of.weights:,}",
        "state": f"{made_of.canonical_bytes:,} bytes",
        "tables": f"{sum(table.bytes for table in made_of.tables):,} bytes",
        "steps": f"{run.step:,} of {settings.steps:,}",
        "tokens": f"{tokens:,} bytes read",
        "time": f"{run.progress.seconds:,.0f} s",
        "validation": "not measured" if run.val_bpb is None else f"{run.val_bpb:.4f} bpb",
        "best": "not measured" if run.best_bpb is None else f"{run.best_bpb:.4f} bpb",
        "seed": f"{settings.seed}",
        "data": f"{Path(settings.data).name} ({run.corpus.data_N.numel():,} bytes)",
        "device": f"{settings.device}, {settings.backend}, {settings.dtype}",
    }
    if run.saved is not None and run.saved[0] == run.step:
        facts["state_sha256"] = run.saved[1]
    write_report(
        run.folder / REPORT,
        metrics,
        facts,
        baselines=run.baselines,
        steps=settings.steps,
        planned_rate=run.rate,
    )


def _finish(run: _Run) -> TrainResult:
    """Write what remains of a run: the final checkpoint, summary, plots and sample."""
    settings, runtime = run.settings, run.runtime
    if run.val_bpb is None:
        _validate(run)
    state = run.model.state()
    metadata = run.checkpoint_metadata()
    if run.store is not None and run.folder is not None:
        save_checkpoint(run.folder / FINAL, state, **metadata)
    digest = state_sha256(state)
    run.saved = run.step, digest
    summary = {
        "preset": settings.preset,
        "weights": audit(run.model.config).weights,
        "val_bpb": run.val_bpb,
        "best_bpb": run.best_bpb,
        "baselines": dict(run.baselines),
        "steps": run.step,
        "seconds": round(run.progress.seconds, 3),
        "state_sha256": digest,
        "skipped": run.progress.skipped,
        "faulty_rows": run.faulty_rows(),
        "recorded_passes": isinstance(run.passes, RecordedPasses),
        **{name: value for name, value in run.metadata["run"].items() if name not in ("preset", "steps")},
        "device_name": device_name(runtime),
        "versions": versions(),
    }
    prompt = bytes(run.windows_WT[0, :SAMPLE_PROMPT_BYTES].tolist())
    sample = generate(
        run.model,
        prompt,
        trainer_defaults(run.model.config.name).sample_bytes,
        temperature=SAMPLE_TEMPERATURE,
        seed=settings.seed,
        context=settings.context,
        cuda_graph=isinstance(run.passes, RecordedPasses),
    )
    if run.folder is not None:
        run_folder.write_file(run.folder / run_folder.SAMPLE, prompt + sample)
        run_folder.write_json(run.folder / run_folder.SUMMARY, summary)
        plot_loss(run.folder / LOSS_PLOT, read_metrics(run.folder / METRICS), run.baselines)
        _report(run)
    run.monitor.close()
    return TrainResult(summary=summary, prompt=prompt, sample=sample, folder=run.folder)
