"""Products of the library whose sums stay in float32.

cuBLAS may cut a long sum into parts. Unless torch is told otherwise, it rounds the parts of a bfloat16 product to bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
