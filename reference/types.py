"""The one piece of state: a ternary weight, and the constants of its format with their units.

Legend: N rows (outputs, or table entries), K columns (inputs, or width), G columns a group, KG = ceil(K / G) groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

TRITS_PER_BYTE = 5
"""Trits in one packed byte; 3**5 = 243 values."""

MAX_PACKED_BYTE = 242
"""Largest valid packed byte; 243 to 255 encode nothing and are rejected."""

GROUP_SIZES = (6, 12, 16, 24, 32, 48, 64, 96)
"""Allowed columns per exponent. The seeds call 12 "T32"."""

DEFAULT_GROUP_SIZE = 12
"""Columns per exponent unless said otherwise."""

EXPONENT_MIN, EXPONENT_MAX = -32, 15
"""Range of the exponent E, in powers of two. Updates saturate at level_range: here, or with b mantissa bits at -32 * 2**b and
16 * 2**b - 1."""

MANTISSA_BITS = (0, 1, 2)
"""Allowed mantissa bits b of a scale; two are the most for which 2**b * EXPONENT_MIN fits an int8."""

DEFAULT_MANTISSA_BITS = 2
"""Mantissa bits of a model's weights unless said otherwise: a full count moves a scale by a quarter or less, not by an octave."""

ACCUM_MAX = 127
"""Accumulators saturate at plus and minus this many votes, so -128 never occurs."""

DEFAULT_THETA = 64
"""Votes after which a trit moves by one level."""

DEFAULT_THETA_E = 127
"""Votes after which an exponent moves by one level."""

DEFAULT_ORTHOGONAL_STEPS = 3
"""Newton-Schulz steps that orthogonalise the gradient of a matrix before it votes."""

MAX_ORTHOGONAL_STEPS = 10
"""Most of them: ten raise a direction of 2^-17 of the norm to 1, and a smaller one is noise."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in a step. A singular value grows up to 3.44-fold while small, and never beyond 1.21."""

MIN_ORTHOGONAL_RANK = 32
"""Smaller side from which the gradient of a matrix is orthogonalised; a narrower one has few directions to even out."""

SCORE_SHIFT = 5
"""k of the score rule: a group's score counts for 2**-k votes on its exponent."""

EXPONENT_RULES = ("score", "sign", "frozen")
"""How a group's score votes on its exponent: by size, by sign, or not at all."""

ON_FLIP = ("reset", "carry")
"""What a trit's accumulator holds after it reached theta: nothing, or what exceeds theta."""

INIT_NONZERO = 0.617
"""Share of non-zero trits at the start: P(|z| > 0.5) for z ~ N(0, 1)."""

INIT_LOW_BYTE, INIT_HIGH_BYTE = 79, 177
"""A dither byte below the first starts a trit at -1, from the second on at +1: 79 + 79 of 256 values, 61.7 %."""

DEFAULT_EPS = 1e-6
"""Added to the mean square of RMSNorm, so that a row of zeros stays a row of zeros."""

SILENT_ROW = 1 << 15
"""Row exponent of a gradient row that casts no votes because its mean square is zero or not finite."""

RESERVED_STEP = 0xFFFFFFFF
"""Dither step of the initialisation; updates use the steps below it."""


MAX_CODE_DIM = 128
"""Most columns of a codebook: up to there every sum of the search is exact in float32, in any order."""

CODE_EXPONENT_MIN, CODE_EXPONENT_MAX = -5, 2
"""Exponents as the search sees them: those of a codebook are clamped to this range."""

QUERY_STEPS, QUERY_MAX = 16, 127
"""A vector is searched for in whole sixteenths, from -127 to 127 of them."""

MAX_SIGN_BITS = 30
"""Most columns whose signs may number the buckets of a codebook."""

USAGE_MAX = 32767
"""Counts of use saturate here."""

STRENGTH_MAX = 127
"""Strengths of memory rows saturate here."""

MAX_ORDER = 16
"""Most codes of an n-gram."""

ALIVE_QUERY = 8
"""Sixteenths from which on a revived code takes the sign of the vector that it is made from, and below which it takes 0."""

REVIVAL_BLOCK = 255
"""Philox block of the draws that revive codes; dither uses blocks 0 to 6."""

MAX_NEIGHBOURS = 16
"""Most neighbours of a node in a table that keeps them: the signs of a row are then one word."""

SCORE_MAX = 127
"""Scores of neighbours saturate here."""


