"""What ranks find out together that train adapters over a frozen base. See `ranks_at_work`."""

from __future__ import annotations

import io
import math
import os
import runpy
import shutil
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import Tensor

from arbitor.optimized.distributed import traffic
from arbitor.optimized.distributed.run import faults
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.adaptation import Adaptation
from arbitor.optimized.training.adapter_state import named_parameters
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import Settings, TrainOptions
from arbitor.optimized.training.run import Run
from arbitor.optimized.training.runtime import Stopped
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from conformance.compare import alike
from conformance.distributed import oracle
from conformance.distributed.at_work import (
    BATCH,
    RATE,
    Place,
    digest_of,
    gone_on,
    model_of,
    random_ids,
    ranks_of,
    refused,
    take_pass,
    together,
)
from conformance.training import nano
from conformance.training.runs import train_until_killed

STEPS, PASSES = 2, 2
"""Steps that are compared with the oracle, and the passes of each."""

SMALL_PIECE = 2**9
"""Bytes of the pieces in which gradients are exchanged too."""


def adapted(model: ArbModel) -> Adaptation:
    """Give a model adapters in every linear, none of them zero, and return what moves them."""
    settings = SimpleNamespace(
        steps=100,
        lora_rank=2,
        lora_alpha=4.0,
        lora_targets="all-linear",
        learning_rate=0.02,
        weight_decay=0.01,
    )
    adaptation = Adaptation(model, cast(Settings, settings), None)
    generator = torch.Generator().manual_seed(5)
    for adapter in adaptation.adapters.values():
        b_NR = torch.randn(adapter.b_NR.shape, generator=generator) / 50
        adapter.b_NR.data.copy_(b_NR)
    return adaptation


def watch_steps(adaptation: Adaptation) -> dict[str, Tensor]:
    """Return a mapping that fills with the gradients with which AdamW steps, by the names of their matrices."""
    found: dict[str, Tensor] = {}

    def watched(*_: Any) -> None:
        named = named_parameters(adaptation.adapters)
        found.update({name: each.grad.clone() for name, each in named.items() if each.grad is not None})

    adaptation.optimizer.register_step_pre_hook(watched)
    return found


