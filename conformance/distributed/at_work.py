"""What the checks of ranks at work share: where they compute, the models that they train together, and runs."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed.run import train_together, whole_state
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training import data
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
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


def random_ids(seed: int = 0) -> torch.Tensor:
    """Return the windows of all ranks."""
    return models.random_ids(BATCH, LENGTH, seed=seed).to(Place.device)


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


def take_pass(model: ArbModel, world: World, step: int) -> bool:
    ids_BT = world.share(random_ids(step))
    return model.backward(model.losses(ids_BT), rate=RATE, step=step, undo=False)


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


def begin_a_run_of_four(folder: Path) -> None:
    """Let four ranks begin a run of 12 windows on the CPU, which ends after four steps as if they were killed.

    The ranks are copies of this process, which saves the time of four starts. It must not have computed with several threads.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in range(4):
        rank = os.fork()
        if not rank:
            os.environ.update(
                RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="False",
            )  # fmt: skip
            try:
                with pytest.MonkeyPatch.context() as patch:
                    nano.register(patch)
                    nano.without_pictures(patch)
                    patch.setattr(data, "MAPPED_BYTES", 100)
                    train_until_killed(
                        4,
                        TrainOptions(
                            preset="nano", data=str(folder / "text.txt"), device="cpu", run=folder / "four", steps=6, batch=12,
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
