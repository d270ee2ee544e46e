"""Gates and turns: activations between products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.reference.checks.arguments import integer
from arbitor.reference.checks.tensors import (
    FLOAT_DTYPES,
    dtype_in,
    same_device,
    same_dtype,
    same_shape,
    some_dimension,
)


def gate_inputs(
    gate: Tensor, up: Tensor, terms: Tensor | None, allowed: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Refuse a gate, the values that it lets through, and terms that do not fit each other."""
    dtype_in("gate", gate, allowed)
    some_dimension("gate", gate)
    same_dtype("up", up, "gate", gate)
    same_shape("up", up, "gate", gate)
    same_device(gate=gate, up=up)
    if terms is None:
        return
    same_dtype("terms", terms, "gate", gate)
    fits = terms.ndim == gate.ndim + 1 and terms.shape[-2] > 0
    if not fits or (*terms.shape[:-2], terms.shape[-1]) != tuple(gate.shape):
        raise ValueError(
            f"terms has shape {tuple(terms.shape)}, but must be that of gate, {tuple(gate.shape)}, with at least one term before "
            "the last dimension"
        )
    same_device(gate=gate, terms=terms)


def head_columns(shared: Tensor, own: Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse columns that all heads share, and columns of each head, that do not fit each other."""
    dtype_in("shared", shared, allowed)
    if shared.ndim == 0 or shared.shape[-1] == 0:
        raise ValueError(f"shared has shape {tuple(shared.shape)}, but needs a last dimension of at least 1")
    same_dtype("own", own, "shared", shared)
    if own.ndim != shared.ndim + 1 or own.shape[:-2] != shared.shape[:-1] or own.shape[-1] == 0:
        raise ValueError(
            f"own has shape {tuple(own.shape)}, but must be [heads, columns], with at least one column, after the dimensions "
            f"{tuple(shared.shape[:-1])} of shared"
        )
    same_device(shared=shared, own=own)


def key_columns(grad: Tensor, num_shared: int, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse the gradient of keys without a dimension of heads, or with no column behind the shared ones."""
    dtype_in("grad", grad, allowed)
    if grad.ndim < 2 or grad.shape[-1] < 2:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}, but must be [..., heads, columns] with two columns or more"
        )
    integer("num_shared", num_shared, 1, grad.shape[-1] - 1)


def turns(
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    allowed: Sequence[torch.dtype] = FLOAT_DTYPES,
    allowed_turns: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> None:
    """Refuse vectors of heads, and cosines and sines of their positions, that do not fit each other."""
    dtype_in("x", x, allowed)
    if x.ndim < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be [..., positions, heads, columns]")
    dtype_in("cosine", cosine, allowed_turns)
    same_dtype("sine", sine, "cosine", cosine)
    same_shape("sine", sine, "cosine", cosine)
    same_device(x=x, cosine=cosine, sine=sine)
    shared, own = (x.shape[-3], 1), (*x.shape[:-2], 1)
    if tuple(cosine.shape[:-1]) not in (shared, own) or not 1 <= cosine.shape[-1] <= x.shape[-1] // 2:
        raise ValueError(
            f"cosine has shape {tuple(cosine.shape)}, but must be {shared} or {own} with 1 to {x.shape[-1] // 2} angles after it"
        )