def adds_gradients_of_adapters_in_order(world: World, folder: Path) -> Any:
    """Steps of adapters by the ranks, in one piece and in small ones, and by the oracle on rank 0; and what the ranks received."""
    digests, received = [], []
    for held in (traffic.HELD_BYTES, world.count * SMALL_PIECE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(traffic, "HELD_BYTES", held)
            model = together(nano.NANO, world)
        base, adaptation = digest_of(model), adapted(model)
        grads = watch_steps(adaptation)
        for step in range(STEPS):
            for each in range(PASSES):
                assert take_pass(model, world, PASSES * step + each)
            ranks_of(model).measured()
            adaptation.step(step, losses=PASSES)
            received.append(
                [ranks_of(model).measured()[1], 4 * (world.count - 1) * sum(map(torch.numel, grads.values()))]
            )
        digests.append(adaptation.sha256())
    of_oracle = None
    if world.is_first:
        alone = model_of(nano.NANO)
        adaptation = adapted(alone)
        for step in range(STEPS):
            batches = [random_ids(PASSES * step + each) for each in range(PASSES)]
            oracle.take_adapter_passes(alone, batches, count=world.count, rate=RATE)
            adaptation.step(step, losses=PASSES)
        of_oracle = adaptation.sha256()
    return {
        "digests": digests,
        "oracle": of_oracle,
        "received": received,
        "base": [base, digest_of(model)],
    }


def adapts_as_one_batch(world: World, folder: Path) -> Any:
    """The mean gradients of a step of every module, beside those of one process that has all windows."""
    return [names_of_alike_gradients(config, world) for config in (nano.NANO, nano.WHOLE)]


def names_of_alike_gradients(config: ArbConfig, world: World) -> list[list[str]]:
    """Refuse gradients that are not alike; return the names of those of the ranks that are not zero, and of one process."""
    model, alone = together(config, world), model_of(config)
    ours, theirs = (adapted(each) for each in (model, alone))
    grads = [watch_steps(each) for each in (ours, theirs)]
    for step in range(PASSES):
        assert take_pass(model, world, step)
        assert alone.backward(alone.losses(random_ids(step)), rate=RATE, step=step)
    for each in (ours, theirs):
        each.step(0, losses=PASSES)
    for name, grad in grads[0].items():
        alike(grad.cpu(), grads[1][name].cpu(), name)
    return [sorted(name for name, grad in each.items() if grad.any()) for each in grads]


def moves_no_adapters_by_what_is_not_finite(world: World, folder: Path) -> Any:
    """A loss that is NaN on one rank, and then a gradient with a row that is not finite on one rank."""
    model = together(nano.NANO, world)
    adaptation = adapted(model)
    before, is_last = adaptation.sha256(), world.number == world.count - 1
    losses = model.losses(world.share(random_ids()))
    broken = {**losses, "bytes": losses["bytes"] * (math.nan if is_last else 1.0)}
    accepted = model.backward(broken, rate=RATE, step=0)
    adaptation.step(0, losses=0)
    assert take_pass(model, world, 1)
    parameter = next(each for each in model.parameters() if each.grad is not None)
    assert parameter.grad is not None
    if is_last:
        parameter.grad[0, 0] = math.inf
    norm = adaptation.step(0, losses=1)["grad_norm"]
    return {
        "accepted": accepted,
        "norm is finite": math.isfinite(norm),
        "changed": adaptation.sha256() != before,
        "faults": faults(model),
    }


def finetunes(world: World, folder: Path) -> Any:
    """Whole runs: one that nothing happens to, one that is killed, one that one rank is told to stop, and one of one process."""
    shown, options, is_last = io.StringIO(), finetune_options(folder), world.number == world.count - 1
    saved = train(
        replace(options, run=folder / "adapted"),  # type: ignore[type-var]
        console=Console(file=shown, width=999),
    ).summary["adapter_sha256"]
    train_until_killed(4, replace(options, run=folder / "adapted-left"))  # type: ignore[type-var]
    if world.is_first:
        # One process goes on with the run too.
        shutil.copytree(folder / "adapted-left", folder / "adapted-killed")
    world.wait()
    killed = resumed(folder / "adapted-killed")
    # Another machine may have the base by another name.
    named = replace(options, init_from=str(folder / ("base-again" if is_last else "base")))  # type: ignore[type-var]
    stopped = replace(named, run=folder / "adapted-stopped")  # type: ignore[type-var]
    with pytest.MonkeyPatch.context() as patch:
        if is_last:
            at_step(patch, 1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as says:
            train(stopped)
    # Rank 0 has written the checkpoint then. A process that was stopped is not there any more to read an older one.
    world.wait()
    return {
        "digests": {"saved": saved, "killed": killed, "stopped": resumed(folder / "adapted-stopped")},
        "module": finetuned_by_the_module(folder),
        "shown": shown.getvalue(),
        "stopped": str(says.value),
        "of one": gone_on(folder / "adapted-alone"),
    }


def finetuned_by_the_module(folder: Path) -> dict[str, Any]:
    """Run `arbitor.finetune` as torchrun runs it on a rank that it has started, and return what it prints and how it ends."""
    options = finetune_options(folder)
    asked = {
        "base": options.init_from,
        "lora-rank": options.lora_rank,
        "learning-rate": options.learning_rate,
        "out": folder / "module",
        **{name: getattr(options, name) for name in ("data", "device", "steps", "batch", "context", "accum")},
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    printed, code = io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["arbitor.finetune", *words])
        try:
            runpy.run_module("arbitor.finetune", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    return {"printed": printed.getvalue(), "code": code}


def finetune_options(folder: Path) -> TrainOptions:
    """Return a short run of adapters over the model that one process trained."""
    return TrainOptions(
        finetune=True, init_from=str(folder / "base"), data=str(folder / "other.txt"), device=Place.device, steps=6, batch=BATCH,
        context=16, accum=2, lora_rank=3, learning_rate=0.02, log_interval=2, eval_interval=3, eval_windows=8,
        save_interval=3,
    )  # fmt: skip


def resumed(run: Path) -> str:
    return str(train(TrainOptions(run=run, resume=True, finetune=True)).summary["adapter_sha256"])


def at_step(patch: pytest.MonkeyPatch, step: int, call: Any) -> None:
    """Call a function with the run before it takes a step."""
    real = Run._take_step

    def calling(run: Run, *, measured: bool) -> dict[str, Any] | None:
        if run.step == step:
            call(run)
        return real(run, measured=measured)

    patch.setattr(Run, "_take_step", calling)


def refuses_ranks_whose_adapters_differ(world: World, folder: Path) -> Any:
    """One rank finds an older checkpoint, over the same base; and in another run the matrices of one rank drift."""
    is_last = world.number == world.count - 1
    run = folder / f"adapted-found-by-{world.number}"
    shutil.copytree(folder / "adapted-left", run)
    if is_last:
        (run / "latest.safetensors").unlink()
    behind = refused(TrainOptions(run=run, resume=True))
    with pytest.MonkeyPatch.context() as patch:
        if is_last:
            at_step(patch, 1, drift)
        drifted = refused(replace(finetune_options(folder), run=folder / "adapted-drifted"))  # type: ignore[type-var]
    return {"behind": behind, "drifted": drifted}


def drift(run: Run) -> None:
    """Change an element of a matrix."""
    next(run.model.parameters()).data[0, 0] += 2**-10
