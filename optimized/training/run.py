"""A run under way: it steps, validates, saves and reports. `loop.py` opens it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arbitor.optimized.distributed.run import begin_measuring, faults, measured, whole_state
from arbitor.optimized.training.adaptation import write_best
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT, validation_bpb
from arbitor.optimized.training.facts import REPORT_LINES, RunFacts
from arbitor.optimized.training.first_lines import first_lines
from arbitor.optimized.training.generate import generate
from arbitor.optimized.training.metrics import thinned_metrics
from arbitor.optimized.training.model_folder import MODEL_TYPE
from arbitor.optimized.training.monitor import Monitor
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.prepared import Prepared
from arbitor.optimized.training.report import draw_page, plot_loss
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.run_header import Progress
from arbitor.optimized.training.runtime import (
    Stopped,
    StopRequest,
    device_name,
    versions,
)
from arbitor.optimized.training.schedule import gain_of, rate
from arbitor.optimized.training.whole_file import told
from arbitor.reference.audit import audit

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
        is_of_first: whether it is that of rank 0, which alone prints.
    """

    summary: dict[str, Any]
    prompt: bytes
    sample: bytes
    folder: Path | None
    is_of_first: bool = True


class Run:
    """A run under way: it steps, validates, saves and reports.

    Attributes:
        prepared: what it steps with.
        settings, world, text, mix, model, adaptation: parts of it.
        step: steps taken.
        val_bpb: bits per byte of the newest validation of this process, or None. All ranks have the same.
        best_bpb: the lowest of all validations after step 0, or None.
        progress: counters.
        saved: step and ``state_sha256`` of the newest checkpoint of this process, or None.
    """

    def __init__(self, prepared: Prepared, request: StopRequest) -> None:
        """Begin where the newest checkpoint ends, or at step 0.

        Args:
            prepared: what to step with.
            request: to stop.
        """
        self.prepared = prepared
        self.request = request
        self.settings, self.world = prepared.settings, prepared.world
        self.text, self.mix, self.model = prepared.text, prepared.mix, prepared.model
        self.adaptation = prepared.adaptation
        self.step = 0
        self.val_bpb: float | None = None
        self.best_bpb: float | None = None
        self.progress = Progress()
        self.saved: tuple[int, str] | None = None
        checkpoint = prepared.found.checkpoint
        if checkpoint is not None:
            self.step = checkpoint.step
            self.best_bpb = checkpoint.best_bpb
            self.progress = Progress(**checkpoint.progress)
        kind = RecordedPasses if prepared.recorded else Passes
        self.passes = kind(self.model, accum=self.settings.summed)
        self.census = Census(self.model)
        self._ahead = prepared.ahead

    def begin(self, folder: RunFolder | None, *, saves: bool, console: Console | None) -> None:
        """Write how the run is started, and begin to report.

        Args:
            folder: of the run, created and owned; or None to write nothing.
            saves: whether checkpoints are written to it.
            console: as for `train`.

        Raises:
            TrainingError: a file cannot be written.
        """
        prepared = self.prepared
        self.folder = folder
        self.saves = saves
        self.store = folder if saves else None
        self.clock = time.monotonic()
        if prepared.is_longer():
            # The checkpoint says how many steps a run has: from here on it has more, also if it is killed before the next save.
            self._save_latest()
        if folder is not None:
            began = prepared.found.beginning if prepared.beginning is None else asdict(prepared.beginning)
            folder.write_config(
                {
                    "model_type": MODEL_TYPE,
                    "model": prepared.config,
                    "run": prepared.document,
                    "versions": versions(),
                    "baselines": dict(self.text.baselines),
                    **({} if began is None else {"beginning": began}),
                }
            )
        self.monitor = Monitor(folder, steps=self.settings.steps, start_step=self.step, console=console)
        for warning in prepared.warnings:
            self.monitor.warn(warning)
        for sentence in first_lines(prepared):
            self.monitor.say(sentence)
        if self.mix is not None:
            self.mix.begin(self.monitor.warn)
        self.clock = time.monotonic()

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
                self._draw_page(self._facts(), "the run ends here; its page is drawn")
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
        if self.adaptation is not None and self.store is not None:
            write_best(self.store, self.adaptation, str(self.settings.init_from), self.monitor.warn)
        summary = self._summary(digest)
        prompt = bytes(self.text.windows_WT[0, :SAMPLE_PROMPT_BYTES].tolist())
        sample = generate(
            self.model,
            prompt,
            # Ranks that keep rows for each other make the sample together.
            self.settings.sample_bytes if self.world.is_first or self.model.context.has_spread else 0,
            temperature=SAMPLE_TEMPERATURE,
            seed=self.settings.seed,
            context=self.settings.context,
            cuda_graph=self.prepared.recorded,
        )
        if self.folder is not None:
            self.monitor.say("all steps are taken; the pictures of the run are drawn")
            self.folder.write_sample(prompt + sample)
            self.folder.write_summary(summary)
            facts = self._facts()
            plot_loss(self.folder.loss_plot, facts.metrics, facts.baselines)
            self._draw_page(facts)
        self.monitor.close()
        path = None if self.folder is None else self.folder.path
        return TrainResult(
            summary=summary, prompt=prompt, sample=sample, folder=path, is_of_first=self.world.is_first
        )

    def _take_steps(self) -> None:
        settings = self.settings
        if self.step == 0:
            # There is a previous one then from the first save on, and a full disk shows at once. It is there before a best one
            # is, so that whoever resumes finds it.
            self._save_latest()
            self._validate()
            self.monitor.log(0, {"val_bpb": self.val_bpb, **self._media_metrics(validated=True)})
        logged_at, logged_step = time.monotonic(), self.step
        begin_measuring(self.model)
        while self.step < settings.steps:
            self._stop_if_asked()
            now_logging = (self.step + 1) % settings.log_interval == 0 or self.step + 1 == settings.steps
            counted = self._take_step(measured=now_logging)
            self.step += 1
            self.monitor.advance(self.step)
            self._say_compiled()
            now_validating = self.step % settings.eval_interval == 0 or self.step == settings.steps
            values: dict[str, Any] = {}
            if counted is not None:
                values = self._numbers(
                    counted.pop("flip_rate", None), time.monotonic() - logged_at, self.step - logged_step
                )
            if now_validating:
                self._validate()
                values["val_bpb"] = self.val_bpb
            if values:
                values.update(self._media_metrics(validated=now_validating))
                self.monitor.log(self.step, {**values, **(counted or {})})
            if now_logging:
                logged_at, logged_step = time.monotonic(), self.step
                begin_measuring(self.model)
            between = settings.save_interval > 0 and self.step % settings.save_interval == 0
            if between or self.step == settings.steps:
                self._save_latest()

    def _say_compiled(self) -> None:
        """Say once what was compiled ahead, when all of it is. No step waits for what it does not launch."""
        if self._ahead is None or not self._ahead.has_ended():
            return
        compiled, self._ahead = self._ahead.finish(), None
        if compiled is not None:
            self.monitor.say(compiled)

    def _numbers(self, flip_rate: float | None, seconds: float, steps: int) -> dict[str, Any]:
        """Return the numbers of a line of metrics: of the newest step, and of the steps since the line before.

        Args:
            flip_rate: of the newest step; None where no weight learns.
            seconds, steps: since the line before.
        """
        settings, progress = self.settings, self.progress
        taken = steps * settings.accum * settings.batch * settings.context
        if self.mix is not None:
            taken, self.mix.ids_taken = self.mix.ids_taken, 0
        train_bpb = progress.nats / progress.losses / NATS_PER_BIT if progress.losses else None
        progress.nats, progress.losses = 0.0, 0
        return {
            "train_bpb": train_bpb,
            "rate": self._rate(self.step - 1),
            **({} if flip_rate is None else {"flip_rate": flip_rate}),
            "tokens_per_second": taken / seconds if seconds > 0 else None,
            "seconds": progress.seconds + time.monotonic() - self.clock,
            "skipped": progress.skipped,
            "faulty_rows": self._faulty_rows(),
            **measured(self.model, steps=steps),
        }

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
            self.passes.step()
            return None
        self.census.before_step()
        self.passes.step()
        return self.census.after_step()

    def _take_pass(self, step_rate: float, micro_step: int) -> float | None:
        """Run the pass of a micro-batch; see `Passes.take`."""
        if self.mix is not None:
            with self.passes.unpacking():
                return self.mix.take(
                    self.model, rate=step_rate, micro_step=micro_step, accum=self.passes.accum
                )
        ids_BT = self.world.share(self.text.batch(micro_step))
        return self.passes.take(ids_BT, rate=step_rate, step=micro_step)

    def _media_metrics(self, *, validated: bool) -> dict[str, Any]:
        """Return the group of metrics of a mix, or nothing for a run of one text."""
        return {} if self.mix is None else {"media": self.mix.metrics(validated=validated)}

    def _validate(self) -> None:
        """Measure the model, and keep it where it is the best so far. A model that nobody trained is no candidate."""
        if self.mix is not None:
            self.val_bpb = self.mix.validate(self.model, self.text.windows_WT)
        else:
            self.val_bpb = validation_bpb(
                self.model, self.text.windows_WT, batch=self.settings.batch, device=self.settings.device
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
        votes = settings.accum if settings.accum_votes else 1
        return rate(step, settings.steps, theta=theta, gain=gain, votes=votes)

    def _faulty_rows(self) -> int:
        return self.progress.faulty_rows + faults(self.model)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _checkpoint_metadata(self) -> dict[str, Any]:
        self._count_time()
        if self.adaptation is not None and self.world.count > 1:
            # Each rank takes the steps of AdamW by itself, and machines of two kinds may round one in two ways.
            self.world.agree({"adapter_sha256": self.adaptation.sha256()})
        return {
            "config": self.prepared.config,
            "seed": self.settings.seed,
            "run": self.prepared.document,
            "step": self.step,
            "best_bpb": self.best_bpb,
            "progress": {**asdict(self.progress), "faulty_rows": self._faulty_rows()},
            **({} if self.adaptation is None else {"adapter": self.adaptation.state()}),
        }

    def _summary(self, digest: str) -> dict[str, Any]:
        """Return what ``summary.json`` holds, of a model with this ``state_sha256``."""
        document = self.prepared.document
        return {
            "preset": self.settings.preset,
            "weights": audit(self.model.config).weights,
            "val_bpb": self.val_bpb,
            "best_bpb": self.best_bpb,
            "baselines": dict(self.text.baselines),
            "steps": self.step,
            "seconds": round(self.progress.seconds, 3),
            "state_sha256": digest,
            **({} if self.adaptation is None else {"adapter_sha256": self.adaptation.sha256()}),
            "skipped": self.progress.skipped,
            "faulty_rows": self._faulty_rows(),
            "recorded_passes": self.prepared.recorded,
            **({} if self.mix is None else {"media": self.mix.validated}),
            **{name: value for name, value in document.items() if name not in ("preset", "steps")},
            "device_name": device_name(self.prepared.runtime),
            "versions": versions(),
        }

    def _facts(self) -> RunFacts:
        """Return what is known of the run, as far as it has come."""
        metrics: list[dict[str, Any]] = []
        if self.folder is not None:
            with told(f"the report: {str(self.folder.metrics)!r} cannot be read"):
                metrics = thinned_metrics(self.folder.metrics, REPORT_LINES)
        return RunFacts(
            run=self.prepared.document,
            config=self.model.config,
            step=self.step,
            seconds=self.progress.seconds,
            val_bpb=self.val_bpb,
            best_bpb=self.best_bpb,
            baselines=self.text.baselines,
            state_sha256=self.saved[1] if self.saved is not None and self.saved[0] == self.step else None,
            metrics=metrics,
        )

    def _draw_page(self, facts: RunFacts, sentence: str = "") -> None:
        """Draw the page of the run, if it has lines of metrics. Say the sentence before, as drawing takes seconds."""
        if self.folder is not None and facts.metrics:
            if sentence:
                self.monitor.say(sentence)
            draw_page(self.folder.report, facts)
