"""What is refused, and in which words: one sentence that names the argument, the value and what is allowed.

Shared by `reference` and `optimized`, so that both refuse the same inputs with the same exception. No arithmetic here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference.types import (
    ACCUM_MAX,
    GROUP_SIZES,
    MANTISSA_BITS,
    RESERVED_STEP,
    groups_per_row,
)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Activation dtypes. float16 is out: 2**-32 and 2**15 times an activation do not fit it."""

GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of a weight gradient that votes; bfloat16 is upcast."""

MAX_RATE = 127.0
"""Largest vote rate: at one row RMS of gradient, the vote then fills its int8."""


class Weight(Protocol):
    """What a check reads of a weight, in canonical form or in any device layout."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    @property
    def exponents(self) -> Tensor:
        """The exponents, on the weight's device."""
        ...


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Return dtypes as a readable list."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_tensor(name: str, value: object) -> Tensor:
    """Refuse anything but a torch tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a torch.Tensor")
    return value


def dtype_in(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a tensor of a dtype that is not listed."""
    is_tensor(name, value)
    if value.dtype not in allowed:
        raise TypeError(f"{name} has dtype {names((value.dtype,))}, but must be {names(allowed)}")


def tensor(name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Refuse a tensor of another dtype or shape."""
    dtype_in(name, value, (dtype,))
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be {tuple(shape)}")


def matrix(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse anything but a 2-D tensor of an allowed dtype with at least one row and column."""
    dtype_in(name, value, allowed)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [rows, columns] with at least one of each"
        )


def gradient_matrix(name: str, value: Tensor) -> None:
    """Refuse anything but a 2-D gradient with at least one column; a batch that used no row of a table has no rows."""
    dtype_in(name, value, GRADIENT_DTYPES)
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [rows, columns] with at least one column"
        )


