"""What this machine can do at most, measured once a session: bytes a second of a copy, operations a second of a product."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from bench.timing import Call, GpuTimer, Timer, quantile, sample, warm_up

COPY_BYTES = 2**32
"""Size of the copied tensor; it is read and written once. Smaller where memory is short."""

MATMUL_SIZE = 8192
"""Rows, columns and depth of the measured product."""

REPEATS = 20

VENDOR = {
    "H200": (4.8e12, 989e12),
    "H100 80GB HBM3": (3.35e12, 989e12),
}
"""Bytes a second, and dense bfloat16 operations a second, of the data sheets (H200; H100 SXM), by part of the device's name."""

PLAUSIBLE = (0.5, 1.05)
"""Measured over vendor's: outside of this, either is wrong, and nothing may be divided by it."""


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device.

    Attributes:
        copy_gbps:     1e9 bytes a second, read and written, of a large copy on the device.
        matmul_tflops: 1e12 operations a second of a bfloat16 product of random 8192 x 8192 matrices.
        overhead_us:   what timing a graph of one empty-handed kernel shows: no time below it means anything.
        copy_of_vendor, matmul_of_vendor: share of the data sheet's figure; None for a device that has none here.
    """

    copy_gbps: float
    matmul_tflops: float
    overhead_us: float
    copy_of_vendor: float | None = None
    matmul_of_vendor: float | None = None

    def floor_us(self, num_bytes: float, num_ops: float) -> tuple[float, str]:
        """Return the least time for this traffic and arithmetic, in microseconds, and which of them bounds it."""
        by_bytes = num_bytes / (self.copy_gbps * 1e3)
        by_ops = num_ops / (self.matmul_tflops * 1e6)
        return (by_ops, "ops") if by_ops > by_bytes else (by_bytes, "bytes")

    def as_json(self) -> dict[str, float | None]:
        """Return the fields as a JSON object."""
        return asdict(self)


def measure(timer: Timer, device: str) -> Ceilings | None:
    """Return the ceilings of a GPU, checked against the data sheet where there is one; None for a CPU."""
    if not isinstance(timer, GpuTimer):
        return None
    with timer.current():
        ceilings = _checked(device, _copy_rate(timer), _matmul_rate(timer), _overhead(timer))
    timer.free()
    return ceilings


def _checked(device: str, bytes_per_s: float, ops_per_s: float, overhead_us: float) -> Ceilings:
    """Return ceilings; raises RuntimeError where they can't be those of the device."""
    shares: list[float | None] = [None, None]
    for part, figures in VENDOR.items():
        if part in device:
            shares = [bytes_per_s / figures[0], ops_per_s / figures[1]]
    for what, share in zip(("copy", "matrix product"), shares, strict=True):
        if share is not None and not PLAUSIBLE[0] <= share <= PLAUSIBLE[1]:
            raise RuntimeError(
                f"the measured rate of a large {what} is {share:.2f} of the data sheet's of {device}, but must be "
                f"within {PLAUSIBLE[0]} .. {PLAUSIBLE[1]}: the GPU is busy or throttled, or the figure is wrong"
            )
    rounded = [None if share is None else round(share, 3) for share in shares]
    return Ceilings(round(bytes_per_s / 1e9, 1), round(ops_per_s / 1e12, 1), round(overhead_us, 2), *rounded)


def _copy_rate(timer: GpuTimer) -> float:
    num_bytes = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.arange(num_bytes // 4, dtype=torch.int32, device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(timer, lambda: target.copy_(source))


def _matmul_rate(timer: GpuTimer) -> float:
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right = (torch.randn(shape, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * MATMUL_SIZE**3 / _median(timer, lambda: torch.mm(left, right, out=out))


def _overhead(timer: GpuTimer) -> float:
    one = torch.zeros(1, device=timer.device)
    one.add_(1.0)
    replay = timer.record(lambda: one.add_(1.0))
    return _median(timer, replay, ready=True) * 1e6


def _median(timer: GpuTimer, call: Call, *, ready: bool = False) -> float:
    warm_up(timer, call)
    return quantile(sample(timer, call, ready=timer.behind if ready else lambda: None, rounds=REPEATS), 0.5)
