"""A batch that memory decides: the largest that fits, recorded as a number, and the same run as with that number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import batch_size, machine_memory
from arbitor.optimized.training.batch_size import Memory, fitting_batch
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.machine_memory import free_bytes
from arbitor.optimized.training.options import Settings, TrainOptions
from arbitor.optimized.training.plan import decide
from arbitor.optimized.training.runtime import choose_runtime
from conformance.training import nano
from conformance.training.runs import options

FIXED, WINDOW = 100, 100
"""Bytes that a pass takes in these tests: so many, and so many for each window."""


def settings_of_nano() -> Settings:
    return decide(TrainOptions(preset="nano", device="cpu", context=16), None)


@pytest.mark.parametrize(
    ("allowed", "fails_at", "windows"),
    [
        (FIXED + 7 * WINDOW, None, 4),
        (FIXED + 8 * WINDOW, None, 8),
        (FIXED + 8 * WINDOW, 8, 4),
        (FIXED + WINDOW, None, 1),
        (10**9, None, 2**16 // 16),
    ],
)
def test_the_largest_power_of_two_that_fits(
    monkeypatch: pytest.MonkeyPatch, allowed: int, fails_at: int | None, windows: int
) -> None:
    measured = []

    def of_pass(memory: Memory, passes: Any, count: int, context: int) -> int:
        memory.allowed = allowed
        measured.append(count)
        return 2**63 if count == fails_at else FIXED + WINDOW * count

    monkeypatch.setattr(Memory, "of_pass", of_pass)
    chosen = fitting_batch(nano.NANO, settings_of_nano(), choose_runtime("cpu"))
    assert chosen.windows == windows
    # Only a pass that memory refuses is one too many.
    assert max(measured) == (fails_at or windows)
    assert f"batch: {windows:,} window" in chosen.reason


@pytest.mark.parametrize(
    ("changes", "summed"), [({}, False), ({"accum": 2}, True), ({"accum": 2, "accum_votes": True}, False)]
)
def test_sums_of_micro_batches_lie_beside_the_passes_that_are_measured(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, summed: bool
) -> None:
    """However many passes are measured: more than a step of the run has."""
    monkeypatch.setattr(batch_size, "MOST_BYTES", 128)
    real, seen = Memory.of_pass, []

    def of_pass(memory: Memory, passes: Any, count: int, context: int) -> int:
        seen.append((count, bool(passes.model.voting.totals)))
        return real(memory, passes, count, context)

    monkeypatch.setattr(Memory, "of_pass", of_pass)
    monkeypatch.setattr(batch_size, "free_bytes", lambda: 2**40)
    settings = decide(TrainOptions(preset="nano", device="cpu", context=16, **changes), None)
    assert fitting_batch(nano.NANO, settings, choose_runtime("cpu")).windows == 8
    first = [(1, False)] if summed else []
    assert seen == first + [(count, summed) for count in (1, 2, 4, 8)]


def test_sums_that_a_larger_micro_batch_makes_are_measured_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts have sums from the number of windows on that has slots for all of them."""
    monkeypatch.setattr(batch_size, "MOST_BYTES", 128)
    real, seen = Memory.of_pass, []

    def of_pass(memory: Memory, passes: Any, count: int, context: int) -> int:
        before = len(passes.model.voting.totals)
        taken = real(memory, passes, count, context)
        seen.append((count, before == len(passes.model.voting.totals)))
        return taken

    monkeypatch.setattr(Memory, "of_pass", of_pass)
    monkeypatch.setattr(batch_size, "free_bytes", lambda: 2**40)
    settings = decide(TrainOptions(preset="nano", device="cpu", context=16, accum=2), None)
    fitting_batch(replace(nano.NANO, num_experts=64), settings, choose_runtime("cpu"))
    made = [count for count, has_all in seen if not has_all]
    assert made[0] == 1 and len(made) == 2
    # The last measurement of each number of windows is one with all sums.
    assert dict(seen) == dict.fromkeys((1, 2, 4, 8), True)