def last_dim(name: str, value: Tensor, size: int, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse a tensor whose dtype is not allowed or whose last dimension is not `size`."""
    dtype_in(name, value, allowed)
    if value.ndim == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but its last dimension must be {size}")


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different shapes."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must match {other_name}, {tuple(other.shape)}"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different dtypes."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {names((value.dtype,))}, but must match {other_name}, {names((other.dtype,))}"
        )


def same_device(**tensors: Tensor) -> None:
    """Refuse tensors on different devices."""
    (first_name, first), *rest = tensors.items()
    for name, value in rest:
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device}, but must be on {first.device}, where {first_name} is"
            )


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return `shape` as (N, K); refuse anything but two positive integers."""
    values = tuple(shape)
    if len(values) != 2 or not all(isinstance(size, int) and size > 0 for size in values):
        raise ValueError(f"{name} is {values}, but must be two positive integers (rows, columns)")
    return values[0], values[1]


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not listed."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def group_size(value: int) -> None:
    """Refuse a group size that is not allowed."""
    one_of("group_size", value, GROUP_SIZES)


def mantissa_bits(value: int) -> None:
    """Refuse a number of mantissa bits that is not allowed."""
    one_of("mantissa_bits", value, MANTISSA_BITS)


def integer(name: str, value: int, low: int, high: int) -> None:
    """Refuse anything but an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be an integer from {low} to {high}")


def number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse anything but a finite number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite or not low <= value <= high or (open_low and value == low):
        relation = "above" if open_low else "from"
        raise ValueError(f"{name} is {value}, but must be finite, {relation} {low} to {high}")


def threshold(name: str, value: int) -> None:
    """Refuse a theta that an accumulator cannot reach."""
    integer(name, value, 1, ACCUM_MAX)


def vote_clock(
    seed: int, step: int | Tensor, tensor_id: int, *, last_step: int = RESERVED_STEP - 1, values: bool = True
) -> None:
    """Refuse dither coordinates that do not fit Philox, a 64-bit seed and two 32-bit counters, or a step past the last.

    The value of a step that is a tensor is looked at unless `values` is False.
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

    The value of a rate that is a tensor is looked at unless `values` is False.
    """
    if isinstance(rate, Tensor):
        tensor("rate", rate, torch.float32, ())
        if not values or rate.device.type == "meta":
            return
        rate = float(rate)
    number("rate", rate, 0.0, MAX_RATE)


def group_ids_fit(num_rows: int, num_columns: int, size: int) -> None:
    """Refuse a weight with more groups than the 32-bit dither counter can tell apart."""
    groups = num_rows * groups_per_row(num_columns, size)
    if groups > 2**32:
        raise ValueError(
            f"shape {(num_rows, num_columns)} has {groups} groups, but at most {2**32} can be dithered"
        )


def values_between(name: str, value: Tensor, low: int, high: int) -> None:
    """Refuse a tensor with an element outside [low, high]; a meta tensor has no elements to look at."""
    if value.numel() == 0 or value.device.type == "meta":
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(value))
    if smallest < low or largest > high:
        worst = smallest if smallest < low else largest
        raise ValueError(f"{name} holds {worst}, but its elements must lie from {low} to {high}")


def gradient_of(
    weight: Weight, name: str, value: Tensor, rows: Tensor | None, allowed: Sequence[torch.dtype]
) -> None:
    """Refuse a gradient or votes that do not fit `weight`, or the `rows` of it that are updated."""
    dtype_in(name, value, allowed)
    num_rows = weight.shape[0] if rows is None else rows.shape[0]
    if tuple(value.shape) != (num_rows, weight.shape[1]):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be {(num_rows, weight.shape[1])}")
    same_device(weight=weight.exponents, **{name: value})


def row_ids(rows: Tensor | None, device: torch.device) -> None:
    """Refuse row ids that are not int64 [R] on the device of the weight or gradient."""
    if rows is None:
        return
    dtype_in("rows", rows, (torch.int64,))
    if rows.ndim != 1:
        raise ValueError(f"rows has shape {tuple(rows.shape)}, but must be one-dimensional")
    if rows.device != device:
        raise ValueError(f"rows is on {rows.device}, but must be on {device}")


def row_values(rows: Tensor | None, num_rows: int) -> None:
    """Refuse row ids outside -1 .. num_rows - 1, or one named twice: its gradients must be summed before it votes."""
    if rows is None or rows.device.type == "meta":
        return
    values_between("rows", rows, -1, num_rows - 1)
    used = rows[rows >= 0]
    if used.unique().numel() != used.numel():
        raise ValueError("rows names a row more than once, but each must be unique; sum its gradients first")


def conv_positions(length: int, kernel_size: int, stride: int, padding: int) -> int:
    """Return the number of positions of a convolution; refuse a geometry in which no window fits."""
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    integer("stride", stride, 1, 2**31 - 1)
    integer("padding", padding, 0, 2**31 - 1)
    integer("length", length, 1, 2**63 - 1)
    if length + 2 * padding < kernel_size:
        raise ValueError(
            f"kernel_size is {kernel_size}, but the padded length is only {length + 2 * padding}"
        )
    return (length + 2 * padding - kernel_size) // stride + 1


def conv_columns(num_columns: int, kernel_size: int) -> None:
    """Refuse a weight whose columns are not a whole number of kernels."""
    if num_columns % kernel_size:
        raise ValueError(
            f"weight has {num_columns} columns, but they must be a multiple of kernel_size {kernel_size}"
        )


def conv_input(x_BCL: Tensor, num_columns: int, kernel_size: int) -> None:
    """Refuse an input that is not [B, C, L] with C * kernel_size columns of weight."""
    dtype_in("x_BCL", x_BCL, FLOAT_DTYPES)
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    if x_BCL.ndim != 3 or x_BCL.shape[1] * kernel_size != num_columns:
        raise ValueError(
            f"x_BCL has shape {tuple(x_BCL.shape)}, but must be [batch, channels, length] "
            f"with channels * {kernel_size} = {num_columns}"
        )


def conv_gradient(grad_BNP: Tensor, num_rows: int | None, positions: int) -> None:
    """Refuse a gradient that is not [B, N, P] for a convolution's output."""
    dtype_in("grad_BNP", grad_BNP, FLOAT_DTYPES)
    fits = grad_BNP.ndim == 3 and grad_BNP.shape[2] == positions and num_rows in (None, grad_BNP.shape[1])
    if not fits:
        expected = f"[batch, {'rows' if num_rows is None else num_rows}, {positions}]"
        raise ValueError(f"grad_BNP has shape {tuple(grad_BNP.shape)}, but must be {expected}")


def one_row(name: str, weight: Weight) -> None:
    """Refuse a weight of more than one row, where a vector of channels is meant."""
    if weight.shape[0] != 1:
        raise ValueError(f"{name} has shape {weight.shape}, but must have one row")


def rows_of(rows: Tensor | None, grad: Tensor) -> None:
    """Refuse row ids that are not one int64 a gradient row, on the gradient's device."""
    row_ids(rows, grad.device)
    if rows is not None and rows.shape[0] != grad.shape[0]:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}, but must be {(grad.shape[0],)}, one id a gradient row"
        )


def out_weight(out: Any, weight: Any) -> None:
    """Refuse a weight to write into that differs from the one updated in shape, format or device."""
    if out is None:
        return
    for field in ("shape", "group_size", "mantissa_bits", "device"):
        if getattr(out, field) != getattr(weight, field):
            raise ValueError(
                f"out has {field} {getattr(out, field)}, but must match weight, {getattr(weight, field)}"
            )


def fault_counter(faults: Tensor | None, grad: Tensor) -> None:
    """Refuse a counter of faulty rows that is not int64 [] on the gradient's device."""
    if faults is not None:
        tensor("faults", faults, torch.int64, ())
        same_device(grad=grad, faults=faults)


def last_dim_not_empty(name: str, value: Tensor) -> None:
    """Refuse a tensor without a last dimension, or with an empty one."""
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but needs a last dimension of at least 1")
