"""The constants of the format and of the rules, with their units, and the sizes that follow from them.

Legend: K columns (inputs, or width), G columns a group, KG = ceil(K / G) groups a row, b mantissa bits.
"""

from __future__ import annotations

TRITS_PER_BYTE = 5
"""Trits in one packed byte; 3**5 = 243 values."""

MAX_PACKED_BYTE = 242
"""Largest valid packed byte; 243 to 255 encode nothing and are rejected."""

GROUP_SIZES = (6, 12, 16, 24, 32, 48, 64, 96)
"""Allowed columns per exponent. The seeds call 12 "T32"."""

DEFAULT_GROUP_SIZE = 12
"""Columns per exponent unless said otherwise."""

EXPONENT_MIN, EXPONENT_MAX = -32, 15
"""Range of the exponent E, in powers of two. Updates saturate at the bounds of `level_range`, which for b = 0 are these two."""

NUM_EXPONENTS = EXPONENT_MAX - EXPONENT_MIN + 1
"""Exponents that a group can have."""

MANTISSA_BITS = (0, 1, 2)
"""Allowed mantissa bits b of a scale. With more than two, 2**b * EXPONENT_MIN would not fit an int8."""

DEFAULT_MANTISSA_BITS = 2
"""Mantissa bits of a model's weights unless said otherwise. A full count then moves a scale by a quarter or less, not by an
octave."""

ACCUM_MAX = 127
"""Accumulators saturate at plus and minus this many votes, so -128 never occurs."""

VOTED_IN = ("trit_accum", "exponent_accum")
"""The tensors of a weight that a vote changes. Every layout has them."""

BESIDE_TRITS = ("exponents", *VOTED_IN)
"""The tensors of a weight that every layout has. The other tensor of a weight holds its trits."""

DEFAULT_THETA = 64
"""Votes after which a trit moves by one level."""

DEFAULT_THETA_E = 127
"""Votes after which an exponent moves by one level."""

DEFAULT_ORTHOGONAL_STEPS = 3
"""Newton-Schulz steps that orthogonalise the gradient of a matrix before it votes."""

MAX_ORTHOGONAL_STEPS = 10
"""Most Newton-Schulz steps. Ten steps raise a direction of 2^-17 of the norm to 1, and a smaller direction is noise."""

ORTHOGONAL_ROUND = 3
"""Most Newton-Schulz steps of a round, which multiplies the gradient once."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in a step. A singular value grows up to 3.44-fold while small, and never beyond 1.21."""

AVERAGE_EXPONENT_MIN, AVERAGE_EXPONENT_MAX = -128, 121
"""Exponents of the rows of a gradient's mean. With 7 bits above them, the upper end is that of float32."""

AVERAGE_MEMORY_MAX = 6
"""Longest memory of a gradient's mean, which then moves by a 64th of its way. A longer one would seldom move by half a step."""

MIN_ORTHOGONAL_RANK = 32
"""Smaller side from which on the gradient of a matrix is orthogonalised. A narrower matrix has few directions to even out."""

SCORE_SHIFT = 5
"""k of the score rule: a group's score counts for 2**-k votes on its exponent."""

EXPONENT_RULES = ("score", "sign", "frozen")
"""How a group's score votes on its exponent: by size, by sign, or not at all."""

ON_FLIP = ("reset", "carry")
"""What the accumulator of a trit holds after the trit moved: nothing, or the votes beyond theta."""

INIT_NONZERO = 0.617
"""Share of non-zero trits at the start: P(|z| > 0.5) for z ~ N(0, 1)."""

INIT_LOW_BYTE, INIT_HIGH_BYTE = 79, 177
"""A dither byte below the first number starts a trit at -1. A byte from the second number on starts it at +1. Together these are
79 + 79 of 256 values, 61.7 %."""

DEFAULT_EPS = 1e-6
"""Number added to the mean square of RMSNorm, so that a row of zeros stays a row of zeros."""

SILENT_ROW = 1 << 15
"""Row exponent of a gradient row that casts no votes because its mean square is zero or not finite."""

RESERVED_STEP = 0xFFFFFFFF
"""Dither step of the initialisation; updates use the steps below it."""


MAX_CODE_DIM = 128
"""Most columns of a codebook. Up to this width every sum of the search is exact in float32, in any order."""

CODE_EXPONENT_MIN, CODE_EXPONENT_MAX = -5, 2
"""Range to which the search clamps the exponents of a codebook."""

QUERY_STEPS, QUERY_MAX = 16, 127
"""Fineness and bound of a vector in a search: it is rounded to whole sixteenths, from -127 to 127 of them."""

ROUTER_OCTAVES = 16
"""Octaves that an exponent of a router may lie below the largest. The choice of experts raises smaller exponents to that bound."""

HANDICAP_STEPS = 64
"""Steps of an expert's handicap that are one unit of the router's logit."""

HANDICAP_MAX = 2**15 - 1
"""Largest handicap, 512 units of a logit. The least handicap of a router is 0."""

HANDICAP_MOVE = 16
"""Steps by which a handicap moves in a training step for an expert that has twice its share, or none."""

MAX_ROUTER_COLUMNS = 2**27
"""Most columns of a router's weight. A term of a score has at most 7 bits of a vector, 3 bits of a level and 16 octaves. A sum of
2**27 terms therefore has 53 bits, and is exact in float64 in any order."""

MAX_SIGN_BITS = 30
"""Most columns whose signs may number the buckets of a codebook."""

USAGE_MAX = 32767
"""Largest count of uses of a code. Counts saturate there."""

STRENGTH_MAX = 127
"""Largest strength of a memory row. Strengths saturate there."""

MAX_ORDER = 16
"""Most codes of an n-gram."""

ALIVE_QUERY = 8
"""Sixteenths from which on an element of a vector gives its sign to a revived code. A smaller element gives 0."""

MAX_NEIGHBOURS = 16
"""Most neighbours of a node in a table. The signs of a row then fit one word."""

SCORE_MAX = 127
"""Largest score of a neighbour. Scores saturate there."""


def groups_per_row(num_columns: int, group_size: int) -> int:
    """Return KG = ceil(K / G), the number of exponents of a row of K columns."""
    return -(-num_columns // group_size)


def packed_bytes(num_trits: int) -> int:
    """Return the canonical packed size of `num_trits` trits, in bytes."""
    return -(-num_trits // TRITS_PER_BYTE)


def level_range(mantissa_bits: int) -> tuple[int, int]:
    """Return the smallest and largest stored scale level E * 2**b + m for b mantissa bits."""
    return EXPONENT_MIN << mantissa_bits, ((EXPONENT_MAX + 1) << mantissa_bits) - 1


CONTEXT_LEVELS = 8
"""Number of block sizes in the view of a position on a long past. With blocks of 64 the largest block holds a million positions."""

CONTEXT_CHILDREN = 4
"""Blocks of a level that make one block of the next level."""


def orthogonal_rounds(iterations: int) -> list[int]:
    """Return how many steps of `orthogonalize` each round has: all of at most ORTHOGONAL_ROUND steps, and one of more.

    The small directions of S sink below its rounding when they are squared, and each step of a round raises their errors
    twelvefold. After a round of three a singular value may lie above 1.264 in bfloat16, from where each further step raises it
    without end. A step that is a round stays below 1.21.
    """
    return [iterations] if iterations <= ORTHOGONAL_ROUND else [1] * iterations
