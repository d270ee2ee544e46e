"""`arb finetune`: adapters learn over a base that keeps every byte, and a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training import adaptation
from arbitor.optimized.training.adapter_state import AdapterState
from arbitor.optimized.training.checkpoint import CheckpointError, adapter_sha256, load_checkpoint
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.options import PRESET_DEFAULTS, TrainOptions
from arbitor.optimized.training.run import Run
from arbitor.optimized.training.runtime import Stopped
from arbitor.optimized.training.schedule import share_of_rate
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.adapters import adapters_of
from arbitor.reference.presets import PRESETS
from conformance.training.nano import NANO, NANO_DEFAULTS
from conformance.training.runs import options as base_options
from conformance.training.runs import train_until_killed

OTHER = b"".join(b"The root of %d is %d, or nearly so.\n" % (i * i, i) for i in range(200))
"""A text that the base has not seen."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ternary weights."""
    from conformance.training import nano

    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_bytes(nano.TEXT)
    (folder / "other.txt").write_bytes(OTHER)
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        nano.without_pictures(patch)
        train(base_options(folder / "text.txt", folder / "run", steps=20))
    return folder / "run"


def options(base: Path, run: Path | None, **changes: Any) -> TrainOptions:
    made = TrainOptions(
        finetune=True, init_from=str(base), data=str(base.parent / "other.txt"), device="cpu", run=run
    )
    return replace(made, **{"lora_rank": 3, "learning_rate": 0.02, **NANO_DEFAULTS_ASKED, **changes})


NANO_DEFAULTS_ASKED = {
    name: value for name, value in NANO_DEFAULTS.items() if name not in ("eval_windows", "sample_bytes")
}


def outcome(folder: Path, summary: dict[str, Any]) -> tuple[object, ...]:
    columns = ("step", "train_bpb", "val_bpb", "rate", "grad_norm", "adapter_norm")
    metrics = [[line.get(name) for name in columns] for line in read_metrics(folder / "metrics.jsonl")]
    best, final = (load_checkpoint(folder / f"{name}.safetensors").adapter for name in ("best", "final"))
    assert best is not None and final is not None
    return {**summary, "seconds": 0}, metrics, adapter_sha256(best), adapter_sha256(final)


