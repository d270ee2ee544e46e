"""What a run folder saves survives a crash at any moment, and what is damaged falls back to what is good."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training.checkpoint import CheckpointError, load_checkpoint
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.whole_file import partial_of
from conformance.training.test_checkpoint import METADATA, trained_weights


class Crash(BaseException):
    """Stands for SIGKILL at a chosen moment: no handler of the code under test may run."""


@pytest.mark.parametrize("moment", range(1, 8))
def test_save_latest_crashed_at_any_moment_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """The third of three saves dies before its first, second, ... system call. Then the run resumes and saves again."""
    weights = trained_weights()
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.save_latest(weights, step=step, **METADATA)
    calls = 0
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def dying(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Crash
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, dying(name))
    crashed = False
    try:
        folder.save_latest(weights, step=3, **METADATA)
    except Crash:
        crashed = True
    monkeypatch.undo()
    # The file, two renames, and the folder after each.
    assert crashed == (moment <= 5)

    again = RunFolder(tmp_path)
    with again.owned():
        assert sorted(os.listdir(tmp_path)) in (
            ["latest.safetensors", "previous.safetensors"],
            ["previous.safetensors"],
        )
        checkpoint, refusals = again.load_newest()
        assert checkpoint is not None and not refusals
        assert checkpoint.step in (2, 3)
        again.save_latest(weights, step=4, **METADATA)
    assert load_checkpoint(tmp_path / "latest.safetensors").step == 4
    assert load_checkpoint(tmp_path / "previous.safetensors").step in (2, 3)


def test_load_newest_falls_back_and_the_next_save_keeps_what_is_good(tmp_path: Path) -> None:
    weights = trained_weights()
    folder = RunFolder(tmp_path)
    assert folder.load_newest() == (None, [])
    for step in (1, 2):
        folder.save_latest(weights, step=step, **METADATA)
    (tmp_path / "latest.safetensors").write_bytes(b"\0" * 100)
    again = RunFolder(tmp_path)
    checkpoint, refusals = again.load_newest()
    assert checkpoint is not None and checkpoint.step == 1
    assert len(refusals) == 1 and "latest.safetensors" in refusals[0]
    again.save_latest(weights, step=2, **METADATA)
    # Not the damaged one.
    assert load_checkpoint(tmp_path / "previous.safetensors").step == 1
    for name in ("latest", "previous"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"latest.*previous.*no checkpoint is left"):
        RunFolder(tmp_path).load_newest()


def test_load_newest_falls_back_from_a_header_that_its_caller_refuses(tmp_path: Path) -> None:
    folder, weights = RunFolder(tmp_path), trained_weights()
    for step in (1, 2):
        folder.save_latest(weights, step=step, **METADATA)

    def check(header: Mapping[str, Any]) -> None:
        if header["step"] == 2:
            raise CheckpointError("its step is 2")

    checkpoint, refusals = RunFolder(tmp_path).load_newest(check)
    assert checkpoint is not None and checkpoint.step == 1
    assert len(refusals) == 1 and "its step is 2" in refusals[0]


def test_whoever_owns_a_folder_removes_what_a_killed_run_left_half_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    files = [path for path in vars(folder).values() if isinstance(path, Path) and path != tmp_path]
    assert len(files) == 11
    for path in files:
        partial_of(path).write_bytes(b"half")
    RunFolder(tmp_path)
    assert len(os.listdir(tmp_path)) == len(files)
    with folder.owned():
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("failing", ["latest", "previous"])
def test_save_latest_that_cannot_rename_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """If the rename to ``latest`` or to ``previous`` fails, a checkpoint stays that a run can go on from."""
    folder, weights = RunFolder(tmp_path), trained_weights()
    folder.save_latest(weights, step=1, **METADATA)
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == f"{failing}.safetensors":
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*Input/output error.*intact$"):
            folder.save_latest(weights, step=2, **METADATA)
    assert not list(tmp_path.glob(".*"))
    checkpoint, refusals = RunFolder(tmp_path).load_newest()
    assert checkpoint is not None and checkpoint.step == 1 and not refusals
