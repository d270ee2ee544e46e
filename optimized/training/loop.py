"""The trainer: from bytes to a run folder.

A run is a pure function of its settings. The batches, the dither and the rate of a step depend only on the
seed and the step, so a run that was killed and resumed ends with the same weights as one that never was.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arbitor.optimized.distributed.run import (
    check_agreement,
    faults,
    measured,
    train_together,
    whole_state,
)
from arbitor.optimized.distributed.world import World, joined
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.adaptation import open_adaptation
from arbitor.optimized.training.adapter_files import write_adapter
from arbitor.optimized.training.baselines import baseline_bpb
from arbitor.optimized.training.beginning import Beginning, begin_with
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.checkpoint import Checkpoint, adapter_sha256, check_fits, state_sha256
from arbitor.optimized.training.data import (
    check_same_data,
    check_same_split,
    check_same_validation,
    load_corpus,
    split_apart,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT, validation_bpb
from arbitor.optimized.training.facts import REPORT_LINES, RunFacts
from arbitor.optimized.training.generate import generate
from arbitor.optimized.training.media_mix import open_mix
from arbitor.optimized.training.metrics import thinned_metrics
from arbitor.optimized.training.monitor import Monitor
from arbitor.optimized.training.options import Settings, TrainOptions
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.plan import decide, run_config
from arbitor.optimized.training.recording import records
from arbitor.optimized.training.report import plot_loss, write_report
from arbitor.optimized.training.run_folder import Found, Progress, RunFolder
from arbitor.optimized.training.runtime import (
    Runtime,
    Stopped,
    StopRequest,
    choose_runtime,
    deterministic,
    device_name,
    versions,
)
from arbitor.optimized.training.schedule import gain_of, rate
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.sizes import check_memory
from arbitor.optimized.training.whole_file import told
from arbitor.reference.audit import audit
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.adapters import stacks_of

if TYPE_CHECKING:
    from rich.console import Console

MAX_SKIPPED_IN_A_ROW = 100
"""Micro-batches without a finite loss after which a run gives up."""

SAMPLE_PROMPT_BYTES = 48
"""How many of the validation bytes the sample at the end continues."""

SAMPLE_TEMPERATURE = 0.8
"""Temperature of the sample at the end."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        summary: what ``summary.json`` holds. Of several ranks only rank 0 has the ``state_sha256``, and a sample.
        prompt, sample: bytes that the finished model was given, and what it added.
        folder: the run folder, or None where nothing was written.
    """

    summary: dict[str, Any]
    prompt: bytes
    sample: bytes
    folder: Path | None


def train(options: TrainOptions, *, console: Console | None = None) -> TrainResult:
    """Train a model, or go on with a run, and write its folder.

    SIGINT, SIGTERM and SIGHUP end the run between two steps, with a checkpoint.

    Args:
        options: what to do.
        console: where to report, or None for silence.

    Returns:
        The summary and a sample of the finished model.

    Raises:
        TrainingError: anything the user can act on: data, folder, checkpoint, device, disk, a loss that stays
            not finite.
        Stopped: a signal asked for it.
        TypeError, ValueError: a setting is out of range, or nothing would read it.
    """
    with opened(options, console) as run:
        run.take_steps()
        return run.finish()


@contextmanager
def opened(options: TrainOptions, console: Console | None) -> Iterator[Run]:
    """Open a run until the end of the block: new, or where its folder says that it has come.

    A folder is created only when nothing can be refused any more.

    Args:
        options, console: as for `train`.

    Raises:
        TrainingError, ValueError: as `train`.
    """
    if options.resume and options.run is None:
        raise ValueError("run is not set, but must name the folder of the run to resume")
    if options.run is not None and not os.fspath(options.run):
        raise ValueError("run is '', but must name a folder")
    with ExitStack() as stack:
        world = stack.enter_context(joined())
        console = console if world.is_first else None
        # torchrun says itself what it was sent, and sends SIGTERM to what is left of ranks.
        announced = console is not None and world.count == 1
        request = stack.enter_context(StopRequest(announced=announced).listening())
        options = _after_restart(options, world)
        folder = _folder(options) if world.is_first or options.run is not None else None
        found = Found()
        if folder is not None and options.resume:
            folder.refuse_no_run()
            if world.is_first:
                stack.enter_context(folder.owned())
            found = folder.find()
        elif folder is not None:
            folder.refuse_other_run()
        settings = decide(options, found.settings, found.model)
        if found.checkpoint is not None and settings.steps > found.checkpoint.run["steps"]:
            found = replace(found, note=_longer(found.checkpoint, settings.steps))
        runtime = choose_runtime(settings.device, settings.backend, settings.dtype)
        world.take_device(runtime.device)
        stack.enter_context(deterministic((found.settings or {}).get("threads")))
        stack.enter_context(values_vouched_for())
        run = Run(settings, runtime, found, request, world, None if folder is None else folder.path)
        request.stop_before("its first step; nothing was written")
        # Rank 0 alone writes.
        folder = folder if world.is_first else None
        if folder is not None and not options.resume:
            stack.enter_context(folder.owned())
            folder.refuse_other_run()
        run.begin(folder, saves=options.save, console=console)
        stack.callback(run.monitor.close)
        yield run


def _longer(checkpoint: Checkpoint, steps: int) -> str:
    """Return what happens to a run that is given more steps."""
    before = checkpoint.run["steps"]
    return (
        f"going on at step {checkpoint.step:,} of {before:,} with {steps:,} steps in all: from here on the rate is that of a run "
        f"of {steps:,}"
    )


def _after_restart(options: TrainOptions, world: World) -> TrainOptions:
    """Return the options of ranks that torchrun has started again: they go on with the run that they had begun."""
    if world.restarts == 0 or options.run is None or not RunFolder(Path(options.run)).has_run():
        return options
    return replace(options, resume=True)  # type: ignore[type-var]


def _folder(options: TrainOptions) -> RunFolder | None:
    """Return the folder of a run, which may not be there yet, or None where nothing is written."""
    if options.run is not None:
        return RunFolder(Path(options.run))
    name = options.preset or (options.init_from or "tiny").rstrip("/")
    return RunFolder.new(Path(name).stem) if options.save else None


def _ranks(count: int) -> str:
    """Return a number of ranks in words."""
    return f"{count} rank{'' if count == 1 else 's'}"


class Run:
    """A run under way: what its steps work with, and how far it has come.

    Attributes:
        settings: of the run, the runtime's choices among them.
        model: what learns.
        step: steps taken.
        val_bpb: bits per byte of the newest validation of this process, or None.
        best_bpb: the lowest of all validations after step 0, or None.
        progress: counters.
        saved: step and ``state_sha256`` of the newest checkpoint of this process, or None.
    """

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        found: Found,
        request: StopRequest,
        world: World,
        folder: Path | None,
    ) -> None:
        """Read the data and build the model, or load it. Nothing is written.

        Args:
            settings: of the run, decided.
            runtime: where it runs, as the settings say.
            found: what to go on from.
            request: to stop.
            world: the processes that the run is made of.
            folder: of the run, which is no part of its data; or None where nothing is written.

        Raises:
            TrainingError, ValueError: as `train`.
        """
        self.settings = replace(
            settings,
            device=runtime.device,
            backend=runtime.backend,
            dtype=str(runtime.dtype).removeprefix("torch."),
        )
        self.runtime = runtime
        self.request = request
        self.world = world
        self.found = found
        world.check_batch(settings.batch)

        self.corpus = load_corpus(settings.data, folder)
        check_same_data(self.corpus, found.settings)
        self.judge = self.corpus
        if settings.val_data is None:
            self.split = split_corpus(self.corpus, settings.context)
        else:
            self.judge = load_corpus(settings.val_data, folder)
            check_same_validation(self.judge, found.settings)
            self.split = split_apart(self.corpus, self.judge, settings.context)
        check_same_split(self.corpus, self.split, settings.context, found.settings)
        self.windows_WT = validation_windows(
            self.judge, self.split, count=settings.eval_windows, context=settings.context
        )
        self.baselines = baseline_bpb(self.corpus, self.split.train, self.windows_WT)

        config, lost = run_config(settings, found.model)
        self.warnings = (*found.warnings, *lost)
        check_memory(config, runtime.device)
        self.config = json.loads(config.to_json())
        self.mix = open_mix(
            settings,
            config,
            runtime,
            corpus=self.corpus,
            split=self.split,
            run=folder,
            recorded=found.settings,
        )
        if self.mix is not None and world.count > 1:
            raise TrainingError(f"{world.count} ranks were started, but a mix with media is trained by one")
        self.model = ArbModel(
            config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=settings.seed
        )
        self.step = 0
        self.val_bpb: float | None = None
        self.best_bpb: float | None = None
        self.progress = Progress()
        self.saved: tuple[int, str] | None = None
        self.recorded = (
            self.mix is None
            and settings.lora_rank is None
            and records(settings.cuda_graph, runtime, vote_rule=config.vote_rule, num_ranks=world.count)
        )
        if found.checkpoint is not None:
            check_fits(found.checkpoint, self.config, self.model)
            self.model.load_state(found.checkpoint.state)
            self.step = found.checkpoint.step
            self.best_bpb = found.checkpoint.best_bpb
            self.progress = Progress(**found.checkpoint.progress)
        self.beginning: Beginning | None = None
        if settings.init_from is not None and found.checkpoint is None:
            is_base = settings.lora_rank is not None
            self.beginning = begin_with(self.model, settings.init_from, as_base=is_base)
            self.warnings += (*self.beginning.warnings, *self.beginning.losses())
        self.adaptation = open_adaptation(self.model, settings, found.checkpoint, num_ranks=world.count)
        self.passes = RecordedPasses(self.model) if self.recorded else Passes(self.model)
        self.census = Census(self.model)
        self.document = {
            **self.settings.as_json(),
            "data_bytes": self.corpus.data_N.numel(),
            "data_sha256": self.corpus.sha256,
            "validation_sha256": self.split.validation_sha256(),
            "threads": torch.get_num_threads(),
            **({} if self.mix is None else self.mix.document()),
            "ranks": world.count,
        }
        if settings.val_data is not None:
            self.document["val_data_sha256"] = self.judge.sha256
        if settings.init_from is not None:
            self._check_same_beginning()
        checkpoint = None if found.checkpoint is None else found.checkpoint.state_sha256
        check_agreement(world, config=self.config, document=self.document, checkpoint=checkpoint)
        train_together(self.model, world)

    def _check_same_beginning(self) -> None:
        """Record which weights the run began with; a run that starts again at step 0 begins with the same."""
        before = (self.found.settings or {}).get("init_sha256")
        now = before if self.beginning is None else self.beginning.state_sha256
        if before not in (None, now):
            raise TrainingError(
                f"the run was started with the weights of {self.settings.init_from!r} of state {str(before)[:12]}... and cannot "
                f"begin with {str(now)[:12]}..., which are there now"
            )
        self.document["init_sha256"] = now

    def begin(self, folder: RunFolder | None, *, saves: bool, console: Console | None) -> None:
        """Write how the run is started, and begin to report.

        Args:
            folder: of the run, created and owned; or None to write nothing.
            saves: whether checkpoints are written to it.
            console: as for `train`.

        Raises:
            TrainingError: a file cannot be written.
        """
        self.folder = folder
        self.saves = saves
        self.store = folder if saves else None
        self.clock = time.monotonic()
        if self.found.checkpoint is not None and self.settings.steps > self.found.checkpoint.run["steps"]:
            # The checkpoint says how many steps a run has: from here on it has more, also if it is killed before the next save.
            self._save_latest()
        if folder is not None:
            began = self.found.beginning if self.beginning is None else asdict(self.beginning)
            folder.write_config(
                {
                    "model": self.config,
                    "run": self.document,
                    "versions": versions(),
                    "baselines": dict(self.baselines),
                    **({} if began is None else {"beginning": began}),
                }
            )
        self.monitor = Monitor(folder, steps=self.settings.steps, start_step=self.step, console=console)
        for warning in self.warnings:
            self.monitor.warn(warning)
        if self.found.note:
            self.monitor.say(self.found.note)
        ranks_before = (self.found.settings or self.document).get("ranks", 1)
        if ranks_before != self.world.count:
            self.monitor.say(
                f"the run had {_ranks(ranks_before)} and goes on with {_ranks(self.world.count)}: from here on gradients are "
                "summed in another order, so its state is not that of a run that keeps its ranks"
            )
        for sentence in self._first_lines():
            self.monitor.say(sentence)
        if self.mix is not None:
            self.mix.begin(self.monitor.warn)
        self.clock = time.monotonic()

    def _first_lines(self) -> list[str]:
        """Return what is trained, on what bytes, how long and where."""
        settings, threads = self.settings, self.document["threads"]
        windows = settings.batch * settings.accum
        total = settings.steps * windows * settings.context
        judge = self.split.description()
        if settings.val_data is not None:
            judge = f"{shown(settings.val_data)}: {self.judge.description()}"
        return [
            f"model: {shown(settings.preset)}, {audit(self.model.config).weights:,} ternary weights",
            *([] if self.beginning is None else [self.beginning.description()]),
            *([] if self.adaptation is None else [self.adaptation.description()]),
            f"data: {shown(settings.data)}: {self.corpus.description()}",
            f"validation: {judge}; judged on {self.windows_WT.shape[0]:,} windows of {settings.context:,}",
            *([] if self.mix is None else self.mix.first_lines()),
            f"steps: {settings.steps:,} of {windows:,} windows of {settings.context:,} bytes: {total:,} bytes, "
            f"{total / self.split.train.num_bytes():,.2f} times what is there to learn from",
            f"device: {settings.device}, {settings.backend}, {settings.dtype}, {threads} CPU thread{'' if threads == 1 else 's'}",
            *self._lines_of_ranks(),
        ]

    def _lines_of_ranks(self) -> list[str]:
        """Return how the windows are shared; nothing for a process that is alone."""
        count, batch = self.world.count, self.settings.batch
        return (
            [] if count == 1 else [f"{_ranks(count)}: each reads {batch // count:,} windows of a micro-batch"]
        )

    def take_steps(self) -> None:
        """Take every step that is left.

        Raises:
            Stopped, TrainingError: as `train`; the page of the run shows how far it has come.
        """
        try:
            self._take_steps()
        except (Stopped, TrainingError) as error:
            # Who sends SIGTERM does not wait for long.
            if isinstance(error, Stopped) and error.signal_number != signal.SIGINT:
                raise
            # What ended the run says more than why its report can't be had, whatever that is.
            with suppress(Exception):
                self._count_time()
                self._report()
            raise

    def finish(self) -> TrainResult:
        """Write what remains of a run: the final checkpoint, sample, summary and pictures.

        Raises:
            TrainingError: a file cannot be written.
        """
        if self.val_bpb is None:
            self._validate()
        state = whole_state(self.model)
        metadata = self._checkpoint_metadata()
        digest = ""
        if state is not None:
            if self.store is not None:
                self.store.save_final(state, **metadata)
            digest = state_sha256(state)
            self.saved = self.step, digest
        self._write_adapter()
        summary = self._summary(digest)
        prompt = bytes(self.windows_WT[0, :SAMPLE_PROMPT_BYTES].tolist())
        sample = generate(
            self.model,
            prompt,
            self.settings.sample_bytes if self.world.is_first else 0,
            temperature=SAMPLE_TEMPERATURE,
            seed=self.settings.seed,
            context=self.settings.context,
            cuda_graph=self.recorded,
        )
        if self.folder is not None:
            self.folder.write_sample(prompt + sample)
            self.folder.write_summary(summary)
            plot_loss(self.folder.loss_plot, self._metrics(), self.baselines)
            self._report()
        self.monitor.close()
        path = None if self.folder is None else self.folder.path
        return TrainResult(summary=summary, prompt=prompt, sample=sample, folder=path)

    def _take_steps(self) -> None:
        settings, progress = self.settings, self.progress
        if self.step == 0:
            # There is a previous one then from the first save on, and a full disk shows at once. It is there before a best one
            # is, so that whoever resumes finds it.
            self._save_latest()
            self._validate()
            self.monitor.log(0, {"val_bpb": self.val_bpb, **self._media_metrics(validated=True)})
        logged_at, logged_step = time.monotonic(), self.step
        while self.step < settings.steps:
            self._stop_if_asked()
            now_logging = (self.step + 1) % settings.log_interval == 0 or self.step + 1 == settings.steps
            counted = self._take_step(measured=now_logging)
            self.step += 1
            self.monitor.advance(self.step)
            now_validating = self.step % settings.eval_interval == 0 or self.step == settings.steps
            values: dict[str, Any] = {}
            if counted is not None:
                seconds = time.monotonic() - logged_at
                taken = (self.step - logged_step) * settings.accum * settings.batch * settings.context
                if self.mix is not None:
                    taken, self.mix.ids_taken = self.mix.ids_taken, 0
                values = {
                    "train_bpb": progress.nats / progress.losses / NATS_PER_BIT if progress.losses else None,
                    "rate": self._rate(self.step - 1),
                    **({"flip_rate": counted.pop("flip_rate")} if "flip_rate" in counted else {}),
                    "tokens_per_second": taken / seconds if seconds > 0 else None,
                    "seconds": progress.seconds + time.monotonic() - self.clock,
                    "skipped": progress.skipped,
                    "faulty_rows": self._faulty_rows(),
                    **measured(self.model, steps=self.step - logged_step, seconds=seconds),
                }
                progress.nats, progress.losses = 0.0, 0
            if now_validating:
                self._validate()
                values["val_bpb"] = self.val_bpb
            if values:
                values.update(self._media_metrics(validated=now_validating))
                self.monitor.log(self.step, {**values, **(counted or {})})
            if now_logging:
                logged_at, logged_step = time.monotonic(), self.step
            if self.step % settings.save_interval == 0 or self.step == settings.steps:
                self._save_latest()

    def _take_step(self, *, measured: bool) -> dict[str, Any] | None:
        """Take one step: votes from every micro-batch, then the step rule. Return the census of it, if asked for."""
        settings, progress = self.settings, self.progress
        step_rate, finite = self._rate(self.step), 0
        for micro_step in range(self.step * settings.accum, (self.step + 1) * settings.accum):
            nats = self._take_pass(step_rate, micro_step)
            if nats is not None:
                finite += 1
                progress.nats += nats
                progress.losses += 1
                progress.skipped_in_a_row = 0
                continue
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if progress.skipped == 1:
                self.monitor.warn(
                    f"step {self.step + 1}: the loss is not finite, so this micro-batch is skipped"
                )
            if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"the loss was not finite in {MAX_SKIPPED_IN_A_ROW} micro-batches in a row, up to step "
                    f"{self.step + 1}; they changed nothing, and the run stops here"
                )
        if self.adaptation is not None:
            taken = self.adaptation.step(self.step, losses=finite)
            return self.adaptation.metrics(taken) if measured else None
        if not measured:
            self.model.step()
            return None
        self.census.before_step()
        self.model.step()
        return self.census.after_step()

    def _take_pass(self, step_rate: float, micro_step: int) -> float | None:
        """Run the pass of a micro-batch; see `Passes.take`."""
        settings = self.settings
        if self.mix is not None:
            return self.mix.take(self.model, rate=step_rate, micro_step=micro_step)
        ids_BT = training_batch(
            self.corpus,
            self.split,
            batch=settings.batch,
            context=settings.context,
            seed=settings.seed,
            micro_step=micro_step,
        )
        return self.passes.take(self.world.share(ids_BT), rate=step_rate, step=micro_step)

    def _media_metrics(self, *, validated: bool) -> dict[str, Any]:
        """Return the group of metrics of a mix, or nothing for a run of one text."""
        return {} if self.mix is None else {"media": self.mix.metrics(validated=validated)}

    def _validate(self) -> None:
        """Measure the model, and keep it where it is the best so far. A model that nobody trained is no candidate."""
        if self.mix is not None:
            self.val_bpb = self.mix.validate(self.model, self.windows_WT)
        else:
            self.val_bpb = validation_bpb(
                self.model, self.windows_WT, batch=self.settings.batch, device=self.runtime.device
            )
        better = self.val_bpb is not None and (self.best_bpb is None or self.val_bpb < self.best_bpb)
        if better and (self.step > 0 or self.settings.init_from is not None):
            self.best_bpb = self.val_bpb
            self._save(RunFolder.save_best)

    def _save_latest(self) -> None:
        digest = self._save(RunFolder.save_latest)
        if digest is not None:
            self.saved = self.step, digest

    def _save(self, save: Callable[..., str]) -> str | None:
        """Save the state, which every rank brings together and rank 0 writes. Return its digest where it was written."""
        if not self.saves:
            return None
        state, metadata = whole_state(self.model), self._checkpoint_metadata()
        return None if self.store is None else save(self.store, state, **metadata)

    def _stop_if_asked(self) -> None:
        asked = self.world.signal(self.request.signal_number)
        if asked is None:
            return
        name = signal.Signals(asked).name
        done = f"stopped by {name} after step {self.step} of {self.settings.steps}"
        if not self.saves:
            raise Stopped(asked, f"{done}; nothing was saved")
        self._save_latest()
        raise Stopped(asked, f"{done}; the checkpoint is written, go on with --resume")

    def _rate(self, step: int) -> float:
        if self.adaptation is not None:
            return self.adaptation.rate(step)
        settings = self.settings
        theta = self.model.config.theta
        gain = gain_of(settings.rate, theta)
        return rate(step, settings.steps, theta=theta, gain=gain, accum=settings.accum)

    def _faulty_rows(self) -> int:
        return self.progress.faulty_rows + faults(self.model)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _checkpoint_metadata(self) -> dict[str, Any]:
        self._count_time()
        return {
            "config": self.config,
            "seed": self.settings.seed,
            "run": self.document,
            "step": self.step,
            "best_bpb": self.best_bpb,
            "progress": {**asdict(self.progress), "faulty_rows": self._faulty_rows()},
            **({} if self.adaptation is None else {"adapter": self.adaptation.state()}),
        }

    def _summary(self, digest: str) -> dict[str, Any]:
        """Return what ``summary.json`` holds, of a model with this ``state_sha256``."""
        return {
            "preset": self.settings.preset,
            "weights": audit(self.model.config).weights,
            "val_bpb": self.val_bpb,
            "best_bpb": self.best_bpb,
            "baselines": dict(self.baselines),
            "steps": self.step,
            "seconds": round(self.progress.seconds, 3),
            "state_sha256": digest,
            **(
                {} if self.adaptation is None else {"adapter_sha256": adapter_sha256(self.adaptation.state())}
            ),
            "skipped": self.progress.skipped,
            "faulty_rows": self._faulty_rows(),
            "recorded_passes": self.recorded,
            **({} if self.mix is None else {"media": self.mix.validated}),
            **{name: value for name, value in self.document.items() if name not in ("preset", "steps")},
            "device_name": device_name(self.runtime),
            "versions": versions(),
        }

    def _metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics so far, of many as many as a picture can show."""
        if self.folder is None:
            return []
        with told(f"the report: {str(self.folder.metrics)!r} cannot be read"):
            return thinned_metrics(self.folder.metrics, REPORT_LINES)

    def _write_adapter(self) -> None:
        """Write the adapters of the best model, or of the last where none is kept, in peft's format."""
        if self.adaptation is None or self.store is None or self.settings.init_from is None:
            return
        best = self.store.load_best(self.monitor.warn)
        assert best.adapter is not None
        write_adapter(
            self.store.adapter, best.adapter, base=self.settings.init_from, stacks=stacks_of(self.model)
        )

    def _report(self) -> None:
        """Draw the page of a run that has lines of metrics, as far as it has come."""
        metrics = self._metrics()
        if self.folder is None or not metrics:
            return
        facts = RunFacts(
            run=self.document,
            config=self.model.config,
            step=self.step,
            seconds=self.progress.seconds,
            val_bpb=self.val_bpb,
            best_bpb=self.best_bpb,
            baselines=self.baselines,
            state_sha256=self.saved[1] if self.saved is not None and self.saved[0] == self.step else None,
        )
        write_report(
            self.folder.report,
            metrics,
            facts.words(),
            baselines=facts.baselines,
            steps=self.settings.steps,
            planned_rate=facts.planned_rate(),
        )
