"""Activations. See `arbitor.reference.ops.activations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.kernels import activations
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = ["gated", "gated_grads", "head_keys", "head_keys_grads", "rotate"]


def _grads(grad: Tensor, *, gate: Tensor, up: Tensor, terms: Tensor | None) -> Mapping[str, Tensor]:
    """Return the gradients of `gated`. All terms have the same gradient, of which no copies are made."""
    found = gated_grads(grad, gate, up, terms)
    if terms is None:
        return {"gate": found[0], "up": found[1]}
    return {"gate": found[0], "up": found[1], "terms": found[2].unsqueeze(-2).expand_as(terms)}


def _key_grads(grad: Tensor, *, shared: Tensor, **_: Any) -> Mapping[str, Tensor]:
    """Return the gradients of `head_keys`."""
    of_shared, of_own = head_keys_grads(grad, num_shared=shared.shape[-1])
    return {"shared": of_shared, "own": of_own}


def _x_grad(grad: Tensor, *, cosine: Tensor, sine: Tensor, **_: Any) -> Tensor:
    """Return the gradient of `rotate` with respect to x."""
    return rotate(grad, cosine, -sine)


@op(gate=_grads, up=_grads, terms=_grads)
def gated(gate: Tensor, up: Tensor, terms: Tensor | None = None) -> Tensor:
    """See reference; float64 is not supported."""
    checks.gate_inputs(gate, up, terms, DTYPES)
    return activations.gated(gate, up, terms)


@op()
def gated_grads(grad: Tensor, gate: Tensor, up: Tensor, terms: Tensor | None = None) -> tuple[Tensor, ...]:
    """See reference; float64 is not supported. One launch makes all gradients."""
    checks.gate_inputs(gate, up, terms, DTYPES)
    checks.same_dtype("grad", grad, "gate", gate)
    checks.same_shape("grad", grad, "gate", gate)
    checks.same_device(gate=gate, grad=grad)
    return activations.gated_grads(grad, gate, up, terms)


@op(shared=_key_grads, own=_key_grads)
def head_keys(shared: Tensor, own: Tensor) -> Tensor:
    """See reference; float64 is not supported."""
    checks.head_columns(shared, own, DTYPES)
    return activations.head_keys(shared, own)


@op()
def head_keys_grads(grad: Tensor, *, num_shared: int) -> tuple[Tensor, Tensor]:
    """See reference; float64 is not supported."""
    checks.key_columns(grad, num_shared, DTYPES)
    return activations.head_keys_grads(grad, num_shared)


@op(x=_x_grad)
def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """See reference; float64 is not supported."""
    checks.turns(x, cosine, sine, DTYPES, (torch.float32,))
    return activations.rotated(x, cosine, sine)
