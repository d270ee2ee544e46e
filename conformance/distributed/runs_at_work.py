"""What ranks find out of whole runs of the trainer. See `ranks_at_work`."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arbitor.optimized.distributed import run
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from conformance.distributed.at_work import BATCH, Place, gone_on, refused
from conformance.training.runs import train_until_killed


def refuses_ranks_that_differ(world: World, folder: Path) -> Any:
    """Other data, another seed, another batch than can be shared: every rank raises the same sentence, and writes nothing."""
    text, other = folder / "text.txt", folder / "other.txt"
    options = TrainOptions(
        preset="nano", data=str(text), device=Place.device, run=folder / "refused", steps=2, batch=BATCH
    )
    is_last = world.number == world.count - 1
    found = {}
    for name, changes in {
        "data": {"data": str(other if is_last else text)},
        "seed": {"seed": int(is_last)},
        "config": {"preset": "whole" if is_last else "nano"},
        "exchange": {"exchange": "mxint8" if is_last else "full"},
        "code_sha256": {},
        "batch": {"batch": 5 * world.count + 1},
        # What ranks exchange over NCCL can be recorded.
        **({} if world.exchanges_over_nccl else {"cuda_graph": {"cuda_graph": True}}),
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "code_sha256" and is_last:
                patch.setattr(run, "code_sha256", lambda: "another")
            found[name] = refused(replace(options, **changes))  # type: ignore[type-var]
    found["folder"] = str((folder / "refused").exists())
    return found


def trains(world: World, folder: Path) -> Any:
    """Two runs of one seed; the second prints. Then a run that is left unfinished, for one process to go on with."""
    text, shown = folder / "text.txt", io.StringIO()
    options = TrainOptions(
        preset="nano", data=str(text), device=Place.device, steps=6, batch=BATCH, log_interval=2
    )
    first = train(replace(options, save=False)).summary  # type: ignore[type-var]
    second = train(replace(options, run=folder / "run"), console=Console(file=shown)).summary  # type: ignore[type-var]
    train_until_killed(4, replace(options, run=folder / "unfinished", save_interval=3))
    return {
        "hashes": [first["state_sha256"], second["state_sha256"]],
        "val_bpb": second["val_bpb"],
        "shown": shown.getvalue(),
        "written": (folder / "run").exists(),
    }


def goes_on_with_a_run_of_four(world: World, folder: Path) -> Any:
    """A run that four ranks began, which mapped its data."""
    return gone_on(folder / "four")


def goes_on_with_a_run_of_one(world: World, folder: Path) -> Any:
    return gone_on(folder / "alone")


def goes_on(world: World, folder: Path) -> Any:
    """The run that was killed and stopped is taken to its end, beside one that nothing happened to."""
    survivor = folder / "survivor"
    settings = json.loads((survivor / "config.json").read_text())["run"]
    asked = {name: settings[name] for name in ("preset", "data", "device", "steps", "batch")}
    whole = train(TrainOptions(save=False, **asked)).summary
    resumed = train(TrainOptions(run=survivor, resume=True)).summary
    return [whole["state_sha256"], resumed["state_sha256"]]
