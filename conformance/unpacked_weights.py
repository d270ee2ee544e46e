"""Weights and activations for tests of `optimized.ops.unpacked`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized import ops as optimized_ops
from arbitor.reference import ops as reference_ops
from conformance.subject import Subject

# Not by name: `ops` has ops of the names of its files.
unpacked = import_module("arbitor.optimized.ops.unpacked")


def weight_like(
    subject: Subject, num_rows: int, num_columns: int, *, seed: int = 1, group_size: int = 12, bits: int = 0
) -> Any:
    """Return a random weight in device layout."""
    weight = reference_ops.initial_weight(
        (num_rows, num_columns), std=0.05, seed=seed, tensor_id=2, group_size=group_size
    ).with_mantissa(bits)
    return optimized_ops.from_spec(weight.to(subject.device))


def floats(subject: Subject, num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return whole numbers as floats, whose products are exact."""
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(-8, 9, (num_rows, num_columns), generator=generator).to(subject.device, dtype)
