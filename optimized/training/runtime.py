"""Where a model runs and how: device, op set, number format, determinism, and signals."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, ModuleType

import torch

from arbitor.optimized import settings
from arbitor.optimized.float32_sums import float32_sums
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.options import ROWS
from arbitor.optimized.version import package_version

OP_SETS = {"reference": "arbitor.reference.ops", "triton": "arbitor.optimized.ops"}
"""The op sets that a model can be built on, by name of the backend."""


@dataclass(frozen=True)
class Runtime:
    """A device and what runs on it.

    Attributes:
        device: ``cpu`` or ``cuda``.
        backend: ``reference`` or ``triton``.
        dtype: of activations.
    """

    device: str
    backend: str
    dtype: torch.dtype

    @property
    def starts_rows_anew(self) -> bool:
        """Whether the layout of the op set lets each row of a weight begin anew (`distributed.owners.owned_rows`)."""
        return self.backend != "reference"

    def ops(self) -> ModuleType:
        """Return the op set, imported."""
        return importlib.import_module(OP_SETS[self.backend])

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Stopped(Exception):
    """A run that was asked to stop by a signal, after its checkpoint was written."""

    def __init__(self, signal_number: int, sentence: str) -> None:
        """Keep the signal and what to tell the user."""
        super().__init__(sentence)
        self.signal_number = signal_number


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGHUP while a run is under way, so that it can stop between two steps.

    A second signal acts as if nobody listened: it ends the process at once. SIGHUP is left alone where it is ignored, as by nohup.
    """

    def __init__(self, *, announced: bool = False) -> None:
        """Start with no request.

        Args:
            announced: whether a sentence on stderr says at once that the signal has come.
        """
        self.signal_number: int | None = None
        self._announced = announced

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen until the end of the block. Outside the main thread, where signals don't arrive, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_before(self, what: str) -> None:
        """End a run that was asked to stop before it did something.

        Raises:
            Stopped: it was.
        """
        if self.signal_number is not None:
            name = signal.Signals(self.signal_number).name
            raise Stopped(self.signal_number, f"stopped by {name} before {what}")

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_number = signal_number
        signal.signal(signal_number, signal.SIG_DFL)
        if self._announced:
            # Not by print, which the signal may have interrupted.
            with contextlib.suppress(OSError):
                # On a terminal the progress bar stands in the line of the cursor.
                start = b"\n" if os.isatty(2) else b""
                os.write(2, start + b"arb: stopping after this step; again to quit now.\n")


def choose_runtime(device: str = "auto", backend: str | None = None, dtype: str | None = None) -> Runtime:
    """Return where and how to run.

    A CPU takes the reference op set and float32; a GPU the Triton one and bfloat16. ``ARB_BACKEND`` changes
    the op set, ``backend`` overrides both. Triton on a CPU works only in Triton's interpreter.

    Args:
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
        backend: ``reference``, ``triton`` or None.
        dtype: ``float32``, ``bfloat16`` or None; of activations.

    Raises:
        TrainingError: the device is not there, or the op set can't run on it.
        TypeError, ValueError: an unknown name, also in ``ARB_BACKEND``.
    """
    for name, value in (("device", device), ("backend", backend), ("dtype", dtype)):
        ROWS[name].check(value)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device cuda was asked for, but torch finds no CUDA device here")
    backend = backend or settings.backend() or ("triton" if device == "cuda" else "reference")
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TrainingError(
            "backend triton runs on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1, or use reference"
        )
    dtype = dtype or ("bfloat16" if backend == "triton" and device == "cuda" else "float32")
    return Runtime(device=device, backend=backend, dtype=getattr(torch, dtype))


@contextlib.contextmanager
def deterministic(threads: int | None = None) -> Iterator[None]:
    """Make torch give the same bits for the same work, until the end of the block.

    Must be entered before the first use of CUDA in the process: cuBLAS reads its workspace setting only once.

    Args:
        threads: CPU threads to use, or None to leave their number.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads_before = torch.get_num_threads()
    mode_before = torch.get_deterministic_debug_mode()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # `use_deterministic_algorithms(True)` would import torch's compiler, which takes seconds, and a run compiles nothing with it.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Told even where it is the number that torch has: until then MKL may take fewer threads for a small product, and a resumed
    # run, which tells a number, would add up in another order.
    torch.set_num_threads(threads_before if threads is None else threads)
    try:
        # The specification sums in float32.
        with float32_sums():
            yield
    finally:
        torch.set_deterministic_debug_mode(mode_before)
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]
        torch.set_num_threads(threads_before)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"arbitor": package_version(), "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found


def device_name(runtime: Runtime) -> str:
    """Return the model of the device, for reports: the GPU's name, or the kind of CPU."""
    return torch.cuda.get_device_name() if runtime.device == "cuda" else f"cpu ({platform.machine()})"