def test_adapters_learn_and_the_base_keeps_every_byte(base: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    source = load_checkpoint(base / "best.safetensors")
    summary = train(options(base, tmp_path / "run", steps=40, eval_interval=20)).summary
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert summary["val_bpb"] < lines[0]["val_bpb"] - 0.3
    assert summary["state_sha256"] == source.state_sha256
    for name in ("latest", "previous", "best", "final"):
        checkpoint = load_checkpoint(tmp_path / "run" / f"{name}.safetensors")
        assert checkpoint.state_sha256 == source.state_sha256 and checkpoint.adapter is not None
    assert {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()} == before
    assert lines[0]["step"] == 0 and lines[-1]["adapter_norm"] > lines[1]["adapter_norm"] > 0
    assert "flip_rate" not in lines[-1] and lines[-1]["grad_norm"] > 0
    assert lines[2]["rate"] == 0.02 * share_of_rate(3, 40)
    document = json.loads((tmp_path / "run" / "config.json").read_text())
    assert document["beginning"]["is_base"] and not document["beginning"]["fresh"]
    assert (document["run"]["lora_rank"], document["run"]["lora_alpha"]) == (3, 16.0)


def test_a_run_killed_and_resumed_ends_the_same(base: Path, tmp_path: Path) -> None:
    whole = outcome(tmp_path / "whole", train(options(base, tmp_path / "whole", accum=2)).summary)
    # Before any save but the first, and after one.
    for step in (0, 4):
        folder = tmp_path / f"killed-{step}"
        train_until_killed(step, options(base, folder, accum=2))
        command = TrainOptions(run=folder, resume=True, finetune=step != 4)
        assert outcome(folder, train(command).summary) == whole


def test_a_signal_saves(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Run._take_step

    def signalled(run: Any, *, measured: bool) -> dict[str, Any] | None:
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, measured=measured)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_take_step", signalled)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 5 of 8; the checkpoint"):
            train(options(base, tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / "latest.safetensors").step == 5
    resumed = train(TrainOptions(run=tmp_path / "run", resume=True, finetune=True)).summary
    again = train(options(base, None, save=False, save_interval=None)).summary
    assert resumed["adapter_sha256"] == again["adapter_sha256"]


def test_one_rank_of_torchrun_adapts_as_a_process_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(base, None, save=False, save_interval=None, steps=3)
    digests = [train(asked).summary["adapter_sha256"]]
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    digests.append(train(asked).summary["adapter_sha256"])
    assert digests[0] == digests[1]


def floats(model: ArbModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """One micro-batch of two, or one gradient: the loss is left out of the mean, and the gradient ends the step."""
    seen: dict[int, list[Tensor]] = {}
    real = adaptation.Adaptation.step
    losses: list[int] = []

    def watched(self: adaptation.Adaptation, step: int, *, losses: int) -> dict[str, float]:
        if broken == "gradient" and step == 3:
            next(p.grad for p in self._parameters.values() if p.grad is not None)[0, 0] = float("nan")
        found = real(self, step, losses=losses)
        seen[step], counts[step] = floats(self.model), losses
        return found

    counts: dict[int, int] = {}
    monkeypatch.setattr(adaptation.Adaptation, "step", watched)
    if broken == "loss":
        real_losses = ArbModel.losses
        calls: list[int] = []

        def losing(self: ArbModel, *arguments: Any, **more: Any) -> dict[str, Tensor]:
            found = real_losses(self, *arguments, **more)
            calls.append(1)
            # Micro-batches 4 and 5 are those of step 2, and 7 is one of step 3.
            return {n: v * float("nan") for n, v in found.items()} if len(calls) - 1 in (4, 5, 7) else found

        monkeypatch.setattr(ArbModel, "losses", losing)
    summary = train(options(base, tmp_path / "run", accum=2, steps=6)).summary
    still = 2 if broken == "loss" else 3
    for step in range(1, 6):
        same = all(torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        assert same == (step == still), step
    if broken == "loss":
        assert summary["skipped"] == 3 and [counts[step] for step in (1, 2, 3, 4)] == [2, 0, 1, 2]
    else:
        assert summary["skipped"] == 0 and summary["faulty_rows"] == 1
    assert not losses


def test_micro_batches_share_a_step(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of two micro-batches AdamW gets the mean gradient."""
    grads: list[list[Tensor]] = []
    real = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any) -> Any:
        [group] = self.param_groups
        grads.append([p.grad.clone() for p in group["params"] if p.grad is not None])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(options(base, None, save=False, save_interval=None, steps=1, accum=2, batch=1))
    two = grads.pop()
    train(options(base, None, save=False, save_interval=None, steps=1, accum=1, batch=1))
    one = grads.pop()
    assert any((a - b).norm() > b.norm() / 64 for a, b in zip(one, two, strict=True))
    norm = torch.stack([grad.norm() for grad in two]).norm()
    assert 0.2 < norm / torch.stack([grad.norm() for grad in one]).norm() < 1.5


def test_the_last_layer_turns_once_unless_asked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the seeds' default, 1. A base of two turns then loses the weights that halt, and says so."""
    monkeypatch.setitem(PRESETS, "twice", replace(NANO, name="twice", max_moe_iters=2))
    monkeypatch.setitem(PRESET_DEFAULTS, "twice", NANO_DEFAULTS)
    source = tmp_path / "twice"
    train(base_options(base.parent / "text.txt", source, preset="twice", steps=1))
    other = {"data": str(base.parent / "other.txt"), "steps": 1}
    train(options(source, tmp_path / "once", **other))
    document = json.loads((tmp_path / "once" / "config.json").read_text())
    assert (document["model"]["max_moe_iters"], document["run"]["max_moe_iters"]) == (1, 1)
    left_out = document["beginning"]["left_out"]
    assert left_out and all("halt" in name or "leak_shifts" in name for name in left_out)
    train(options(source, tmp_path / "both", max_moe_iters=2, **other))
    states = [load_checkpoint(folder / "best.safetensors") for folder in (source, tmp_path / "both")]
    assert states[0].state_sha256 == states[1].state_sha256
    # The base of the other tests turns once, and a second turn needs weights that it does not have.
    with pytest.raises(TrainingError, match="cannot be the base of this model, as it has no such parts"):
        train(options(base, None, save=False, save_interval=None, max_moe_iters=2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init_from": None}, "init_from is not set, but must name the base"),
        ({"lora_rank": 0}, "lora_rank is 0, but must be from 1"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0, but must be above 0"),
        ({"lora_targets": "nothing"}, "lora_targets has 'nothing', but must end the name of a linear"),
        ({"rate": 3.0}, "rate is 3.0, but does nothing in arb finetune"),
        ({"sign_votes": True}, "sign_votes is True, but does nothing in arb finetune"),
        ({"enable_memory": True}, "enable_memory is True, but does nothing in arb finetune"),
        ({"cuda_graph": True}, "cuda_graph is True, but does nothing in arb finetune"),
        ({"finetune": False}, "lora_rank is 3, but does nothing in arb train"),
    ],
)
def test_settings_of_another_kind_of_run_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        train(options(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_runs_of_another_kind_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="trains ternary weights and has no adapters"):
        train(TrainOptions(run=base, resume=True, finetune=True))
    train(options(base, tmp_path / "run", steps=1))
    with pytest.raises(TrainingError, match="started with lora_rank 3 and cannot go on with lora_rank 4"):
        train(TrainOptions(run=tmp_path / "run", resume=True, finetune=True, lora_rank=4))
    for changes in ({}, {"finetune": False, "lora_rank": None, "learning_rate": None}):
        other = options(base, tmp_path / "other", **changes)
        with pytest.raises(TrainingError, match="has adapters, but a run must begin with ternary weights"):
            train(replace(other, init_from=str(tmp_path / "run")))


def test_adapters_that_the_loss_reads_alone_reach_the_model(base: Path, tmp_path: Path) -> None:
    """Adapters of the last linear: no gradient comes through a ternary weight."""
    summary = train(options(base, tmp_path / "run", lora_targets="byte_head.vocabulary")).summary
    assert summary["skipped"] == 0
    state = load_checkpoint(tmp_path / "run" / "final.safetensors").adapter
    assert state is not None and list(state.matrices) == ["byte_head.vocabulary"]
    assert state.moments["byte_head.vocabulary.lora_B"]["step"].item() == 8
    with pytest.raises(ValueError, match="come through a weight that is not frozen or has an adapter"):
        model = ArbModel(NANO)
        model.requires_grad_(False)
        model.backward(model.losses(torch.zeros(1, 8, dtype=torch.int64)), rate=1.0, step=0)


def test_an_adapter_left_half_written_is_removed(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options(base, run, steps=1))
    assert sorted(path.name for path in (run / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    left = run / "adapter" / ".adapter_model.safetensors.partial"
    left.write_bytes(b"half")
    train(TrainOptions(run=run, resume=True))
    assert not left.exists()


def test_a_checkpoint_with_damaged_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    train(options(base, tmp_path / "run", steps=1))
    path = tmp_path / "run" / "final.safetensors"
    checkpoint = load_checkpoint(path)
    assert checkpoint.adapter is not None
    content = path.read_bytes()
    a_RK, _ = next(iter(checkpoint.adapter.matrices.values()))
    needle = a_RK.numpy().tobytes()
    place = content.index(needle)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match="tensors do not match their digest"):
        load_checkpoint(path)


def test_a_state_of_adapters_comes_back(base: Path, tmp_path: Path) -> None:
    train(options(base, tmp_path / "run", steps=2))
    checkpoint = load_checkpoint(tmp_path / "run" / "final.safetensors")
    assert checkpoint.adapter is not None
    from arbitor import ArbModel as FrontModel

    model = FrontModel.from_pretrained(tmp_path / "run", device="cpu")
    found = AdapterState.of(model)
    assert found is not None and adapters_of(model)
    model.save_pretrained(tmp_path / "folder")
    again = AdapterState.of(FrontModel.from_pretrained(tmp_path / "folder", device="cpu"))
    assert again is not None and adapter_sha256(again) == adapter_sha256(found)
