"""The conversion of float matrices to ternary weights, and its loss: the start from a model that somebody trained in float.

Legend: N rows, K columns, G columns a group, KG groups a row, L levels tried, b mantissa bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.constants import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_MANTISSA_BITS,
    groups_per_row,
    level_range,
)
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize, group_scales
from arbitor.reference.types import TernaryWeight

OCTAVES_ABOVE = 1
"""Octaves above the largest magnitude of a group in which the best scale is searched for."""

PART_ELEMENTS = 2**24
"""Most elements of a matrix that are converted together, 128 MiB of float64."""


@dataclass(frozen=True)
class Loss:
    """The loss of a matrix that became ternary.

    Fields:
        shape:     (N, K).
        error:     norm of the difference over the norm of the matrix, 0 for a matrix of zeros.
        zero_part: share of trits that are 0.
    """

    shape: tuple[int, int]
    error: float
    zero_part: float


def ternarize(
    w_NK: Tensor, *, group_size: int = DEFAULT_GROUP_SIZE, mantissa_bits: int = DEFAULT_MANTISSA_BITS
) -> TernaryWeight:
    """Return the ternary weight that is nearest to a float matrix, with empty accumulators.

    Math:    by group, the least sum of squares (w - S T)^2 over all T in {-1, 0, 1} and all scales S of the format. For a
             scale the best trit is sign(w) where |w| > S / 2, else 0. The best scale of all reals is a mean of the largest
             magnitudes, so that it lies between max|w| / G and max|w|: levels up to an octave beyond either are tried
    Shapes:  w float32, bfloat16 or float64 [N, K], finite
    Returns: TernaryWeight (N, K). Ties go to the smaller level; a group of zeros has the smallest
    Raises:  TypeError or ValueError for another dtype or shape, an element that is not finite, or a format that is not allowed
    Laws:    no other trits and level of a group are nearer; a ternary weight of the same format comes back as it was, but for
             levels of groups of zeros; a power of two times w moves levels alone, within the range
    Source:  docs/spec/convert.md
    """
    checks.matrix("w_NK", w_NK, checks.FLOAT_DTYPES)
    checks.group_size(group_size)
    checks.mantissa_bits(mantissa_bits)
    if not bool(w_NK.isfinite().all()):
        raise ValueError("w_NK holds an element that is not finite, but all must be")
    num_rows, num_columns = w_NK.shape
    step = max(1, PART_ELEMENTS // num_columns)
    parts = [
        _nearest(w_NK[first : first + step].to(torch.float64), group_size, mantissa_bits)
        for first in range(0, num_rows, step)
    ]
    trits, levels = (torch.cat(part) for part in zip(*parts, strict=True))
    return weight_of_trits(trits, levels, group_size, mantissa_bits=mantissa_bits)


def _nearest(w_NK: Tensor, group_size: int, mantissa_bits: int) -> tuple[Tensor, Tensor]:
    """Return the trits int8 [N, K] and the levels int8 [N, KG] that are nearest to a matrix in float64."""
    num_columns = w_NK.shape[1]
    groups = groups_per_row(num_columns, group_size)
    magnitude = F.pad(w_NK.abs(), (0, groups * group_size - num_columns)).unflatten(1, (groups, group_size))
    low, high = level_range(mantissa_bits)
    # The exponent of the largest magnitude, frexp's minus one: 2**E <= max|w| < 2**(E + 1).
    top_NG = torch.frexp(magnitude.amax(dim=-1)).exponent.to(torch.int64) - 1
    first_NG = (top_NG - math.ceil(math.log2(group_size)) - 1) << mantissa_bits
    count = (math.ceil(math.log2(group_size)) + 2 + OCTAVES_ABOVE) << mantissa_bits
    best_error = torch.full_like(magnitude[..., 0], torch.inf)
    best_level = torch.full_like(top_NG, low)
    for offset in range(count):
        level_NG = (first_NG + offset).clamp(low, high)
        scale_NG = group_scales(level_NG.to(torch.int8), mantissa_bits=mantissa_bits).to(torch.float64)
        scale = scale_NG[..., None]
        error = torch.where(magnitude > scale / 2, magnitude - scale, magnitude).square().sum(dim=-1)
        nearer = error < best_error
        best_error = torch.where(nearer, error, best_error)
        best_level = torch.where(nearer, level_NG, best_level)
    # A group of zeros has no magnitude to fit.
    best_level = torch.where(magnitude.amax(dim=-1) > 0, best_level, low)
    levels = best_level.to(torch.int8)
    scale_NG = group_scales(levels, mantissa_bits=mantissa_bits).to(torch.float64)
    scale_NK = scale_NG.repeat_interleave(group_size, dim=1)[:, :num_columns]
    trits = torch.where(w_NK.abs() > scale_NK / 2, w_NK.sign(), 0.0).to(torch.int8)
    return trits, levels


def loss_of(w_NK: Tensor, weight: TernaryWeight) -> Loss:
    """Return the loss of a matrix that became a ternary weight.

    Raises ValueError for a weight of another shape.
    """
    if tuple(w_NK.shape) != weight.shape:
        raise ValueError(f"weight has shape {weight.shape}, but must have that of w_NK, {tuple(w_NK.shape)}")
    wide = w_NK.to(torch.float64)
    norm = float(wide.norm())
    difference = float((wide - dequantize(weight, dtype=torch.float64)).norm())
    zeros = int((trits_of(weight) == 0).sum())
    return Loss(weight.shape, difference / norm if norm else 0.0, zeros / math.prod(weight.shape))


def ternarize_all(
    matrices: Mapping[str, Tensor],
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    mantissa_bits: int = DEFAULT_MANTISSA_BITS,
) -> tuple[dict[str, TernaryWeight], dict[str, Loss]]:
    """Return the ternary weights of the float matrices of a state dict, and the loss of each. Other tensors are left out.

    Args:
        matrices: tensors by name. A tensor of more than two dimensions is taken as rows, as a convolution's weight is.

    Raises TypeError or ValueError as `ternarize`, with the name of the tensor.
    """
    if not isinstance(matrices, Mapping):
        raise TypeError(f"matrices is a {type(matrices).__name__}, but must be a mapping of names to tensors")
    weights, losses = {}, {}
    for name, tensor in matrices.items():
        checks.is_tensor(name, tensor)
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        w_NK = tensor.detach().flatten(1)
        try:
            weights[name] = ternarize(w_NK, group_size=group_size, mantissa_bits=mantissa_bits)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        losses[name] = loss_of(w_NK, weights[name])
    return weights, losses
