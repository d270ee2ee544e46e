"""The trainer: from bytes to a run folder.

A run is a pure function of its settings. The batches, the dither and the rate of a step depend only on the
seed and the step, so a run that was killed and resumed ends with the same weights as one that never was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arbitor.optimized.ahead.start import awaited
from arbitor.optimized.distributed.world import World, joined
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.plan import decide
from arbitor.optimized.training.prepared import Prepared, prepare
from arbitor.optimized.training.run import Run, TrainResult
from arbitor.optimized.training.run_folder import Found, RunFolder
from arbitor.optimized.training.runtime import (
    StopRequest,
    choose_runtime,
    deterministic,
)
from arbitor.optimized.training.setting import AUTO

if TYPE_CHECKING:
    from rich.console import Console


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

    A folder that is named is created only when nothing can be refused any more.

    Args:
        options, console: as for `train`.

    Raises:
        TrainingError, ValueError: as `train`.
    """
    if options.resume and options.run is None:
        raise ValueError("run is not set, but must name the folder of the run to resume")
    if options.reset and options.run is None:
        raise ValueError("reset is True, but does nothing without run, the folder of a run to begin anew")
    if options.reset and options.resume:
        raise ValueError("reset is True, but must be False with resume, which goes on with the run")
    if options.run is not None and not os.fspath(options.run):
        raise ValueError("run is '', but must name a folder")
    with ExitStack() as stack:
        world = stack.enter_context(joined())
        console = console if world.is_first else None
        # torchrun says itself what it was sent, and sends SIGTERM to what is left of ranks.
        announced = console is not None and world.count == 1
        request = stack.enter_context(StopRequest(announced=announced).listening())
        options = _after_restart(options, world)
        folder = _folder(options, world, stack)
        prepared = _prepared(options, folder, world, stack)
        stack.enter_context(awaited(prepared.ahead))
        run = Run(prepared, request)
        stack.callback(run.passes.close)
        request.stop_before("its first step; nothing was written")
        # Rank 0 alone writes.
        folder = folder if world.is_first else None
        if folder is not None and not options.resume:
            stack.enter_context(folder.owned())
            if options.reset:
                folder.reset()
            folder.refuse_other_run()
        run.begin(folder, saves=options.save, console=console)
        stack.callback(run.monitor.close)
        yield run


def _prepared(options: TrainOptions, folder: RunFolder | None, world: World, stack: ExitStack) -> Prepared:
    """Return what a run begins to step with. What holds until the run is closed is entered on the stack.

    What was found to go on from ends here, since its tensors are as large as the model.
    """
    found = Found()
    if folder is not None and options.resume:
        folder.refuse_no_run()
        if world.is_first:
            stack.enter_context(folder.owned())
        found = folder.find()
    elif folder is not None:
        folder.refuse_other_run(is_reset=options.reset)
    settings = decide(options, found.settings, found.model)
    runtime = choose_runtime(settings.device, settings.backend, settings.dtype)
    world.take_device(runtime.device)
    stack.enter_context(deterministic((found.settings or {}).get("threads")))
    stack.enter_context(values_vouched_for())
    return prepare(
        settings,
        runtime,
        world,
        found=found,
        folder=None if folder is None else folder.path,
        auto_batch=options.batch == AUTO and found.settings is None,
    )


def _after_restart(options: TrainOptions, world: World) -> TrainOptions:
    """Return the options of ranks that torchrun has started again: they go on with the run that they had begun.

    Raises:
        TrainingError: the folder holds a run, and nothing tells whether it is the one that was to be removed.
    """
    if world.restarts == 0 or options.run is None or not RunFolder(Path(options.run)).has_run():
        return options
    if options.reset:
        raise TrainingError(
            "the run was started again, and reset cannot tell its folder from that of the run before: go on with --resume, or "
            "reset it once more"
        )
    return replace(options, resume=True)  # type: ignore[type-var]


def _folder(options: TrainOptions, world: World, stack: ExitStack) -> RunFolder | None:
    """Return the folder of a run, or None where nothing is written. One that is named may not be there yet.

    One that is not named is made at once, so that no other process takes the name, and is removed if the run is refused.
    """
    if options.run is not None:
        return RunFolder(Path(options.run))
    if not (options.save and world.is_first):
        return None
    name = options.preset or (options.init_from or "tiny").rstrip("/")
    return stack.enter_context(RunFolder.new(Path(name).stem))
