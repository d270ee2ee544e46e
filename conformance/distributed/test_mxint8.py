"""Gradients in eight bits come back as MXINT8 says: near, in known bytes, and NaN where they were not finite."""

from __future__ import annotations

import math

import pytest
import torch

from arbitor.reference.graph.mxint8 import BLOCK, LEAST_EXPONENT, decoded, encoded, encoded_bytes


def through(grad: torch.Tensor) -> torch.Tensor:
    content = encoded(grad)
    assert content.dtype is torch.uint8 and content.numel() == encoded_bytes(*grad.shape)
    return decoded(content, *grad.shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 33), (4, 96), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_values_come_back_within_a_unit_of_their_block(
    shape: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    grad = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    found = through(grad)
    assert found.dtype is torch.float32 and found.shape == shape
    for first in range(0, shape[1], BLOCK):
        block, back = grad[:, first : first + BLOCK].double(), found[:, first : first + BLOCK].double()
        for row, of_row in zip(block, back, strict=True):
            scale_of_block = 2.0 ** math.floor(math.log2(row.abs().max().item()))
            error = (of_row - row).abs()
            clamped = row.abs() > 127.5 / 64 * scale_of_block
            assert bool((error <= torch.where(clamped, 1 / 64, 1 / 128) * scale_of_block).all())


def test_multiples_of_a_unit_come_back_as_they_were() -> None:
    """Bytes that were decoded are encoded to the same bytes, so nothing is lost by a second way."""
    grad = torch.arange(-127, 128, dtype=torch.float32)[None] / 64
    found = through(grad)
    assert torch.equal(found[:, :32], grad[:, :32]) and torch.equal(through(found), found)


def test_special_blocks() -> None:
    grad = torch.ones(3, 3 * BLOCK)
    grad[0, 5], grad[1, BLOCK], grad[2] = math.inf, math.nan, 0.0
    grad[0, 2 * BLOCK :] = 2.0**-140
    found = through(grad)
    assert found[0, :BLOCK].isnan().all() and bool((found[0, BLOCK : 2 * BLOCK] == 1).all())
    assert bool((found[1, :BLOCK] == 1).all()) and found[1, BLOCK : 2 * BLOCK].isnan().all()
    assert bool((found[2] == 0).all()) and bool((found[0, 2 * BLOCK :] == 0).all())
    # The scales come last, and nothing is larger than 0 in the last row.
    assert encoded(grad)[-3:].tolist() == [LEAST_EXPONENT + 127] * 3


@pytest.mark.parametrize("below", range(-1, 7))
def test_blocks_below_the_least_scale_keep_its_unit(below: int) -> None:
    """The unit of the least scale is a 64th of it."""
    grad = torch.full((1, 3), 2.0 ** (LEAST_EXPONENT - below))
    assert torch.equal(through(grad), grad)


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 2.0**127, 1.9999, -1.9999])
def test_the_largest_magnitudes_stay_finite(value: float) -> None:
    found = through(torch.full((1, 2), value))
    assert bool(found.isfinite().all())
    assert abs(found[0, 0].item() / value - 1) < 1 / 64