def groups_per_row(num_columns: int, group_size: int) -> int:
    """Return KG = ceil(K / G), the number of exponents of a row of K columns."""
    return -(-num_columns // group_size)


def packed_bytes(num_trits: int) -> int:
    """Return the canonical packed size of `num_trits` trits, in bytes."""
    return -(-num_trits // TRITS_PER_BYTE)


@dataclass(frozen=True)
class StateTensors:
    """What a weight can do with its state tensors, in canonical form or in a device layout."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state tensors by field name, in field order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, **tensors: Tensor) -> Self:
        """Return this weight with some state tensors exchanged; the others are shared, not copied."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        """Return this weight on `device`."""
        return self.with_tensors(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def clone(self) -> Self:
        """Return a copy that shares no memory with this weight."""
        return self.with_tensors(**{name: tensor.clone() for name, tensor in self.tensors().items()})

    @property
    def device(self) -> torch.device:
        """Device of the state tensors."""
        return next(iter(self.tensors().values())).device

    @property
    def state_bytes(self) -> int:
        """Bytes of the training state: trits, exponents and both accumulators."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


@dataclass(frozen=True)
class TernaryWeight(StateTensors):
    """A matrix of trits with one scale per group, and the integers it trains with.

    W[n, k] = T[n, k] * S[n, k // G], exact in bfloat16 and float32; S = 2**E, or a step between two powers with a mantissa.

    Fields:
        packed:          uint8 [ceil(N*K / 5)], trits row-major, first trit least significant, bytes 0..242.
        exponents:       int8 [N, KG], E in [-32, 15]. With b mantissa bits: E * 2**b + m.
        trit_accum:      int8 [N, K], T_accum in [-127, 127], votes since the trit last moved.
        exponent_accum:  int8 [N, KG], E_accum in [-127, 127], votes since the exponent last moved.
        shape:           (N, K).
        group_size:      G, one of GROUP_SIZES.
        mantissa_bits:   b, one of MANTISSA_BITS; scale = 2**E * (1 + m / 2**b).

    Raises ValueError or TypeError when the tensors do not fit each other; the values inside them are checked where
    they enter the system (`pack_trits`, `unpack_trits`, checkpoints), not on every construction.
    Source: docs/spec/update.md; state of 1/5 + 1 + 2/G bytes a weight as in REFACTOR12.
    """

    packed: Tensor
    exponents: Tensor
    trit_accum: Tensor
    exponent_accum: Tensor
    shape: tuple[int, int]
    group_size: int = DEFAULT_GROUP_SIZE
    mantissa_bits: int = 0

    def __post_init__(self) -> None:
        """Refuse tensors whose shapes, dtypes or devices do not fit each other."""
        from arbitor.reference import checks

        object.__setattr__(self, "shape", checks.matrix_shape("shape", self.shape))
        checks.group_size(self.group_size)
        checks.mantissa_bits(self.mantissa_bits)
        num_rows, num_columns = self.shape
        groups = groups_per_row(num_columns, self.group_size)
        checks.tensor("packed", self.packed, torch.uint8, (packed_bytes(num_rows * num_columns),))
        checks.tensor("exponents", self.exponents, torch.int8, (num_rows, groups))
        checks.tensor("trit_accum", self.trit_accum, torch.int8, (num_rows, num_columns))
        checks.tensor("exponent_accum", self.exponent_accum, torch.int8, (num_rows, groups))
        checks.same_device(**self.tensors())

    @classmethod
    def from_trits(
        cls, trits: Tensor, exponents: Tensor, group_size: int = DEFAULT_GROUP_SIZE, *, mantissa_bits: int = 0
    ) -> TernaryWeight:
        """Build a weight with empty accumulators from int8 trits [N, K] and int8 exponents [N, KG].

        Raises ValueError for trits outside {-1, 0, 1} or exponents outside their range, TypeError for other dtypes.
        """
        from arbitor.reference import checks
        from arbitor.reference.ops.packing import pack_trits

        checks.group_size(group_size)
        checks.mantissa_bits(mantissa_bits)
        checks.matrix("trits", trits, (torch.int8,))
        shape = (trits.shape[0], trits.shape[1])
        checks.tensor("exponents", exponents, torch.int8, (shape[0], groups_per_row(shape[1], group_size)))
        low, high = level_range(mantissa_bits)
        checks.values_between("exponents", exponents, low, high)
        return cls(
            packed=pack_trits(trits),
            exponents=exponents.clone(),
            trit_accum=torch.zeros_like(trits, memory_format=torch.contiguous_format),
            exponent_accum=torch.zeros_like(exponents, memory_format=torch.contiguous_format),
            shape=shape,
            group_size=group_size,
            mantissa_bits=mantissa_bits,
        )

    def with_mantissa(self, mantissa_bits: int) -> TernaryWeight:
        """Return the same weight with scales that move in finer steps: every level E becomes E * 2**b.

        The other tensors are shared, not copied. Raises ValueError for a number of bits that is not allowed, or a weight that
        has a mantissa; exponents are taken to be in range, as everywhere on construction.
        """
        from arbitor.reference import checks

        checks.mantissa_bits(mantissa_bits)
        if self.mantissa_bits:
            raise ValueError(
                f"weight has mantissa_bits {self.mantissa_bits}, but must have 0 to be given a mantissa"
            )
        return replace(self, exponents=self.exponents << mantissa_bits, mantissa_bits=mantissa_bits)

    def trits(self) -> Tensor:
        """Return the trits, int8 [N, K] in {-1, 0, 1}."""
        from arbitor.reference.ops.packing import unpack_trits

        return unpack_trits(self.packed, self.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W = T * S as a float tensor [N, K]."""
        from arbitor.reference.ops.scale import dequantize

        return dequantize(self, dtype=dtype)


def level_range(mantissa_bits: int) -> tuple[int, int]:
    """Return the smallest and largest stored scale level E * 2**b + m for b mantissa bits."""
    return EXPONENT_MIN << mantissa_bits, ((EXPONENT_MAX + 1) << mantissa_bits) - 1
