"""How many windows a micro-batch has by ``--batch auto``: as many as memory holds, measured by passes of a model of its own."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.machine_memory import free_bytes, is_full, text_of
from arbitor.optimized.training.options import Settings
from arbitor.optimized.training.passes import Passes
from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel

SHARE = 0.75
"""How much of the free memory a pass may take. What validation, a recording and a checkpoint need has to fit beside it."""

MOST_BYTES = 2**16
"""Bytes of a micro-batch at most: memory says nothing of how well a batch learns. `small` has 2**14 by default."""

NO_STEP = 2**32 - 1
"""As many micro-batches as a step can have: more than are measured."""

PROCESS = Path("/proc/self")
"""Where Linux says what memory this process has."""


@dataclass(frozen=True)
class BatchSize:
    """A number of windows, and why it is that.

    Attributes:
        windows: a power of two.
        reason: a sentence without its end mark.
    """

    windows: int
    reason: str


def most_windows(context: int) -> int:
    """Return the most windows that a micro-batch may have by memory that never ends."""
    return max(1, MOST_BYTES // context)


def fitting_batch(config: ArbConfig, settings: Settings, runtime: Runtime) -> BatchSize:
    """Return the largest power of two of windows whose pass fits memory.

    A pass of 1, 2, 4, ... windows is measured while the next one is sure to fit. The memory of a pass grows by the same
    amount for each window, so that two passes tell what the next will take. Where a step sums the gradients of several
    micro-batches, the sums are measured too.

    Args:
        config: of the model.
        settings: of the run; its batch is not read.
        runtime: where it runs.

    Raises:
        TrainingError: a pass of one window does not fit.
    """
    model = ArbModel(
        config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=settings.seed
    )
    # The sums of any number of micro-batches take the same memory, and no step is taken here.
    passes, memory = Passes(model, accum=1 if settings.summed == 1 else NO_STEP), Memory(runtime.device)
    windows, before = 1, 0
    most = most_windows(settings.context)
    while True:
        num_sums = len(model.voting.totals)
        taken = memory.of_pass(passes, windows, settings.context)
        if len(model.voting.totals) > num_sums and taken <= memory.allowed:
            # The pass made sums, which lie beside each later one.
            taken = memory.of_pass(passes, windows, settings.context)
        if taken > memory.allowed and windows > 1:
            windows, taken = windows // 2, before
            break
        if taken > memory.allowed:
            raise TrainingError(
                f"batch is 'auto', but a window of {settings.context:,} bytes takes {_gib(taken)} of memory, and a pass may take "
                f"{_gib(memory.allowed)}: a smaller --context needs less"
            )
        # Of one window it is not known yet how much grows with it.
        next_taken = 2 * taken if windows == 1 else taken + 2 * (taken - before)
        if 2 * windows > most or next_taken > memory.allowed:
            break
        windows, before = 2 * windows, taken
    del model, passes
    gc.collect()
    if runtime.device == "cuda":
        torch.cuda.empty_cache()
    plural = "" if windows == 1 else "s"
    why = (
        f"the most that auto takes of {settings.context:,} bytes"
        if 2 * windows > most
        else f"a pass takes {_gib(taken)} of {_gib(memory.allowed)}"
    )
    return BatchSize(windows, f"batch: {windows:,} window{plural}, chosen by auto: {why}")


class Memory:
    """What passes take of the memory of a device.

    Attributes:
        allowed: bytes that a pass may take beside what was taken before.
    """

    def __init__(self, device: str) -> None:
        """Look at the memory that is free now."""
        self.device = device
        self.allowed = int(SHARE * (free_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]))
        # What this process held at most before is forgotten. Where a system forbids that, a pass seems to take more than it does.
        if device == "cpu":
            with contextlib.suppress(OSError):
                (PROCESS / "clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        self._base = self._held("VmRSS", torch.cuda.memory_allocated)

    def of_pass(self, passes: Passes, windows: int, context: int) -> int:
        """Run a pass over bytes at random, and return the bytes that it took at most; 2**63 where there were too few."""
        generator = torch.Generator().manual_seed(windows)
        ids_BT = torch.randint(256, (windows, context), generator=generator)
        try:
            passes.take(ids_BT, rate=1.0, step=0)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, torch.OutOfMemoryError) or is_full(error)):
                raise
            return 2**63
        return self._held("VmHWM", torch.cuda.max_memory_allocated) - self._base

    def _held(self, of_process: str, of_device: Callable[[], int]) -> int:
        """Return the bytes that this process holds, by the name that Linux has for it, or by torch on CUDA."""
        if self.device != "cpu":
            return of_device()
        [kibibytes] = re.findall(rf"^{of_process}:\s+(\d+) kB$", text_of(PROCESS / "status"), re.M)
        return int(kibibytes) * 1024


def _gib(size: int) -> str:
    return "more than there is" if size >= 2**63 else f"{size / 2**30:,.2f} GiB"
