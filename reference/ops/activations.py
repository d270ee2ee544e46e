"""Activations: what stands between the products of a layer, and reads and writes nothing but activations.

Legend: K columns of a hidden vector, J terms; P positions, H heads, C columns of a head, R rotary columns.
Arithmetic is in float32, or float64 for float64 inputs, and is rounded once to the dtype that comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.dtypes import widened
from arbitor.reference.promises import op

__all__ = ["gated", "gated_grads", "head_keys", "head_keys_grads", "rotate"]


@op
def gated(gate: Tensor, up: Tensor, terms: Tensor | None = None) -> Tensor:
    """Return the values that a gate lets through, modulated by the sum of some terms.

    Math:    y[k] = silu(gate[k]) * up[k] * (1 + sum_j terms[j, k]), with silu(g) = g / (1 + exp(-g))
    Shapes:  gate and up [..., K], terms [..., J, K] with J of 1 or more, or None for no modulation; of one dtype, float32, bfloat16
             or float64
    Returns: dtype and shape of gate
    Raises:  TypeError or ValueError for a dtype, shape or device that is not allowed
    Laws:    linear in `up`; terms of zeros change nothing; the order of the terms does not matter
    Source:  docs/spec/activations.md; SwiGLU (Shazeer 2020)
    """
    checks.gate_inputs(gate, up, terms)
    hidden = F.silu(widened(gate)) * widened(up)
    if terms is not None:
        hidden = hidden * (1 + widened(terms).sum(dim=-2))
    return hidden.to(gate.dtype)


@op
def gated_grads(grad: Tensor, gate: Tensor, up: Tensor, terms: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the gradients of the loss with respect to the inputs of `gated`.

    Math:    f = 1 + sum_j terms[j], s = 1 / (1 + exp(-gate))
             d gate = dy f up s (1 + gate (1 - s)); d up = dy f gate s; d terms[j] = dy gate s up for every j
    Shapes:  as for `gated`, and grad like gate
    Returns: the gradients of gate and up, and with terms the one gradient that every term has, all of the dtype and shape of gate
    Raises:  TypeError or ValueError for a dtype, shape or device that is not allowed
    Laws:    the gradients of `gated` by autograd
    Source:  docs/spec/activations.md
    """
    checks.gate_inputs(gate, up, terms)
    checks.same_dtype("grad", grad, "gate", gate)
    checks.same_shape("grad", grad, "gate", gate)
    checks.same_device(gate=gate, grad=grad)
    dy, g, u = widened(grad), widened(gate), widened(up)
    s = g.sigmoid()
    factor = dy if terms is None else dy * (1 + widened(terms).sum(dim=-2))
    grads = [factor * u * (s * (1 + g * (1 - s))), factor * (g * s)]
    if terms is not None:
        grads.append(dy * (g * s * u))
    return tuple(each.to(gate.dtype) for each in grads)


@op
def head_keys(shared: Tensor, own: Tensor) -> Tensor:
    """Return the keys of all heads, which share their first columns.

    Math:    y[h] = [shared; own[h]]
    Shapes:  shared [..., R] and own [..., H, K], of one dtype, float32, bfloat16 or float64
    Returns: dtype of shared, [..., H, R + K]
    Raises:  TypeError or ValueError for a dtype, shape or device that is not allowed
    Laws:    every column keeps its bits
    Source:  docs/spec/activations.md; DeepSeek-V2 (2024), the decoupled rotary key
    """
    checks.head_columns(shared, own)
    heads = shared.unsqueeze(-2).expand(*own.shape[:-1], -1)
    return torch.cat([heads, own], dim=-1)


@op
def head_keys_grads(grad: Tensor, *, num_shared: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the loss with respect to the inputs of `head_keys`.

    Math:    d shared = sum_h dy[h, : R]; d own[h] = dy[h, R :]
    Shapes:  grad float32, bfloat16 or float64 [..., H, C]; num_shared R in 1 .. C - 1
    Returns: two tensors of the dtype of grad, [..., R] and [..., H, C - R]
    Raises:  TypeError or ValueError for a dtype, shape or number that is not allowed
    Laws:    the adjoint of `head_keys`
    Source:  docs/spec/activations.md
    """
    checks.key_columns(grad, num_shared)
    shared, own = grad.split([num_shared, grad.shape[-1] - num_shared], dim=-1)
    return widened(shared).sum(dim=-2).to(grad.dtype), own.clone()


@op
def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return vectors with their first R columns turned by the angles of their position.

    Math:    (a, b) -> (a cos - b sin, a sin + b cos) for each column pair (i, i + R / 2) with i < R / 2; other columns stay
    Shapes:  x float32, bfloat16 or float64 [..., P, H, C]; cosine and sine float32 or float64 [P, 1, R / 2], or with the
             leading dimensions of x before P; R of 2 or more, at most C
    Returns: dtype and shape of x
    Raises:  TypeError or ValueError for a dtype, shape or device that is not allowed
    Laws:    its own adjoint with the sine negated, which for a true angle also turns back; a sine of 0 and a cosine of 1 change
             nothing
    Source:  docs/spec/activations.md; Su et al. 2021 (RoFormer), in the pairs of GPT-NeoX
    """
    checks.turns(x, cosine, sine)
    width = 2 * cosine.shape[-1]
    first, rest = x.split([width, x.shape[-1] - width], dim=-1)
    a, b = widened(first).chunk(2, dim=-1)
    turned = torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)
