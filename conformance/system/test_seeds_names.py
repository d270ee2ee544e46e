"""The names that the seed documents use still work: their command lines, and their update of a model."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor import ArbModel
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.run_folder import CODEC_FILE, RunFolder
from arbitor.optimized.training.schedule import GAIN
from conformance.graph.models import random_ids, state_of
from conformance.system.command import Here, check_refused
from conformance.training.nano import NANO

ONE_STEP = "--steps 1 --batch 1 --accum 1 --ctx 4 --eval-steps 1 --eval-interval 1 --save-interval 0 --no-save --reset"
"""Options of the one-step runs of REFACTOR12."""


def module(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> bytes:
    """Run a module as `python -m` does, in this process, and return what it printed."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capfdbinary.readouterr()
    with pytest.raises(SystemExit) as end:
        # By its path: pytest may load the package by a loader of its own, which gives no code.
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        runpy.run_path(found.origin, run_name="__main__")
    out, err = capfdbinary.readouterr()
    assert end.value.code == 0, err.decode()
    return bytes(out)


def test_smoke_as_a_module(
    here: Here, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """REFACTOR12, but for device and preset."""
    asked = "--device cpu --ctx 4 --batch 1 --max-moe-iters 1 --no-vq --no-graph --backward --preset whole"
    run: dict[str, Any] = {"monkeypatch": monkeypatch, "capfdbinary": capfdbinary}
    shown = module("arbitor.smoke", *asked.split(), **run)
    assert b"preset whole, reference on cpu, ctx 4, batch 1" in shown and b"backward/update, warm" in shown


def test_train_as_a_module(
    here: Here,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """REFACTOR12, but for data, device and preset."""
    run: dict[str, Any] = {"monkeypatch": monkeypatch, "capfdbinary": capfdbinary}
    folder = tmp_path / "smoke-pure-nomoe"
    asked = f"{ONE_STEP} --run {folder} --disable-moe --no-vq --no-graph --data {text} --preset whole --device cpu"
    for _ in range(2):
        shown = module("arbitor.train", *asked.split(), **run)
        assert b"1 steps in" in shown
    document = json.loads((folder / "config.json").read_text())
    assert document["run"]["eval_windows"] == 1 and document["run"]["save_interval"] == 0
    assert not document["model"]["use_moe"] and document["model"]["num_codes"] == 0
    assert not list(folder.glob("*.safetensors"))


def test_no_checkpoint_between_the_first_and_the_last(here: Here, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = ("--preset", "nano", "--data", str(text), "--device", "cpu", "--steps", "4", "--run", str(folder))
    assert here("train", *asked, "--save-interval", "0").returncode == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 0 and steps[-1] == 4
    # What was newest before the last step is the state before the first.
    assert load_checkpoint(folder / "previous.safetensors").step == 0


def test_reset_removes_the_run_and_nothing_else(here: Here, text: Path, tmp_path: Path) -> None:
    """Only once nothing can be refused any more. Without the run there is nothing to remove, which is no fault."""
    folder = tmp_path / "run"
    asked = f"train --preset nano --data {text} --device cpu --steps 2 --run {folder}".split()
    assert here(*asked, "--reset").returncode == 0
    (folder / "mine.txt").write_text("kept")
    (folder / CODEC_FILE).write_bytes(b"of the old run")
    events = set(folder.glob("events.*"))
    before = (folder / "metrics.jsonl").read_bytes()
    refused = here(*asked)
    assert refused.returncode == 1 and b"remove it with --reset" in refused.stderr
    assert here(*asked, "--context", "3000", "--reset").returncode != 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert here(*asked, "--seed", "5", "--reset").returncode == 0
    assert (folder / "mine.txt").read_text() == "kept" and not (folder / CODEC_FILE).exists()
    assert not events & set(folder.glob("events.*"))
    assert json.loads((folder / "config.json").read_text())["run"]["seed"] == 5
    assert RunFolder(folder).files_there()
    says = "reset is True, but must be False with resume, which goes on with the run"
    check_refused(here("train", "--reset", "--resume", "--run", str(folder)), 2, says)
    check_refused(here("train", "--reset"), 2, "reset is True, but does nothing without run, the folder")


@pytest.mark.parametrize("routed", [False, True])
def test_ternary_update_memory_is_a_pass_and_a_step(routed: bool) -> None:
    ids_BT = random_ids(2, 16)
    one, other = (ArbModel(NANO, device="cpu") for _ in range(2))
    for step in range(2):
        losses = one.losses(ids_BT)
        loss = {"loss_components": losses} if routed else {"loss_signal": one.objective(losses)}
        assert one._ternary_update_memory(**loss)
        assert other.backward(other.losses(ids_BT), rate=GAIN * other.config.theta, step=step)
        other.step()
    assert one.steps_taken == 2
    for name, weight in state_of(other).items():
        for field, tensor in weight.tensors().items():
            assert torch.equal(tensor, state_of(one)[name].tensors()[field]), (name, field)


def test_ternary_update_memory_refuses() -> None:
    model = ArbModel(NANO, device="cpu")
    before = state_of(model)
    for given in ({}, {"loss_signal": model.loss(random_ids(1, 8)), "loss_components": {}}):
        with pytest.raises(
            ValueError, match="loss_signal and loss_components are both given or both missing"
        ):
            model._ternary_update_memory(**given)
    with pytest.raises(
        TypeError,
        match=r"loss_signal is a float, but must be the loss as a tensor .* in place of loss\.backward",
    ):
        model._ternary_update_memory(loss_signal=3.2)  # type: ignore[arg-type]
    # A loss that is not finite changes nothing.
    assert not model._ternary_update_memory(loss_signal=model.loss(random_ids(1, 8)) * torch.inf)
    assert all(
        torch.equal(tensor, before[name].tensors()[field])
        for name, weight in state_of(model).items()
        for field, tensor in weight.tensors().items()
    )
