"""Parts of the measurement, on every rank that torchrun starts; rank 0 writes what came out. See `python -m bench.scaling`.

Legend: B windows of a rank, T bytes of a window.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from arbitor.optimized.ahead.start import awaited, compiled_ahead
from arbitor.optimized.distributed.ranks import FULL, MXINT8, GroupRanks
from arbitor.optimized.distributed.run import whole_state
from arbitor.optimized.distributed.world import World, joined
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.recording import LAUNCHED_FIRST
from arbitor.optimized.training.runtime import Runtime, choose_runtime
from arbitor.reference.audit import audit
from arbitor.reference.config import NUM_BYTES, ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from bench import parts, train_step
from bench.inputs import RATE
from bench.peers.twin import TrunkTwin
from bench.scaling.floats import BYTES_A_WEIGHT, step_of

MODELS = ("tiny", "small", "110M", "r12")
"""Models whose trunks are measured."""

CHECKED_STEPS = LAUNCHED_FIRST + 3
"""Steps of the check. Where passes are recorded, the last ones are replayed."""

EXCHANGED_BYTES = 2**28
"""Bytes of a tensor whose exchange is timed: the gradient of 2^27 weights in bfloat16."""

EXCHANGES = 5
"""Times that an exchange is timed, after one that is not."""


@cache
def trunk_of(name: str) -> ArbConfig:
    """Return the trunk of a model: without codes and loop, so that it has a float twin."""
    if name != "110M":
        return train_step.config_of(train_step.TRUNK, name)
    sizes = {"width": 1024, "num_layers": 8, "num_heads": 16, "query_latent": 512, "kv_latent": 256}
    inner = {"embed_dim": 384, "shared_inner": 2176, "expert_rank": 32, "head_inner": 2048}
    return replace(train_step.config_of(train_step.TRUNK, "small"), name=name, **sizes, **inner)


@contextmanager
def a_world(device: str, *, share_gpu: bool) -> Iterator[World]:
    """Join the ranks, as a run does. Ranks that share a GPU exchange through gloo, and a single rank exchanges with itself."""
    if not share_gpu and int(os.environ["WORLD_SIZE"]) > 1:
        with joined() as world:
            world.take_device(device)
            yield world
        return
    cuda = ",cuda:gloo" if share_gpu else ",cuda:nccl"
    dist.init_process_group("cpu:gloo" + (cuda if device == "cuda" else ""))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def windows(world: World, batch: int, length: int, device: str, step: int = 0) -> torch.Tensor:
    """Return the windows of this rank, int64 [B, T], of a batch of all ranks."""
    generator = torch.Generator().manual_seed(step)
    ids_BT = torch.randint(NUM_BYTES, (batch * world.count, length), generator=generator)
    return world.share(ids_BT).to(device)


def model_of(config: ArbConfig, runtime: Runtime, world: World | None, exchange: str = FULL) -> ArbModel:
    """Return a model that ranks train together; or one that its process trains alone, for no world.

    A single rank of a world exchanges with itself all that several ranks exchange: gradients, and what steps have changed.
    """
    model = ArbModel(config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=0)
    if world is not None:
        GroupRanks(model, world, exchange=exchange)
    return model


@values_vouched_for()
def checked(world: World, runtime: Runtime, asked: argparse.Namespace) -> dict[str, Any]:
    """Train `tiny` with every module twice, launched and as a run does it, and compare what must be equal.

    Raises:
        RuntimeError: two runs of one seed differ, ranks read different weights, or one rank differs from a process alone.
    """
    config, digests, read = PRESETS["tiny"], [], []
    for again in range(3 if world.count == 1 else 2):
        model = model_of(config, runtime, None if again == 2 else world)
        passes = Passes(model) if again == 0 else passes_of(model, runtime, asked)
        for step in range(CHECKED_STEPS):
            ids_BT = windows(world, 2, 64, runtime.device, step)
            # Trits move in a single step at this rate.
            if passes.take(ids_BT, rate=float(config.theta), step=step) is None:
                raise RuntimeError("the loss is not finite")
            passes.step()
        passes.close()
        tensors = {name: each for name, each in model.state_dict().items() if not name.endswith("accum")}
        read.append(state_sha256({name: each.to("cpu") for name, each in tensors.items()}))
        state = whole_state(model)
        digests.append("" if state is None else state_sha256(state))
    everyone = {
        bytes(each.tolist()).hex() for each in world.gathered(torch.tensor(list(bytes.fromhex(read[0]))))
    }
    if len(set(digests)) > 1 or len(set(read)) > 1:
        raise RuntimeError(f"runs of one seed ended with the states {digests}, but must end with one")
    if len(everyone) > 1:
        raise RuntimeError(f"ranks read {len(everyone)} different sets of weights, but must read the same")
    return {"state_sha256": digests[0], "compared_with_a_process_alone": world.count == 1}


def rates(world: World, runtime: Runtime, asked: argparse.Namespace) -> dict[str, Any]:
    """Time the exchanges of large tensors: torch's all-reduce and broadcast, and the gather to an owner that gradients take."""
    sent = torch.zeros(asked.exchanged_bytes, dtype=torch.uint8, device=runtime.device)
    halves = sent.view(torch.bfloat16)
    parts_of_all = [torch.empty_like(sent) for _ in range(world.count)]
    shares = [each[: len(sent) // world.count] for each in parts_of_all]
    everyones = list(sent[: len(shares[0]) * world.count].chunk(world.count))

    def gathered_by_all_owners() -> None:
        # Each rank owns a part, and is sent that part by all.
        for owner, share in enumerate(everyones):
            dist.gather(share, shares if world.number == owner else None, dst=owner)

    found = {}
    for name, exchange in {
        "all_reduce": lambda: dist.all_reduce(halves),
        "broadcast": lambda: dist.broadcast(sent, src=0),
        "gather to owners": gathered_by_all_owners,
    }.items():
        seconds = timed(exchange, runtime, EXCHANGES)
        found[name] = {"seconds": seconds, "gigabytes_per_second": len(sent) / seconds / 1e9}
    return {"bytes": len(sent), "exchanges": found}


def timed(call: Callable[[], Any], runtime: Runtime, times: int) -> float:
    """Return the median seconds of a call that all ranks begin together, after one that is not timed."""
    found = []
    for _ in range(times + 1):
        runtime.synchronize()
        dist.barrier()
        began = time.perf_counter()
        call()
        runtime.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


@values_vouched_for()
def ours(
    world: World, runtime: Runtime, asked: argparse.Namespace, *, exchange: str = FULL
) -> dict[str, Any]:
    """Time steps of our model. A process alone exchanges nothing, as in a run."""
    config = trunk_of(asked.model)
    model = model_of(config, runtime, world if world.count > 1 else None, exchange)
    passes = passes_of(model, runtime, asked)
    ahead = compiled_ahead(
        runtime,
        config=config.to_json(),
        context=asked.length,
        windows=(asked.windows,),
        passes="run",
        recorded=is_recorded(runtime, asked),
        ranks=tuple(world.of_host),
        of_ranks=world.count,
        exchange=exchange,
    )
    with awaited(ahead):
        step = our_step(passes, world, runtime, asked)
    ranks = model.voting.ranks if isinstance(model.voting.ranks, GroupRanks) else None
    if ranks is not None:
        ranks.measured()
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, runtime, asked.steps)
    waited, received = (0.0, 0) if ranks is None else ranks.measured()
    everyones = sum(each.item() for each in world.gathered(torch.tensor(float(received))))
    weights = audit(config).weights
    # Parts that follow need the memory of the graphs.
    passes.close()
    return {
        **sizes_of(world, asked, seconds),
        "weights": weights,
        "waiting_share": waited / (seconds * (asked.steps + 1)),
        "received_bytes_a_weight": everyones / (asked.steps + 1) / world.count / weights,
        "peak_bytes": torch.cuda.max_memory_reserved() if runtime.device == "cuda" else None,
    }


def passes_of(model: ArbModel, runtime: Runtime, asked: argparse.Namespace) -> Passes:
    """Return the passes that a run would take: recorded on GPUs that exchange over NCCL."""
    return RecordedPasses(model) if is_recorded(runtime, asked) else Passes(model)


def is_recorded(runtime: Runtime, asked: argparse.Namespace) -> bool:
    """Return whether a run would record its passes."""
    return runtime.device == "cuda" and not asked.share_gpu


def our_step(passes: Passes, world: World, runtime: Runtime, asked: argparse.Namespace) -> Callable[[], None]:
    """Return what takes a step of our model, after steps in which all is compiled and recorded, and more moves than later."""
    taken = itertools.count()

    def step() -> None:
        number = next(taken)
        ids_BT = windows(world, asked.windows, asked.length, runtime.device, number)
        if passes.take(ids_BT, rate=RATE, step=number) is None:
            raise RuntimeError(f"the loss of step {number} is not finite")
        passes.step()

    for _ in range(max(asked.steps, LAUNCHED_FIRST + 1)):
        step()
    return step


def sizes_of(world: World, asked: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return what a timed step has in common with every other."""
    total = asked.windows * world.count * asked.length
    return {"bytes_a_step": total, "seconds": seconds, "bytes_per_second": total / seconds}


def floats(
    world: World, runtime: Runtime, asked: argparse.Namespace, *, compiled: bool = False
) -> dict[str, Any]:
    """Time steps of the float twin by each way of training."""
    found = {}
    for way, bytes_a_weight in BYTES_A_WEIGHT.items():
        torch.manual_seed(0)
        dtype = torch.bfloat16 if runtime.device == "cuda" else torch.float32
        twin = TrunkTwin(trunk_of(asked.model), asked.length, dtype).to(runtime.device)
        weights = sum(each.numel() for each in twin.parameters())
        ids_BT = windows(world, asked.windows, asked.length, runtime.device)
        step = step_of(way, twin, ids_BT, compiled=compiled)
        if not math.isfinite(step()):
            raise RuntimeError(f"the loss of the twin is not finite under {way}")
        if runtime.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(step, runtime, asked.steps)
        found[way] = {
            **sizes_of(world, asked, seconds),
            "weights": weights,
            "received_bytes_a_weight_by_count": bytes_a_weight * (world.count - 1) / world.count,
            "peak_bytes": torch.cuda.max_memory_reserved() if runtime.device == "cuda" else None,
        }
        del twin, step
        parts.free()
    return found


PARTS = {
    "check": checked,
    "rates": rates,
    "ours": ours,
    MXINT8: partial(ours, exchange=MXINT8),
    "floats": floats,
    "compiled": partial(floats, compiled=True),
}
"""What a part runs on every rank, by its name: ours with gradients as they are, and in eight bits; the float twins as they are, and
by `torch.compile`."""


def main() -> None:
    """Run parts one after the other. After each, rank 0 writes what came out of all so far."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling.at_work", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--parts", type=json.loads, required=True, help="a JSON list: part, model, windows")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--exchanged-bytes", type=int, default=EXCHANGED_BYTES)
    parser.add_argument("--share-gpu", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.device == "cpu":
        torch.set_num_threads(1)
    runtime = choose_runtime(asked.device, None, None)
    found = []
    with a_world(asked.device, share_gpu=asked.share_gpu) as world:
        for part in asked.parts:
            # Compiled code of another model is of no use.
            torch.compiler.reset()
            found.append(PARTS[part["part"]](world, runtime, argparse.Namespace(**vars(asked), **part)))
            parts.free()
            if world.is_first:
                parts.write(asked.out, found)
        sys.stdout.flush()
        sys.stderr.flush()
        dist.barrier()
        # Rarely a rank aborted while it took its process group apart, after DDP and FSDP2 over gloo. All that counts is written.
        os._exit(0)


if __name__ == "__main__":
    main()
