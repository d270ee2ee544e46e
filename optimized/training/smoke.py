"""A few training steps: does a model run here, how long does one take cold and warm, how much memory (REFACTOR12).

Shape legend: B windows of a batch, T bytes of a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from arbitor.optimized.ahead.start import awaited, compiled_ahead
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT
from arbitor.optimized.training.runtime import Runtime
from arbitor.optimized.training.schedule import GAIN
from arbitor.optimized.training.sizes import check_memory
from arbitor.reference.audit import audit
from arbitor.reference.config import NUM_BYTES, ArbConfig
from arbitor.reference.graph import ArbModel


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one pass.

    Attributes:
        forward: the forward pass and the loss.
        update: the backward pass and the step, or None where none was asked for.
    """

    forward: float
    update: float | None


@dataclass(frozen=True)
class SmokeReport:
    """What the passes came to.

    Attributes:
        weights: logical ternary weights, as the audit counts them.
        state_bytes: their canonical training state: trits, exponents and both accumulators.
        bpb: loss of the untrained model on random bytes, in bits per byte.
        build_seconds: drawing the weights.
        cold: the first pass; kernels are compiled for it, or fetched from Triton's cache.
        warm: medians of the others.
        peak_bytes: most CUDA memory that was allocated in the passes, weights included, or None on a CPU.
        compiled: what was compiled ahead of the first pass, in a sentence without its end mark, or None.
    """

    weights: int
    state_bytes: int
    bpb: float
    build_seconds: float
    cold: PassTimes
    warm: PassTimes
    peak_bytes: int | None
    compiled: str | None = None


def smoke(
    config: ArbConfig,
    runtime: Runtime,
    *,
    context: int,
    batch: int,
    backward: bool,
    seed: int,
    passes: int = 2,
) -> SmokeReport:
    """Return what some passes of a new model on random bytes took.

    Args:
        config: what to build.
        runtime: where and how.
        context: T, at least 4.
        batch: B, at least 1.
        backward: whether to run a backward pass and a step too.
        seed: of weights, bytes and dither.
        passes: how many steps to take, at least 2.

    Raises:
        ValueError: a shape that the model can't take.
        TrainingError: the loss is not finite.
    """
    check_memory(config, runtime.device)
    ahead = compiled_ahead(
        runtime,
        config=config.to_json(),
        context=context,
        windows=(batch,),
        passes="smoke",
        backward=backward,
    )
    began = time.perf_counter()
    model = ArbModel(config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=seed)
    runtime.synchronize()
    build_seconds = time.perf_counter() - began
    counted = audit(config)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(NUM_BYTES, (batch, context), generator=generator).to(runtime.device)
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    with values_vouched_for(), awaited(ahead):
        taken = [
            one_pass(model, ids_BT, runtime.synchronize, backward=backward, step=step)
            for step in range(passes)
        ]
    (loss, cold), warm = taken[0], [times for _, times in taken[1:]]
    updates = [times.update for times in warm if times.update is not None]
    return SmokeReport(
        weights=counted.weights,
        state_bytes=counted.canonical_bytes,
        bpb=loss / NATS_PER_BIT,
        build_seconds=build_seconds,
        cold=cold,
        warm=PassTimes(median(times.forward for times in warm), median(updates) if updates else None),
        peak_bytes=torch.cuda.max_memory_allocated() if runtime.device == "cuda" else None,
        compiled=None if ahead is None else ahead.finish(),
    )


def one_pass(
    model: ArbModel, ids_BT: torch.Tensor, synchronize: Callable[[], None], *, backward: bool, step: int
) -> tuple[float, PassTimes]:
    """Run one step; return the loss in nats per byte, and the times. `synchronize` waits for the device."""
    synchronize()
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        losses = model.losses(ids_BT)
    synchronize()
    forward_seconds = time.perf_counter() - began
    update_seconds = None
    if backward:
        began = time.perf_counter()
        # The rate of the flat part of a run.
        peak = GAIN * model.config.theta
        # As in a run, no copy is kept for undoing.
        voted = model.backward(losses, rate=peak, step=step, undo=False)
        model.step()
        synchronize()
        update_seconds = time.perf_counter() - began
        if not voted:
            raise TrainingError(f"the loss of {model.config.name} on random bytes is not finite")
    return losses["bytes"].item(), PassTimes(forward_seconds, update_seconds)
