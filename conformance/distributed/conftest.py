"""What ranks found, which the files of tests share.

A process takes seconds to import torch. So torchrun is started three times, and each start serves many tests.
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
    device_of_ranks,
    ended,
    ranks_of,
    succeeded,
    torchrun,
    wait_for_step,
)
from conformance.system.command import until
from conformance.training import nano
from conformance.training.runs import options, train_until_killed


@pytest.fixture(scope="session")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two ranks: rank 1 is killed, torchrun starts both again, and SIGTERM stops them."""
    folder = tmp_path_factory.mktemp("survivor")
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
        "folder": folder,
        "out": out,
        "err": err,
        "stopped_at": last_step(run / "metrics.jsonl"),
    }


@pytest.fixture(scope="session")
def already_found() -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    """What was found by numbers of ranks. Pytest ends a fixture of another parameter, and may come back to the first."""
    return {}


@pytest.fixture(scope="session")
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    already_found: dict[int, tuple[Path, list[dict[str, Any]]]],
) -> tuple[Path, list[dict[str, Any]]]:
    """What each rank found, and the folder in which they worked, for a number of ranks."""
    count = request.param
    if count not in already_found:
        already_found[count] = find(request, tmp_path_factory, count)
    return already_found[count]


def find(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, count: int
) -> tuple[Path, list[dict[str, Any]]]:
    """Let ranks work, and return the folder in which they do, and what each of them finds."""
    device = device_of_ranks()
    if count == 2:
        folder = request.getfixturevalue("survivor")["folder"]
    else:
        folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_bytes(nano.TEXT)
    (folder / "other.txt").write_bytes(nano.TEXT + b"!")
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        alone = {"preset": "means", "steps": 6, "batch": BATCH, "save_interval": 3}
        train_until_killed(4, options(folder / "text.txt", folder / "alone", **alone))
        # The run itself goes on.
        shutil.copytree(folder / "alone", folder / "base")
        (folder / "base-again").symlink_to("base")
        begun = replace(adapters_at_work.finetune_options(folder), device="cpu", run=folder / "adapted-alone")  # type: ignore[type-var]
        train_until_killed(4, begun)
    succeeded(torchrun(count, "conformance.distributed.ranks_at_work", str(folder), device))
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]
