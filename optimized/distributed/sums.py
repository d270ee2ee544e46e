"""Sums over ranks, in the order of the ranks' numbers, and gradients in eight bits on their way there.

On a GPU kernels compute, one launch each. On a CPU torch does, since a run there needs no Triton.
Legend: N rows of a gradient, K columns, R ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from arbitor.reference.graph.mxint8 import decoded, encoded


def in_order(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors, the first two first."""
    return functools.reduce(torch.add, parts)


def sum_in_order(parts: Tensor, out: Tensor) -> None:
    """Add the parts of ranks [R, ...] into `out` [...], in float32, the first two first, and round the sum once.

    parts: float32 or bfloat16.
    """
    if parts.is_cuda:
        from arbitor.optimized.kernels.parts import add_parts

        add_parts(parts, out)
    else:
        out.copy_(in_order(part.float() for part in parts))


def in_eight_bits(grad_NK: Tensor) -> Tensor:
    """Return a gradient, float32 or bfloat16, as MXINT8 has it: uint8 [bytes]."""
    if grad_NK.is_cuda:
        from arbitor.optimized.kernels.mxint8 import encode

        return encode(grad_NK)
    return encoded(grad_NK)


def sum_eight_bits(parts: Tensor, out_NK: Tensor) -> None:
    """Do as `sum_in_order` with what `in_eight_bits` returned of ranks, uint8 [R, bytes]. No decoded gradient of a rank is kept."""
    if parts.is_cuda:
        from arbitor.optimized.kernels.mxint8 import add_encoded

        add_encoded(parts, out_NK)
    else:
        out_NK.copy_(in_order(decoded(part, *out_NK.shape) for part in parts))
