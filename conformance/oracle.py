"""The rules once more, in plain Python integers and fractions, one element at a time.

Nothing is imported from `reference`, so that a law checked against this file can tell a wrong reference from a right one. This file
is slow on purpose, and used on small cases.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

WORD = 0xFFFFFFFF


def pack(trits: Iterable[int]) -> list[int]:
    """Return bytes of five trits each: Horner's rule from the last trit, short bytes filled with trit 0."""
    flat = list(trits)
    flat += [0] * (-len(flat) % 5)
    packed = []
    for start in range(0, len(flat), 5):
        byte = 0
        for trit in reversed(flat[start : start + 5]):
            byte = byte * 3 + trit + 1
        packed.append(byte)
    return packed


def unpack(packed: Iterable[int], count: int) -> list[int]:
    """Return the first `count` trits of packed bytes, by repeated division."""
    trits = []
    for byte in packed:
        for _ in range(5):
            byte, digit = divmod(byte, 3)
            trits.append(digit - 1)
    return trits[:count]


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Return the four words of Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def dither(group: int, group_size: int, seed: int, step: int, tensor_id: int) -> list[int]:
    """Return the G + 1 dither bytes of a group."""
    stream = b""
    for block in range(group_size // 16 + 1):
        stream += struct.pack("<4I", *philox((group, block, step, tensor_id), (seed & WORD, seed >> 32)))
    return list(stream[: group_size + 1])


def scale(level: int, mantissa_bits: int) -> Fraction:
    """Return what a stored scale level is worth."""
    exponent, mantissa = divmod(level, 2**mantissa_bits)
    return Fraction(2) ** exponent * (1 + Fraction(mantissa, 2**mantissa_bits))


def dense(weight: Any) -> list[list[float]]:
    """Return the rows of a weight in canonical form as floats, exact in double precision."""
    (num_rows, num_columns), size = weight.shape, weight.group_size
    trits = unpack(weight.packed.tolist(), num_rows * num_columns)
    rows = []
    for row, levels in enumerate(weight.exponents.tolist()):
        scales = [float(scale(level, weight.mantissa_bits)) for level in levels]
        rows.append([trits[row * num_columns + k] * scales[k // size] for k in range(num_columns)])
    return rows


def row_exponent(row: Sequence[float]) -> int | None:
    """Return V with 2**(2V - 1) <= mean of squares < 2**(2V + 1), or None for a row that casts no votes."""
    if not all(map(math.isfinite, row)):
        return None
    mean = sum(Fraction(g) ** 2 for g in row) / len(row)
    if mean == 0:
        return None
    guess = math.ceil(math.log2(mean.numerator) / 2 - math.log2(mean.denominator) / 2) + 2
    while mean < Fraction(2) ** (2 * guess - 1):
        guess -= 1
    return guess


def float32(value: Fraction) -> float:
    """Return a fraction of at most 48 significant bits rounded to float32, infinite beyond it."""
    try:
        return struct.unpack("<f", struct.pack("<f", float(value)))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def quotient(g: float, exponent: int, rate: float) -> int:
    """Return q: the gradient in 256ths of a vote."""
    scaled = float32(Fraction(g) * Fraction(2) ** (8 - exponent) * Fraction(rate))
    # Python rounds half to even.
    return round(min(max(scaled, -32768.0), 32767.0))


def vote(q: int, byte: int) -> int:
    """Return the vote that q casts under a dither byte: the floor of (q + byte) / 256, saturated."""
    return min(max(math.floor(Fraction(q + byte, 256)), -127), 127)


def votes(row: Sequence[float], rate: float, bytes_of_row: Sequence[int]) -> list[int]:
    """Return the stochastic votes of one row, given its dither bytes."""
    exponent = row_exponent(row)
    if exponent is None:
        return [0] * len(row)
    return [vote(quotient(g, exponent, rate), byte) for g, byte in zip(row, bytes_of_row, strict=True)]


def saturate(count: int) -> int:
    """Return a count held at plus and minus 127."""
    return min(max(count, -127), 127)


def exponent_vote(score: int, byte: int, rule: str) -> int:
    """Return what a group's score adds to the exponent accumulator."""
    if rule == "frozen":
        return 0
    if rule == "sign":
        return (score > 0) - (score < 0)
    return math.floor(Fraction(score + byte // 8, 32))


def step_exponent(level: int, count: int, theta: int, low: int, high: int) -> tuple[int, int]:
    """Return a scale level and its accumulator after a step."""
    if count >= theta:
        return max(level - 1, low), count - theta
    if count <= -theta:
        return min(level + 1, high), count + theta
    return level, count


def step_trit(trit: int, count: int, theta: int, on_flip: str) -> tuple[int, int]:
    """Return a trit and its accumulator after a step."""
    if count >= theta:
        return max(trit - 1, -1), 0 if on_flip == "reset" else count - theta
    if count <= -theta:
        return min(trit + 1, 1), 0 if on_flip == "reset" else count + theta
    return trit, count
