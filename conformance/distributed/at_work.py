"""What the checks of ranks at work share: where they compute, the models that they train together, and runs."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from arbitor.optimized.distributed.ranks import GroupRanks
from arbitor.optimized.distributed.run import train_together, whole_state
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training import data, prepared
from arbitor.optimized.training.checkpoint import load_checkpoint, state_sha256
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from conformance.compare import alike
from conformance.distributed import oracle
from conformance.distributed.started import meeting_place
from conformance.graph import models
from conformance.training import nano
from conformance.training.runs import train_until_killed

RATE, BATCH, LENGTH = 40.0, 6, 20


class Place:
    """Where the ranks compute, and with what."""

    device = "cpu"
    ops: ModuleType = reference_ops


def model_of(config: ArbConfig, dtype: torch.dtype = torch.float32, **spreads: tuple[int, int]) -> ArbModel:
    return ArbModel(config, ops=Place.ops, device=Place.device, dtype=dtype, seed=3, **spreads)


def random_ids(seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    """Return the windows of all ranks."""
    return models.random_ids(BATCH, length, seed=seed).to(Place.device)


def together(
    config: ArbConfig,
    world: World,
    dtype: torch.dtype = torch.float32,
    exchange: str = "full",
    *,
    spread: bool = False,
    experts: bool = False,
) -> ArbModel:
    """Return a model that the ranks train together, with codebooks spread over them, or experts."""
    number = world.number, world.count
    asked = {"codes_over": spread, "experts_over": experts}
    model = model_of(config, dtype, **{name: number for name, is_asked in asked.items() if is_asked})
    train_together(model, world, exchange=exchange)
    return model


def take_pass(model: ArbModel, world: World, step: int, *, length: int = LENGTH) -> bool:
    ids_BT = world.share(random_ids(step, length))
    return model.backward(model.losses(ids_BT), rate=RATE, step=step, undo=False)


def take_steps(model: ArbModel, world: World, steps: int) -> None:
    """Take steps of one pass each."""
    for step in range(steps):
        take_pass(model, world, step)
        model.step()


def ranks_of(model: ArbModel) -> GroupRanks:
    """Return the ranks that train a model together."""
    ranks = model.voting.ranks
    assert isinstance(ranks, GroupRanks)
    return ranks


def received_by_all(model: ArbModel, wanted: float) -> list[int]:
    """Return the bytes that all ranks were sent since the last call, and the sum of what each of them wanted."""
    ranks = ranks_of(model)
    return [int(ranks.total(torch.tensor(each))) for each in (ranks.measured()[1], wanted)]


def voted_like_one(model: ArbModel, world: World) -> tuple[ArbModel, dict[str, list[str]]]:
    """Let the ranks and one process that has all windows take a pass, and refuse gradients that are not alike.

    Returns:
        The model of one process; and the names of the weights whose gradients this rank compared, and of all that voted.
    """
    alone = model_of(model.config)
    ours, theirs = oracle.watch_totals(model), oracle.watch_totals(alone)
    take_pass(model, world, 0)
    alone.backward(alone.losses(random_ids()), rate=RATE, step=0)
    weights = model.ternary_modules()
    # One rank has nothing to say of a weight that another one steps.
    for name, total in ours.items():
        spread = weights[name].spread
        rows = slice(None) if spread is None else slice(spread.rows.start, spread.rows.stop)
        alike(total.cpu(), theirs[name][rows].cpu(), name)
    return alone, {"compared": sorted(ours), "all": sorted(theirs)}


def handed_on(model: ArbModel, world: World, **spread: bool) -> list[str | None]:
    """Return the digest of a model, of one process that goes on with its state, and of ranks that do, whose model is spread."""
    state = whole_state(model)
    alone = model_of(model.config)
    if state is not None:
        alone.load_state(state)
    # As ranks do that go on with a run, each reads the whole state.
    given = [state]
    dist.broadcast_object_list(given, src=0)
    again = together(model.config, world, **spread)
    again.load_state(given[0])  # type: ignore[arg-type]
    return [digest_of(model), state and state_sha256(alone.state()), digest_of(again)]


def memory_of(module: torch.nn.Module) -> int:
    """Return the bytes that the memory of a module has: its weight, and the integers beside it."""
    return sum(tensor.untyped_storage().nbytes() for tensor in module.buffers())


def whole_run(folder: Path) -> TrainOptions:
    """Return a short run of a model with every module, which validates on windows that the ranks cannot share evenly."""
    return TrainOptions(
        preset="whole",
        data=str(folder / "text.txt"),
        device=Place.device,
        steps=2,
        batch=BATCH,
        eval_windows=5,
    )


def digest_of(model: ArbModel) -> str | None:
    state = whole_state(model)
    return None if state is None else state_sha256(state)


def refused(options: TrainOptions) -> str:
    """Return the sentence with which a run is refused."""
    return told(lambda: train(options))


def told(call: Callable[[], Any]) -> str:
    """Return the sentence with which a call is refused."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "was accepted"


def gone_on(run: Path) -> dict[str, Any]:
    """Return what is shown of a run that goes on, the state that it goes on from and ends with, and the steps that it then has.

    ``taken_up`` has the digest of its checkpoint, that of the state that the ranks then hold, and how many elements of means are
    not 0.
    """
    checkpoint = load_checkpoint(run / "latest.safetensors")
    means = [table for name, table in checkpoint.state.items() if name.endswith(".average.mean")]
    taken_up: list[Any] = [checkpoint.state_sha256]
    begun = prepared.train_together

    def watched(model: ArbModel, world: World, *, exchange: str) -> None:
        begun(model, world, exchange=exchange)
        taken_up.append(digest_of(model))

    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "train_together", watched)
        summary = train(TrainOptions(run=run, resume=True), console=Console(file=shown, width=999)).summary
    return {
        "shown": shown.getvalue(),
        "taken_up": [*taken_up, sum(int(torch.count_nonzero(each)) for each in means)],  # type: ignore[arg-type]
        "steps": summary["steps"],
        "state_sha256": summary["state_sha256"],
    }


def begin_a_run_of_four(folder: Path) -> None:
    """Let four ranks begin a run of 12 windows on the CPU, which ends after four steps as if they were killed.

    The ranks are copies of this process, which saves the time of four starts. It must not have computed with several threads.
    """
    place, ranks = meeting_place(), []
    for number in range(4):
        rank = os.fork()
        if not rank:
            os.environ.update(
                RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )  # fmt: skip
            try:
                with pytest.MonkeyPatch.context() as patch:
                    nano.register(patch)
                    nano.without_pictures(patch)
                    patch.setattr(data, "MAPPED_BYTES", 100)
                    train_until_killed(
                        4,
                        TrainOptions(
                            preset="means", data=str(folder / "text.txt"), device="cpu", run=folder / "four", steps=6, batch=12,
                            save_interval=3, log_interval=2,
                        ),
                    )  # fmt: skip
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        ranks.append(rank)
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert codes == [0] * 4, codes
