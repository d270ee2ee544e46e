"""Where a model is and what it computes with, for what was asked."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from arbitor.optimized.training.runtime import OP_SETS, choose_runtime

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The dtypes of activations by name."""


def settled(
    device: torch.device | str, dtype: torch.dtype | str | None, ops: ModuleType | str | None
) -> tuple[torch.device, torch.dtype, ModuleType]:
    """Return device, dtype and op set for what was asked; see `arbitor.ArbModel`."""
    auto = device == "auto"
    try:
        place = torch.device("cpu" if auto else device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device is {device!r}, but must be auto, cpu, cuda, meta or a torch.device"
        ) from None
    # Shapes are the same with every op set.
    kind = "auto" if auto else "cpu" if place.type == "meta" else place.type
    if ops is not None and not isinstance(ops, ModuleType | str):
        raise TypeError(f"ops is a {type(ops).__name__}, but must be a module or one of {', '.join(OP_SETS)}")
    if isinstance(ops, str) and ops not in OP_SETS:
        raise ValueError(f"ops is {ops!r}, but must be a module or one of {', '.join(OP_SETS)}")
    runtime = choose_runtime(kind, ops if isinstance(ops, str) else None)
    if auto:
        place = torch.device(runtime.device)
    op_set = ops if isinstance(ops, ModuleType) else runtime.ops()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if dtype is None:
        dtype = (
            runtime.dtype if op_set is importlib.import_module(OP_SETS[runtime.backend]) else torch.float32
        )
    return place, dtype, op_set
