"""Device functions that several kernels share: trits from words, scales from levels, dither from Philox."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """Return float32 or bfloat16 values as float32: bfloat16 is the upper half of float32's bits.

    Spelled out because the interpreter's own conversion is wrong for subnormal numbers.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """Return float32 values as DTYPE, float32 or bfloat16, rounded half to even; a NaN stays a NaN.

    Spelled out because the interpreter's own conversion truncates where it should round.
    """
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return tl.where(value == value, rounded, quiet).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value


@triton.jit
def round_half_even(value):
    """Return float32 values of at most 2**22 in size as whole numbers, half to even.

    Adding and taking away 1.5 * 2**23 leaves no bits for a fraction.
    """
    return (value + 12582912.0) - 12582912.0


@triton.jit
def power_of_two(exponents):
    """Return float32 2**e for int32 exponents in -126 .. 127."""
    return ((exponents + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_of_negative(x):
    """Return exp(x), off by a rounding or so, for float32 x of at most 0.

    `tl.exp` takes a power of two of x / log(2), whose own rounding costs as many roundings as x is large.
    """
    # exp(-120) is 0 in float32.
    bounded = tl.maximum(x, -120.0)
    twos = round_half_even(bounded * 1.4426950408889634)
    # The first 16 bits of log(2), so that its product is exact, and then the rest.
    rest = (bounded - twos * 0.693145751953125) - twos * 1.4286068203094172e-06
    # The series of exp, as far as float32 goes for at most log(2) / 2.
    series = 1.0 / 720 + rest * (1.0 / 5040)
    series = 1.0 / 120 + rest * series
    series = 1.0 / 24 + rest * series
    series = 1.0 / 6 + rest * series
    series = 0.5 + rest * series
    series = 1.0 + rest * (1.0 + rest * series)
    # 2**-173 is no float32, so half of the exponent is taken at a time.
    exponents = twos.to(tl.int32)
    result = series * power_of_two(exponents >> 1) * power_of_two(exponents - (exponents >> 1))
    return tl.where(x == x, result, x)


@triton.jit
def lane_trits(words, lanes):
    """Return the trits (int32) at two-bit `lanes` of int32 `words`: one shift takes a lane up, another down with its sign."""
    return (words << (30 - 2 * lanes)) >> 30


@triton.jit
def known_columns(num_columns, STEP: tl.constexpr):
    """Return `num_columns`, a multiple of STEP, so that the compiler sees it: it may then read STEP elements of a row at once."""
    if STEP == 1:
        return num_columns
    else:
        return num_columns // STEP * STEP


@triton.jit
def level_scales(levels, MANTISSA_BITS: tl.constexpr):
    """Return float32 scales of int8 levels E * 2**b + m. With another bias, the level is the top of the float's bits."""
    bits = (levels.to(tl.int32) + (127 << MANTISSA_BITS)) << (23 - MANTISSA_BITS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def lane_weights(words, lanes, scales):
    """Return float32 T * S for the trits at two-bit `lanes` of int32 `words`.

    The low bit of a lane says that the trit is not zero, the high bit that it is negative. So the product is the bits of the
    scale, masked and signed. A conversion and a multiplication would take slower pipes than these integer operations.
    """
    code = words >> (2 * lanes)
    bits = scales.to(tl.int32, bitcast=True) | ((code & 2) << 30)
    return (bits & -(code & 1)).to(tl.float32, bitcast=True)


@triton.jit
def clock_step(step, STEP_ON_DEVICE: tl.constexpr):
    """Return the dither step as a uint32, from an argument or from device memory."""
    if STEP_ON_DEVICE:
        word = tl.load(step).to(tl.uint32)
    else:
        word = step.to(tl.uint32, bitcast=True)
    return word


@triton.jit
def philox_words(group_ids, block, step, tensor_id, seed_low, seed_high):
    """Return the four uint32 words of one Philox4x32-10 call per group; `block` is an integer or broadcasts."""
    c0 = group_ids.to(tl.uint32)
    zero = c0 ^ c0
    return tl.philox_impl(
        c0,
        zero + block.to(tl.uint32),
        zero + step,
        zero + tensor_id.to(tl.uint32, bitcast=True),
        zero + seed_low.to(tl.uint32, bitcast=True),
        zero + seed_high.to(tl.uint32, bitcast=True),
    )


@triton.jit
def word_bytes(w0, w1, w2, w3, places):
    """Return byte `places % 16` of four little-endian words, as int32."""
    index = (places % 16) // 4
    word = tl.where(index == 0, w0, tl.where(index == 1, w1, tl.where(index == 2, w2, w3)))
    return ((word >> (8 * (places % 4)).to(tl.uint32)) & 0xFF).to(tl.int32)
