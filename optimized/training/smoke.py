"""One forward pass, and one update: does a preset run here, how long does it take, how much memory (REFACTOR12).

Shape legend: B windows of a batch, T bytes of a window.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT
from arbitor.optimized.training.runtime import Runtime
from arbitor.optimized.training.schedule import GAIN


@dataclass(frozen=True)
class SmokeReport:
    """What one pass came to.

    Attributes:
        weights: logical ternary weights.
        state_bytes: canonical training state: trits, exponents and both accumulators.
        bpb: loss of the untrained model on random bytes, in bits per byte.
        forward_seconds: first forward pass; kernels are compiled in it.
        update_seconds: first backward pass and step, or None where none was asked for.
        peak_bytes: most CUDA memory that was allocated, or None on a CPU.
    """

    weights: int
    state_bytes: int
    bpb: float
    forward_seconds: float
    update_seconds: float | None
    peak_bytes: int | None


def smoke(
    preset: str, runtime: Runtime, *, context: int, batch: int, backward: bool, seed: int
) -> SmokeReport:
    """Build a preset and run it once on random bytes.

    Args:
        preset: name of a preset.
        runtime: where and how.
        context: T, at least 4.
        batch: B, at least 1.
        backward: whether to run a backward pass and a step too.
        seed: of weights, bytes and dither.

    Raises:
        ValueError: an unknown preset, or a shape that the model can't take.
        TrainingError: the loss is not finite.
    """
    from arbitor.reference.config import NUM_BYTES
    from arbitor.reference.config import preset as preset_config
    from arbitor.reference.graph import ArbModel

    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = preset_config(preset)
    model = ArbModel(config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=seed)
    weights = model.weights().values()
    num_weights = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    state_bytes = sum(weight.state_bytes for weight in weights)
    del weights
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(NUM_BYTES, (batch, context), generator=generator).to(runtime.device)

    runtime.synchronize()
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        loss = model.loss(ids_BT)
    runtime.synchronize()
    forward_seconds = time.perf_counter() - began

    update_seconds = None
    if backward:
        began = time.perf_counter()
        voted = model.backward(loss, rate=GAIN, step=0)
        model.step()
        runtime.synchronize()
        update_seconds = time.perf_counter() - began
        if not voted:
            raise TrainingError(f"the loss of preset {preset} on random bytes is not finite")
    return SmokeReport(
        weights=num_weights,
        state_bytes=state_bytes,
        bpb=loss.item() / NATS_PER_BIT,
        forward_seconds=forward_seconds,
        update_seconds=update_seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if runtime.device == "cuda" else None,
    )
