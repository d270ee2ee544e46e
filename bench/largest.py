"""Take steps of the largest model that one device holds, or several together: bytes a weight, peak of memory, seconds of a step.

    python -m bench.largest --weights 90e9 --out largest.json
    torchrun --nproc-per-node 2 -m bench.largest --weights 150e9 --out largest-2.json

The model is a trunk of equal layers, as many as make up the weights, with experts and without codes. It reads random bytes.
A step is a forward pass, a backward pass in which every matrix votes, and the step rule. The rate is theta, ten times that of a
training, so that a single step moves trits. A step counts if its loss is finite and trits of the first and of the last layer have
changed. What is measured is written again after each step, so that a run which is cut off leaves what it had. Under torchrun
each rank reads windows of its own. Bytes are those of the rank that has most, and seconds those of rank 0.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.distributed.ranks import FULL
from arbitor.optimized.distributed.run import kept_rows, train_together
from arbitor.optimized.distributed.world import World, as_bytes, joined
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.evaluate import NATS_PER_BIT
from arbitor.optimized.training.runtime import Runtime, choose_runtime
from arbitor.reference.audit import audit
from arbitor.reference.config import NUM_BYTES, ArbConfig
from arbitor.reference.constants import BESIDE_TRITS
from arbitor.reference.graph import ArbModel
from arbitor.reference.types import LaidOutWeight
from bench import machine, parts

INNER = 8
"""How many times wider than the model the hidden vector of its experts is."""

LATENT, HEAD, EXPERTS = 4, 128, 8
"""Width over the latent width of attention, columns of a head, and experts of a layer."""


def trunk(width: int, num_layers: int) -> ArbConfig:
    """Return a configuration of equal layers, almost all of whose weights are in matrices of INNER width^2 elements."""
    head = min(HEAD, width)
    return ArbConfig(
        name=f"trunk of {num_layers} layers",
        embed_dim=max(width // 8, 4),
        width=width,
        num_layers=num_layers,
        num_heads=width // head,
        head_dim=head,
        rotary_dim=head // 2,
        query_latent=width // LATENT,
        kv_latent=width // LATENT,
        shared_inner=INNER * width,
        num_experts=EXPERTS,
        top_k=2,
        expert_rank=max(width // 32, 4),
        head_inner=width,
    )


def of_weights(weights: float, width: int) -> ArbConfig:
    """Return the trunk of fewest layers that has at least so many weights.

    Raises:
        ValueError: a trunk of one layer has more, the weights have no end, or no trunk is of this width.
    """
    if width < LATENT:
        raise ValueError(f"width is {width}, but must be at least {LATENT}")
    one, two = (audit(trunk(width, layers)).weights for layers in (1, 2))
    if not one <= weights < math.inf:
        raise ValueError(
            f"weights is {weights:,.0f}, but must be finite and at least {one:,}, which one layer of width {width} has"
        )
    return trunk(width, 1 + -int((one - weights) // (two - one)))


@values_vouched_for()
def measured(
    config: ArbConfig,
    runtime: Runtime,
    world: World,
    *,
    batch: int,
    context: int,
    steps: int,
    report: dict[str, Any],
    out: Path | None,
) -> dict[str, Any]:
    """Take steps of a model, and add what each came to to the report, which is written each time.

    Raises:
        RuntimeError: a loss is not finite, or a layer did not change.
    """
    on_gpu = runtime.device == "cuda"

    def most(number: int) -> int:
        return int(max(world.gathered(torch.tensor(number))))

    def peak() -> int | None:
        return most(torch.cuda.max_memory_allocated()) if on_gpu else None

    began = time.perf_counter()
    # No copy for undoing is kept: a pass that raises ends the measurement.
    model = ArbModel(
        config,
        ops=runtime.ops(),
        device=runtime.device,
        dtype=runtime.dtype,
        seed=0,
        kept_rows=kept_rows(config, world, {}, starts_rows_anew=runtime.starts_rows_anew),
    )
    train_together(model, world, exchange=FULL)
    runtime.synchronize()
    modules = model.ternary_modules()
    weights = sum(module.weight.shape[0] * module.weight.shape[1] for module in modules.values())
    state = most(state_bytes(model))
    report |= {
        "weights": weights,
        "state_bytes": state,
        "bytes_a_weight": state / weights,
        "build_seconds": time.perf_counter() - began,
        "build_peak_bytes": peak(),
    }
    written(world, out, report)
    generator = torch.Generator().manual_seed(world.number)
    ids_BT = torch.randint(NUM_BYTES, (batch, context), generator=generator).to(runtime.device)
    gates = [module.weight for name, module in modules.items() if name.endswith("moe.gate")]
    # As the layout keeps them, so that looking takes no memory.
    watched = [as_bytes(each) for gate in (gates[0], gates[-1]) for each in trits_of(gate)]
    for step in range(steps):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = [trits.clone() for trits in watched]
        began = time.perf_counter()
        losses = model.losses(ids_BT)
        runtime.synchronize()
        forward = time.perf_counter()
        if not model.backward(losses, rate=float(config.theta), step=step, undo=False):
            raise RuntimeError(f"the loss of step {step} is not finite")
        runtime.synchronize()
        backward = time.perf_counter()
        model.step()
        runtime.synchronize()
        ended = time.perf_counter()
        step_peak = peak()
        changed = [
            float((trits != old).sum(dtype=torch.float64)) / trits.numel()
            for trits, old in zip(watched, before, strict=True)
        ]
        report["steps"].append(
            {
                "bits_per_byte": float(losses["bytes"].detach()) / NATS_PER_BIT,
                "forward_seconds": forward - began,
                "backward_seconds": backward - forward,
                "step_seconds": ended - backward,
                "changed_bytes_of_trits": changed,
                "peak_bytes": step_peak,
            }
        )
        written(world, out, report)
        if min(changed) == 0.0:
            raise RuntimeError(f"step {step} changed no trit of the first or of the last layer")
    return {}


def state_bytes(model: ArbModel) -> int:
    """Return the bytes of memory that this rank keeps of the weights of a model."""
    # Accumulators that another rank keeps have a shape here, and no memory. Those of some rows lie beside the weight.
    buffers = (each for module in model.ternary_modules().values() for each in module.buffers(recurse=False))
    return sum(each.untyped_storage().nbytes() for each in buffers)


def written(world: World, out: Path | None, report: dict[str, Any]) -> None:
    """Write the report on the first rank alone."""
    if world.is_first:
        parts.write(out, report)


def trits_of(weight: LaidOutWeight) -> list[Tensor]:
    """Return the tensors of a weight that hold its trits, as its layout keeps them."""
    return [each for name, each in weight.tensors().items() if name not in BESIDE_TRITS]


def told(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    lines = [
        f"{report['weights']:,} weights in {report['layers']} layers, {report['bytes_a_weight']:.3f} bytes a weight, built in "
        f"{report['build_seconds']:.1f} s.",
        "",
        "| step | bits per byte | forward s | backward s | step s | peak GiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for number, step in enumerate(report["steps"]):
        peak = "" if step["peak_bytes"] is None else f"{step['peak_bytes'] / 2**30:.2f}"
        lines.append(
            f"| {number} | {step['bits_per_byte']:.3f} | {step['forward_seconds']:.2f} | {step['backward_seconds']:.2f} "
            f"| {step['step_seconds']:.2f} | {peak} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file, print the table; return 1 if it failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.largest", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--weights", type=float, required=True, help="at least so many, as in 90e9")
    parser.add_argument("--width", type=int, default=4096, help="of the model (4096)")
    parser.add_argument("--batch", type=int, default=1, help="windows of a step (1)")
    parser.add_argument("--context", type=int, default=128, help="bytes of a window (128)")
    parser.add_argument("--steps", type=int, default=2, help="to take (2); the first compiles kernels")
    parser.add_argument("--device", default="auto")
    machine.add_commit(parser)
    parser.add_argument("--out", type=Path, help="where to write the JSON file")
    arguments = parser.parse_args(argv)
    runtime = choose_runtime(arguments.device, None, None)
    try:
        config = of_weights(arguments.weights, arguments.width)
    except ValueError as error:
        parser.error(f"no trunk has --weights {arguments.weights:g} and --width {arguments.width}: {error}")
    with joined() as world:
        world.take_device(runtime.device)
        report: dict[str, Any] = {
            "device": machine.device_name(),
            "torch": torch.__version__,
            "commit": machine.commit_name(arguments.commit),
            "ranks": world.count,
            "layers": config.num_layers,
            "width": arguments.width,
            "batch": arguments.batch,
            "context": arguments.context,
            "steps": [],
        }
        sizes = {"batch": arguments.batch, "context": arguments.context, "steps": arguments.steps}
        way = partial(measured, config, runtime, world, **sizes, report=report, out=arguments.out)
        report |= parts.attempt(way)
        written(world, arguments.out, report)
        if "failed" in report and world.count > 1:
            # The others may wait for this rank. An exit within the block ends them.
            raise SystemExit(f"rank {world.number}: {report['failed']}")
        if world.is_first and "weights" in report:
            print(told(report))
        return parts.exit_status([report])


if __name__ == "__main__":
    sys.exit(main())
