"""A third implementation, of three families in plain NumPy: an example for whoever brings the rules to another framework.

    pytest conformance --impl conformance.plain_numpy --family packing --family dither --family votes

Tensors of torch come in and go out, since the suite is written with them. The arithmetic between is NumPy's. What is refused, and
in which words, is decided by `arbitor.reference.checks`, as in every implementation.

Legend: N rows, K columns, G columns a group, KG groups a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    ACCUM_MAX,
    DEFAULT_GROUP_SIZE,
    RESERVED_STEP,
    SILENT_ROW,
    TRITS_PER_BYTE,
    groups_per_row,
    packed_bytes,
)

Array = np.ndarray[Any, Any]

PLACES = 3 ** np.arange(TRITS_PER_BYTE)
"""What a digit of a packed byte counts for, the first trit's first."""

WORD = np.uint64(0xFFFFFFFF)
"""The 32 bits of a word of Philox. Products of two words fit uint64."""


def pack_trits(trits: Tensor) -> Tensor:
    """Return trits packed five to a byte, row-major."""
    checks.dtype_in("trits", trits, (torch.int8,))
    checks.values_between("trits", trits, -1, 1)
    # Digit 1 is trit 0, which fills the last byte.
    digits = np.ones(packed_bytes(trits.numel()) * TRITS_PER_BYTE, dtype=np.int64)
    digits[: trits.numel()] = trits.numpy().reshape(-1) + 1
    return torch.from_numpy((digits.reshape(-1, TRITS_PER_BYTE) @ PLACES).astype(np.uint8))


def unpack_trits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the trits of `packed` in the given shape."""
    count = math.prod(checks.sizes("shape", shape))
    checks.tensor("packed", packed, torch.uint8, (packed_bytes(count),))
    checks.weight_values("packed", "packed", packed)
    digits = packed.numpy().astype(np.int64)[:, None] // PLACES % 3
    return torch.from_numpy((digits - 1).astype(np.int8).reshape(-1)[:count].reshape(tuple(shape)))


def dither_bytes(
    group_ids: Tensor, *, group_size: int, seed: int, step: int | Tensor, tensor_id: int
) -> Tensor:
    """Return the dither of each group: one byte a place, then one for the exponent."""
    checks.dtype_in("group_ids", group_ids, (torch.int64,))
    checks.values_between("group_ids", group_ids, 0, int(WORD))
    checks.group_size(group_size)
    checks.vote_clock(seed, step, tensor_id, last_step=RESERVED_STEP)
    ids = group_ids.numpy().astype(np.uint64)
    blocks = []
    for block in range(group_size // 16 + 1):
        others = (np.full_like(ids, number) for number in (block, int(step), tensor_id))
        words = np.stack(philox((ids, *others), seed), axis=-1)
        blocks.append(np.ascontiguousarray(words.astype("<u4")).view(np.uint8))
    return torch.from_numpy(np.concatenate(blocks, axis=-1)[..., : group_size + 1].copy())


def philox(counter: Sequence[Array], seed: int) -> tuple[Array, ...]:
    """Return the four words that Philox4x32-10 makes of a counter of four words, under the key of a 64-bit seed."""
    c0, c1, c2, c3 = counter
    keys = [np.uint64(seed & int(WORD)), np.uint64(seed >> 32)]
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ keys[0], second & WORD
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ keys[1], first & WORD
        keys = [keys[0] + np.uint64(0x9E3779B9) & WORD, keys[1] + np.uint64(0xBB67AE85) & WORD]
    return c0, c1, c2, c3


def row_exponents(grad_NK: Tensor) -> Tensor:
    """Return each row's root mean square, rounded to a power of two, as its exponent."""
    checks.gradient_matrix("grad_NK", grad_NK)
    return torch.from_numpy(exponents_of(wide(grad_NK)).astype(np.int32))


def exponents_of(g_NK: Array) -> Array:
    """Return the exponent of each row of a gradient in float64, SILENT_ROW for a row that casts no votes."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean_N = np.mean(g_NK * g_NK, axis=1)
    votes_N = np.isfinite(mean_N) & (mean_N > 0)
    return np.where(votes_N, np.frexp(np.where(votes_N, mean_N, 1.0))[1] // 2, SILENT_ROW)


def stochastic_votes(
    grad_NK: Tensor,
    rate: float | Tensor,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    rows: Tensor | None = None,
) -> Tensor:
    """Return votes proportional to the gradient in units of its row's scale, rounded by dither."""
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.vote_rate(rate)
    checks.group_size(group_size)
    checks.vote_clock(seed, step, tensor_id)
    checks.rows_of(rows, grad_NK)
    num_rows, num_columns = grad_NK.shape
    groups = groups_per_row(num_columns, group_size)
    checks.row_values(rows, 2**32 // groups)
    row_N = np.arange(num_rows) if rows is None else rows.numpy()
    g_NK = wide(grad_NK)
    exponent_N = exponents_of(g_NK)
    with np.errstate(over="ignore", invalid="ignore"):
        # Exact in float64, so that the one rounding is the one to float32.
        scaled_NK = np.ldexp(g_NK, 8 - exponent_N[:, None]) * np.float64(np.float32(float(rate)))
        quotient_NK = np.rint(scaled_NK.astype(np.float32).clip(-32768, 32767))
    speaks_N = (exponent_N != SILENT_ROW) & (row_N >= 0)
    whole_NK = np.where(speaks_N[:, None], quotient_NK, 0).astype(np.int64)
    ids = torch.from_numpy(row_N.clip(min=0)[:, None] * groups + np.arange(groups))
    dither = dither_bytes(ids, group_size=group_size, seed=seed, step=step, tensor_id=tensor_id).numpy()
    dither_NK = dither[..., :group_size].reshape(num_rows, groups * group_size)[:, :num_columns]
    votes_NK = (whole_NK + dither_NK >> 8).clip(-ACCUM_MAX, ACCUM_MAX)
    return torch.from_numpy(votes_NK.astype(np.int8))


def sign_votes(grad_NK: Tensor, step_size: int) -> Tensor:
    """Return the sign of the gradient, times an integer; a row that is not finite casts no votes."""
    checks.gradient_matrix("grad_NK", grad_NK)
    checks.integer("step_size", step_size, 1, ACCUM_MAX)
    g_NK = wide(grad_NK)
    is_finite_N1 = np.isfinite(g_NK).all(axis=1, keepdims=True)
    return torch.from_numpy((np.sign(np.where(is_finite_N1, g_NK, 0)) * step_size).astype(np.int8))


def step_from_loss(loss: float, loss_ref: float, max_step: int) -> int:
    """Return the step size of the sign rule that a loss asks for."""
    checks.number("loss", loss, 0.0, math.inf)
    checks.number("loss_ref", loss_ref, 0.0, math.inf, open_low=True)
    checks.integer("max_step", max_step, 1, ACCUM_MAX)
    return max(1, min(math.ceil(min(max_step * loss / loss_ref, max_step)), max_step))


def wide(grad_NK: Tensor) -> Array:
    """Return a gradient in float64. NumPy has no bfloat16."""
    return grad_NK.detach().to(torch.float64).numpy()
