"""Products of the library whose sums run in float32 and are rounded once.

cuBLAS may cut a long sum into parts. Unless torch is told otherwise, it rounds the parts of a bfloat16 product to bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SETTING = "allow_bf16_reduced_precision_reduction"
"""The setting of `torch.backends.cuda.matmul` that lets parts be rounded."""

CUTS = f"{SETTING}_split_k"
"""The setting that lets sums be cut at all, where torch has it. Torch sets both through the first name."""

_lock = threading.Lock()
_entered = 0
_before: Any = None


@contextmanager
def float32_sums() -> Iterator[None]:
    """Keep the library from rounding parts of bfloat16 products inside of the block. Settings are left as they were found.

    Blocks may be entered within each other, and by several threads: the last one to end restores the settings.
    """
    global _entered, _before
    matmul = torch.backends.cuda.matmul
    with _lock:
        if not _entered:
            _before = _settings()
            setattr(matmul, SETTING, False if isinstance(_before, bool) else (False, _before[1]))
        _entered += 1
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                setattr(matmul, SETTING, _before)


def _settings() -> bool | tuple[bool, bool]:
    """Return what torch takes under the name `SETTING`: whether parts may be rounded, and whether there may be parts."""
    matmul = torch.backends.cuda.matmul
    rounds: bool = getattr(matmul, SETTING)
    cuts: bool | None = getattr(matmul, CUTS, None)
    return rounds if cuts is None else (rounds, cuts)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32, of two matrices or two stacks of them in float32 or bfloat16."""
    product = torch.mm if a.ndim == 2 else torch.bmm
    if a.device.type == "cuda" and a.dtype is torch.bfloat16 and a.numel() and b.numel():
        return product(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())


def rounded_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`, of two matrices or two stacks of them in float32 or bfloat16."""
    if a.device.type == "cuda" and a.dtype is dtype is torch.bfloat16:
        with float32_sums():
            return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)
    return wide_product(a, b).to(dtype)
