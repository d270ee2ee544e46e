"""Arguments that are no tensors: numbers, names, shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from arbitor.reference.constants import ACCUM_MAX, GROUP_SIZES, MANTISSA_BITS


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return `shape` as (N, K); refuse anything but two positive integers."""
    values = _sequence(name, shape)
    if len(values) != 2 or not all(_is_integer(size) and size > 0 for size in values):
        raise ValueError(f"{name} is {values}, but must be two positive integers (rows, columns)")
    return values[0], values[1]


def sizes(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of any number of dimensions; refuse anything but integers from 0 on."""
    values = _sequence(name, shape)
    for size in values:
        integer(name, size, 0, 2**63 - 1)
    return values


def device(value: torch.device | str) -> torch.device:
    """Return a device; refuse what names none."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {value!r}, but must be a device or name one, such as 'cuda:0'") from None


def _sequence(name: str, values: object) -> tuple[Any, ...]:
    """Return a sequence as a tuple; refuse anything else."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is a {type(values).__name__}, but must be a sequence of integers")
    return tuple(values)


def _is_integer(value: object) -> bool:
    """Return whether a value is an integer. A truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not listed. A float or a tensor is no integer of the list, even if the two are equal."""
    if isinstance(value, (bool, float, torch.Tensor)) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def group_size(value: int) -> None:
    """Refuse a group size that is not allowed."""
    one_of("group_size", value, GROUP_SIZES)


def mantissa_bits(value: int) -> None:
    """Refuse a number of mantissa bits that is not allowed."""
    one_of("mantissa_bits", value, MANTISSA_BITS)


def integer(name: str, value: int, low: int, high: int) -> None:
    """Refuse anything but an integer in [low, high]."""
    if not _is_integer(value):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be an integer from {low} to {high}")


def number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse anything but a finite number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a number")
    try:
        finite = math.isfinite(value)
    # An integer may lie beyond float64.
    except OverflowError:
        finite = False
    if not finite or not low <= value <= high or (open_low and value == low):
        range_ = f"above {low}" if open_low else f"at least {low}"
        if math.isfinite(high):
            range_ = f"{'above' if open_low else 'from'} {low} to {high}"
        raise ValueError(f"{name} is {value}, but must be finite, {range_}")


def normal_number(name: str, value: float, dtype: torch.dtype) -> None:
    """Refuse a positive number that is below the smallest normal number of a dtype, where it would lose bits or vanish."""
    least = torch.finfo(dtype).smallest_normal
    if value < least:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {value}, but must be at least {least}, the smallest normal {kind}")


def threshold(name: str, value: int) -> None:
    """Refuse a theta that an accumulator cannot reach."""
    integer(name, value, 1, ACCUM_MAX)


def flag(name: str, value: object) -> None:
    """Refuse anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, but must be True or False")


def tuple_of(name: str, value: object, count: int, what: str) -> None:
    """Refuse anything but a tuple of so many parts; `what` says which."""
    if not isinstance(value, tuple):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a tuple of {what}")
    if len(value) != count:
        raise ValueError(f"{name} is a tuple of {len(value)}, but must be a tuple of {what}")
