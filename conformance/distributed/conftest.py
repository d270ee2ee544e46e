"""What ranks found, which the files of tests share.

A process takes seconds to import torch. So torchrun is started three times for the whole suite, whatever number of workers runs it,
and each start serves many tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training.metrics import last_step
from conformance.distributed import adapters_at_work
from conformance.distributed.at_work import BATCH
from conformance.distributed.started import (
    KILLED_AT,
    SAVED_EVERY,
    SECONDS,
    STEPS,
    STOPPED_AT,
    Found,
    device_of_ranks,
    ended,
    once,
    ranks_of,
    succeeded,
    torchrun,
    wait_for_step,
)
from conformance.system.command import until
from conformance.training import nano
from conformance.training.runs import options, train_until_killed


@pytest.fixture(scope="session")
def everyones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of pytest-xdist see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def survivor(everyones: Path) -> dict[str, Any]:
    """What became of a run of two ranks, and the folder in which it is. See `survive`."""
    return once(everyones, "survivor", survive)


def survive(folder: Path) -> dict[str, Any]:
    """Begin a run of two ranks. Rank 1 is killed, torchrun starts both again, and SIGTERM stops them."""
    (folder / "text.txt").write_bytes(nano.TEXT)
    run = folder / "survivor"
    process = torchrun(
        2, "conformance.system.nano_arb", "no-pictures", "train", "--preset", "means", "--data", str(folder / "text.txt"),
        "--device", "cpu", "--steps", str(STEPS), "--batch", str(BATCH), "--log-interval", "1",
        "--save-interval", str(SAVED_EVERY), "--out", str(run), restarts=1,
    )  # fmt: skip
    wait_for_step(run, KILLED_AT, process)
    first = ranks_of(process)
    os.kill(first[1], signal.SIGKILL)
    until(
        lambda: set(ranks_of(process).values()).isdisjoint(first.values()), seconds=SECONDS[device_of_ranks()]
    )
    wait_for_step(run, STOPPED_AT, process)
    process.send_signal(signal.SIGTERM)
    _, out, err = ended(process)
    return {
        "folder": str(folder),
        "out": out,
        "err": err,
        "stopped_at": last_step(run / "metrics.jsonl"),
    }


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, everyones: Path) -> Found:
    """What each rank found, and the folder in which they worked, for a number of ranks. Two work where a run survived."""
    count = request.param
    survived = Path(request.getfixturevalue("survivor")["folder"]) if count == 2 else None
    place, ranks = once(everyones, f"ranks{count}", lambda folder: find(count, survived or folder))
    return Path(place), ranks


def find(count: int, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Let ranks work in a folder. Return it, and what each of them finds."""
    (folder / "text.txt").write_bytes(nano.TEXT)
    (folder / "other.txt").write_bytes(nano.TEXT + b"!")
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        if count == 2:
            begin_runs_of_one(folder)
    succeeded(torchrun(count, "conformance.distributed.ranks_at_work", str(folder), device_of_ranks()))
    return str(folder), [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


def begin_runs_of_one(folder: Path) -> None:
    """Let this process begin a run, and one of adapters over its model. Ranks go on with both."""
    alone = {"preset": "means", "steps": 6, "batch": BATCH, "save_interval": 3}
    train_until_killed(4, options(folder / "text.txt", folder / "alone", **alone))
    # The run itself goes on.
    shutil.copytree(folder / "alone", folder / "base")
    (folder / "base-again").symlink_to("base")
    begun = replace(adapters_at_work.finetune_options(folder), device="cpu", run=folder / "adapted-alone")  # type: ignore[type-var]
    train_until_killed(4, begun)