def test_a_window_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "free_bytes", lambda: 0)
    monkeypatch.setattr(Memory, "_held", lambda memory, name, on_device: 2**30 if name == "VmHWM" else 0)
    for settings in (settings_of_nano(), replace(settings_of_nano(), accum=2)):
        with pytest.raises(
            TrainingError, match=r"a window of 16 bytes takes 1\.00 GiB of memory, .* 0\.00 GiB"
        ):
            fitting_batch(nano.NANO, settings, choose_runtime("cpu"))


def test_a_run_has_the_number_from_then_on(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "MOST_BYTES", 64)
    chosen = train(options(text, tmp_path / "auto", batch="auto", steps=3)).summary
    asked = train(options(text, tmp_path / "four", batch=4, steps=3)).summary
    assert chosen["batch"] == asked["batch"] == 4
    assert chosen["state_sha256"] == asked["state_sha256"]
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["run"]["batch"] == 4
    monkeypatch.setattr(batch_size, "MOST_BYTES", 1)
    longer = replace(options(text, tmp_path / "auto", batch="auto", steps=4), resume=True, preset=None)
    assert train(longer).summary["batch"] == 4


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"finetune": True, "init_from": "x"}, "in arb finetune"),
        ({"data_code": "x"}, "beside data_code"),
        ({"data_speech": "x"}, "beside data_speech"),
    ],
)
def test_a_run_that_cannot_be_measured_needs_a_number(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=f"batch is 'auto', but must be a number {where}"):
        decide(TrainOptions(preset=None if "finetune" in changes else "nano", batch="auto", **changes), None)


def test_no_other_word_stands_for_a_number() -> None:
    with pytest.raises(TypeError, match="batch is 'most', but must be a whole number or 'auto'"):
        decide(TrainOptions(preset="nano", batch="most"), None)
    with pytest.raises(TypeError, match=r"^context is 'auto', but must be a whole number$"):
        decide(TrainOptions(preset="nano", context="auto"), None)


FILES = {
    "second version": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "first version": (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("version", FILES)
def test_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    limit, used, parts, inactive = FILES[version]
    of_machine = machine_memory.total_bytes()
    assert of_machine >= free_bytes() > 2**20
    (tmp_path / limit).write_text("5000\n")
    (tmp_path / used).write_text("2000\n")
    assert (machine_memory.total_bytes(), free_bytes()) == (5000, 3000)
    # A file that was read is used memory, and gives way.
    (tmp_path / parts).write_text(f"active_file 900\n{inactive} 500\n")
    assert free_bytes() == 3500
    # No limit is a word in the second version, and a number that no machine has in the first.
    for none in ("max", str(2**63 - 4096)):
        (tmp_path / limit).write_text(f"{none}\n")
        assert machine_memory.total_bytes() == of_machine and free_bytes() > 2**20


def test_a_pass_is_measured_alone() -> None:
    """What the process held before does not count, neither that which it gave back nor that which it still holds."""

    class Passes:
        def take(self, ids_BT: torch.Tensor, *, rate: float, step: int) -> None:
            assert ids_BT.shape == (2, 8)
            torch.zeros(64 * 2**20, dtype=torch.uint8).add_(1)

    kept = torch.zeros(32 * 2**20, dtype=torch.uint8).add_(1)
    torch.zeros(256 * 2**20, dtype=torch.uint8).add_(1)
    taken = Memory("cpu").of_pass(Passes(), 2, 8)  # type: ignore[arg-type]
    assert 60 * 2**20 < taken < 80 * 2**20, (taken, kept.numel())


@pytest.mark.parametrize("error", ["GPU", "machine"])
def test_a_pass_for_which_memory_is_too_small_does_not_fit(error: str) -> None:
    """Whoever refuses the memory: torch for a GPU, or, in another class of error, for the machine."""

    class Passes:
        def take(self, ids_BT: torch.Tensor, *, rate: float, step: int) -> None:
            if error == "GPU":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            torch.empty(2**60, dtype=torch.uint8)

    assert Memory("cpu").of_pass(Passes(), 2, 8) == 2**63  # type: ignore[arg-type]
