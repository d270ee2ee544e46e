"""Tensors of any op: dtype, shape, device, and the range of their elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import tuple_of

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Activation dtypes. float16 is left out, because 2**-32 or 2**15 times an activation does not fit it."""

GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of a weight gradient that votes; bfloat16 is upcast."""


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Return dtypes as a readable list."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_tensor(name: str, value: object) -> Tensor:
    """Return `value`; refuse anything but a strided torch tensor that holds its values in memory, with no sign left to flip."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}, but must be strided: call to_dense() first")
    if value.is_neg():
        raise ValueError(
            f"{name} is a view whose sign torch has not flipped in memory, but must hold its values: call resolve_neg() first"
        )
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


def gradient_matrix(name: str, value: Tensor, allowed: Sequence[torch.dtype] = GRADIENT_DTYPES) -> None:
    """Refuse anything but a 2-D gradient with at least one column. It may have no rows, for a batch that used no row of a table."""
    dtype_in(name, value, allowed)
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [rows, columns] with at least one column"
        )


def averages(
    name: str,
    grad_NK: Tensor,
    mean_NK: Tensor,
    exponents_N: Tensor,
    out: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Refuse a gradient, its mean int8 of the same shape and the exponents int8 of its rows if they do not fit, or an `out`."""
    gradient_matrix(name, grad_NK)
    found = {"mean_NK": mean_NK, "exponents_N": exponents_N}
    if out is not None:
        tuple_of("out", out, 3, "a gradient, a mean and exponents")
        tensor("out[0]", out[0], grad_NK.dtype, grad_NK.shape)
        same_device(**{name: grad_NK}, **{"out[0]": out[0]})
        found |= {"out[1]": out[1], "out[2]": out[2]}
    for place, (part, value) in enumerate(found.items()):
        tensor(part, value, torch.int8, grad_NK.shape[: 2 - place % 2])
    same_device(**{name: grad_NK}, **found)


def last_dim(name: str, value: Tensor, size: int, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse a tensor whose dtype is not allowed or whose last dimension is not `size`."""
    dtype_in(name, value, allowed)
    if value.ndim == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but its last dimension must be {size}")


def same_shape(name: str, value: Any, other_name: str, other: Any) -> None:
    """Refuse two tensors, or weights, of different shapes."""
    if tuple(value.shape) != tuple(other.shape):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must match {other_name}, {tuple(other.shape)}"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different dtypes."""
    is_tensor(name, value)
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


def matching(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor of another dtype, shape or device than another one."""
    same_dtype(name, value, other_name, other)
    same_shape(name, value, other_name, other)
    same_device(**{other_name: other, name: value})


def values_between(name: str, value: Tensor, low: int, high: int) -> None:
    """Refuse a tensor with an element outside [low, high]; a meta tensor has no elements to look at."""
    if value.numel() == 0 or value.device.type == "meta":
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(value))
    if smallest < low or largest > high:
        worst = smallest if smallest < low else largest
        raise ValueError(f"{name} holds {worst}, but its elements must lie from {low} to {high}")


def different(name: str, value: Tensor) -> None:
    """Refuse a tensor of integers with rows in which one stands twice; a meta tensor has no elements to look at."""
    if value.numel() == 0 or value.shape[-1] == 1 or value.device.type == "meta":
        return
    ordered = value.sort(dim=-1).values
    again = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if again.numel():
        raise ValueError(f"{name} holds {int(again[0])} twice in a row, but its elements must differ there")


def some_dimension(name: str, value: Tensor) -> None:
    """Refuse a tensor without a dimension."""
    if value.ndim == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have at least one dimension")


def leading_dims(name: str, value: Tensor, size: Sequence[int], other_name: str, other: Tensor) -> None:
    """Refuse a tensor whose dimensions before the last are not `size`, which another tensor has."""
    if value.ndim == 0 or tuple(value.shape[:-1]) != tuple(size):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but its leading dimensions must match {other_name}, {tuple(other.shape)}"
        )


def float_dtype(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse a dtype that is not listed; activations have any of the default."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is a {type(dtype).__name__}, but must be a torch.dtype: {names(allowed)}")
    if dtype not in allowed:
        raise TypeError(f"{name} is {names((dtype,))}, but must be {names(allowed)}")


def last_dim_not_empty(name: str, value: Tensor) -> None:
    """Refuse a tensor without a last dimension, or with an empty one."""
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but needs a last dimension of at least 1")


def sum_of(name: str, value: Tensor | None, shape: Sequence[int], **beside: Tensor) -> None:
    """Refuse a tensor to add a result to that differs from the result in dtype, shape or device. One tensor is `beside` it."""
    if value is None:
        return
    ((other_name, other),) = beside.items()
    same_dtype(name, value, other_name, other)
    tensor(name, value, other.dtype, shape)
    same_device(**beside, **{name: value})
