"""Gradients that vote, their rates and their dither coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import integer, number
from arbitor.reference.checks.tensors import dtype_in, same_device, tensor, values_between
from arbitor.reference.checks.weights import Weight
from arbitor.reference.constants import RESERVED_STEP

MAX_RATE = 127.0
"""Largest vote rate. At this rate a gradient as large as the RMS of its row casts the largest vote of an int8."""


def vote_clock(
    seed: int, step: int | Tensor, tensor_id: int, *, last_step: int = RESERVED_STEP - 1, values: bool = True
) -> None:
    """Refuse dither coordinates that do not fit the 64-bit seed and the 32-bit counters of Philox, or a step past the last.

    If `step` is a tensor, its value is checked unless `values` is False.
    """
    integer("seed", seed, 0, 2**64 - 1)
    integer("tensor_id", tensor_id, 0, 2**32 - 1)
    if isinstance(step, Tensor):
        tensor("step", step, torch.int64, ())
        if values:
            values_between("step", step, 0, last_step)
    else:
        integer("step", step, 0, last_step)


def vote_rate(rate: float | Tensor, *, values: bool = True) -> None:
    """Refuse a rate that is neither a number in [0, 127] nor a 0-dim float32 tensor.

    If `rate` is a tensor, its value is checked unless `values` is False.
    """
    if isinstance(rate, Tensor):
        tensor("rate", rate, torch.float32, ())
        if not values or rate.device.type == "meta":
            return
        rate = float(rate.detach())
    number("rate", rate, 0.0, MAX_RATE)


def gradient_of(
    weight: Weight, name: str, value: Tensor, rows: Tensor | None, allowed: Sequence[torch.dtype]
) -> None:
    """Refuse a gradient or votes that do not fit `weight`, or the `rows` of `weight` that are updated."""
    dtype_in(name, value, allowed)
    num_rows = weight.shape[0] if rows is None else rows.shape[0]
    if tuple(value.shape) != (num_rows, weight.shape[1]):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be {(num_rows, weight.shape[1])}")
    same_device(weight=weight.exponents, **{name: value})


def fault_counter(faults: Tensor | None, grad: Tensor) -> None:
    """Refuse a counter of faulty rows that is not int64 [] on the gradient's device."""
    if faults is not None:
        tensor("faults", faults, torch.int64, ())
        same_device(grad=grad, faults=faults)
