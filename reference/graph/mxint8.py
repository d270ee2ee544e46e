"""Gradients in eight bits, as ranks may send them: MXINT8 of the Open Compute Project's Microscaling Formats, version 1.0.

Math:    a row is cut into blocks of 32 columns. X = 2**floor(log2(largest magnitude of the block)), at least 2**-120;
         q = rint(64 g / X), clamped to -127 .. 127; the value is X q / 64
Bytes:   one for each q, and one for each X: 33/32 of a byte for an element
Special: a block that holds a NaN or an infinity is NaN; a block of zeros is zeros
Error:   at most X / 128, or X / 64 for magnitudes of 127.5/64 X and more, which are clamped
Legend:  N rows, K columns, KB = ceil(K / 32) blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Columns that share a scale."""

LEAST_EXPONENT = -120
"""Of a scale. The factor of a block and its inverse are then normal numbers of float32."""

NOT_FINITE = 255
"""The byte of a scale that stands for NaN."""

_BIAS = 127
_UNITS = 6


def encoded_bytes(num_rows: int, num_columns: int) -> int:
    """Return the bytes of an encoded gradient."""
    return num_rows * (num_columns + -(-num_columns // BLOCK))


def encoded(grad_NK: Tensor) -> Tensor:
    """Return a gradient in eight bits, uint8: the elements of all rows, then their scales.

    Args:
        grad_NK: float32 or bfloat16 [N, K].
    """
    num_rows, num_columns = grad_NK.shape
    num_blocks = -(-num_columns // BLOCK)
    padded = torch.nn.functional.pad(grad_NK.to(torch.float32), (0, -num_columns % BLOCK))
    blocks = padded.reshape(num_rows, num_blocks, BLOCK)
    largest = blocks.abs().amax(dim=2)
    finite = largest.isfinite()
    # frexp gives a fraction of at least 1/2, and 0 for 0.
    exponent = torch.frexp(torch.where(finite, largest, 0.0)).exponent - 1
    exponent = torch.where(largest > 0, exponent, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)
    units = blocks * _power_of_two(_UNITS - exponent)[..., None]
    q = units.nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    q_NK = q.reshape(padded.shape)[:, :num_columns].contiguous()
    scales = torch.where(finite, exponent + _BIAS, NOT_FINITE).to(torch.uint8)
    return torch.cat([q_NK.view(torch.uint8).flatten(), scales.flatten()])


def decoded(content: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Return the gradient that was encoded, float32 [N, K].

    Args:
        content: uint8, what `encoded` returned.
        num_rows, num_columns: N and K.
    """
    q, scales = content.split([num_rows * num_columns, content.numel() - num_rows * num_columns])
    exponent = scales.reshape(num_rows, -(-num_columns // BLOCK)).to(torch.int32)
    factors = _power_of_two(exponent.clamp(max=NOT_FINITE - 1) - _BIAS - _UNITS)
    factors = torch.where(exponent == NOT_FINITE, torch.nan, factors)
    factors_NK = factors.repeat_interleave(BLOCK, dim=1)[:, :num_columns]
    return q.view(torch.int8).reshape(num_rows, num_columns).to(torch.float32) * factors_NK


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent in float32, for int32 exponents of normal numbers. It is exact on every device, as no pow may be."""
    return ((exponent.to(torch.int32) + _BIAS) << 23).view(torch.float32)
