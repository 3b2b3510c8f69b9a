# mypy: ignore-errors
"""Rounding to a format's grid and to the types of scales, inside Triton kernels.

The same numbers as `grids_numba.py` gives, bit for bit: divisions are rounded to nearest, small
floats are rounded by the bits of their exponent, and a whole number is made by adding and
subtracting 1.5 * 2^23, which is exact up to 2^22 and rounds ties to even. Triton's own division
may be off by two units, and it has no rounding to whole numbers that its interpreter knows.

Worked example, e2m1 (least 1, step 1/2): 2.6 lies above the power 2, so the width is 1 and the
value 3; 0.3 lies below the least power, so the width is 1/2 and the value 0.5; 2.5 is a tie
between 2 and 3 and becomes 2.

Letters: P columns of a panel, R rows of a program.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from alphaquant.quant import format_rules
from alphaquant.quant.codecs import LEAST_MULTIPLE, MOST_MULTIPLE

SIGN = tl.constexpr(format_rules.SIGN)
INTEGER = tl.constexpr(format_rules.INTEGER)
ZERO_POINT = tl.constexpr(format_rules.ZERO_POINT)
FLOAT = tl.constexpr(format_rules.FLOAT)
MX = tl.constexpr(format_rules.MX)
TABLE = tl.constexpr(format_rules.TABLE)

_LEAST_MULTIPLE = tl.constexpr(float(LEAST_MULTIPLE))
_MOST_MULTIPLE = tl.constexpr(float(MOST_MULTIPLE))

_MAGIC = tl.constexpr(1.5 * 2.0**23)
_EXPONENT = tl.constexpr(0x7F800000)
_SIGN_BIT, _MAGNITUDE = tl.constexpr(0x80000000), tl.constexpr(0x7FFFFFFF)
_HALF_MAX, _HALF_TINY = tl.constexpr(65504.0), tl.constexpr(2.0**-24)
_E4M3_MAX, _E4M3_LEAST = tl.constexpr(448.0), tl.constexpr(2.0**-6)
_E4M3_STEP, _E4M3_TINY = tl.constexpr(2.0**-3), tl.constexpr(2.0**-9)

# Made anew, because triton's own is a compiled one where it was imported before the interpreter
# was asked for.
total = triton.jit(tl.sum.fn)
largest = triton.jit(tl.max.fn)
smallest = triton.jit(tl.min.fn)


class GridNumbers(NamedTuple):
    """What of a `Rule` kernels read; its kind is a constant of theirs.

    Attributes:
        factors: float32 [n], on the device.
        n_factors: n.
        low: as in `Rule`, and so are the others.
        high: likewise.
        least: likewise.
        step: likewise.
        unit: likewise.
        table: float32 [2^b] on the device, or None.
        middles: float32 [2^b - 1] on the device, or None.
        n_middles: 2^b - 1, or 0.
        is_multiple: 1 where scales are multiples, else None; constants to Triton, as kinds are.
    """

    factors: Tensor
    n_factors: int
    low: float
    high: float
    least: float
    step: float
    unit: float
    table: Tensor | None
    middles: Tensor | None
    n_middles: int
    is_multiple: int | None


@triton.jit
def zeros_of(x):
    """Zeros, float32, in the shape of x; triton's own `zeros_like` is compiled, as its sum is."""
    return tl.full(x.shape, 0.0, tl.float32)


@triton.jit
def divide(x, y):
    """X / y, rounded to nearest."""
    return tl.div_rn(x, y)


@triton.jit
def clip(x, low, high):
    """X between low and high; a NaN becomes one of them."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def round_whole(x):
    """The nearest whole numbers of |x| <= 2^22, ties to even, never minus zero."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def round_float(x, high, least, step):
    """The nearest small floats, ties to even, saturating; minus zero keeps its sign."""
    bits = clip(x, -high, high).to(tl.uint32, bitcast=True)
    magnitude = (bits & _MAGNITUDE).to(tl.float32, bitcast=True)
    power = (bits & _EXPONENT).to(tl.float32, bitcast=True)  # the power of two at or below
    width = tl.maximum(power, least) * step
    inverse = ((254 << 23) - width.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    rounded = round_whole(magnitude * inverse) * width
    signed = rounded.to(tl.uint32, bitcast=True) | (bits & _SIGN_BIT)
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def snap(scaled, numbers, KIND: tl.constexpr):
    """Scaled numbers, zero point added, to grid values."""
    if KIND == SIGN:
        values = tl.where(scaled < 0.0, -1.0, 1.0)
    elif KIND <= ZERO_POINT:
        values = round_whole(clip(scaled, numbers.low, numbers.high))
    elif KIND == TABLE:
        values = zeros_of(scaled) + tl.load(numbers.table)
        for j in range(numbers.n_middles):
            step = tl.load(numbers.table + j + 1) - tl.load(numbers.table + j)
            values += tl.where(scaled > tl.load(numbers.middles + j), step, 0.0)
    else:
        values = round_float(scaled, numbers.high, numbers.least, numbers.step)
    return values


@triton.jit
def to_half(x):
    """The nearest float16, saturating."""
    return clip(x, -_HALF_MAX, _HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def round_half(x):
    """Scales to float16, neither zero nor infinite; 1 for zeros (`codecs.round_scale`)."""
    rounded = to_half(x)
    tiny = tl.where(x < 0.0, -_HALF_TINY, _HALF_TINY)
    rounded = tl.where(rounded == 0.0, tiny, rounded)
    return tl.where(x == 0.0, 1.0, rounded)


@triton.jit
def store(x, shared, numbers, KIND: tl.constexpr):
    """Free scales to those that can be stored (`codecs.StoredScales.nearest`)."""
    if numbers.is_multiple is not None:
        ratio = divide(x, shared)
        multiple = round_whole(clip(ratio, _LEAST_MULTIPLE, _MOST_MULTIPLE))
        if KIND == INTEGER:
            multiple = tl.where(multiple == 0.0, tl.where(ratio < 0.0, -1.0, 1.0), multiple)
        scale = multiple * shared
    elif KIND == TABLE:
        scale = tl.where(x == 0.0, x, round_half(x))
    else:
        scale = round_half(x)
    return scale


@triton.jit
def round_e4m3(x):
    """Positive block scales to E4M3, never zero."""
    return tl.maximum(round_float(x, _E4M3_MAX, _E4M3_LEAST, _E4M3_STEP), _E4M3_TINY)


@triton.jit
def power_below(x):
    """The power of two at or below positive numbers; 0 for subnormal ones."""
    return (x.to(tl.uint32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
