"""The grids that codes stand for, as plain torch arithmetic: the reference of every faster kernel.

A grid turns scaled numbers into the nearest grid values (`snap`), values into unsigned codes of at
most 8 bits (`to_codes`) and codes back into values (`to_values`). Scales and zero points live
outside: a weight is scale * (value - zero). All in float32, where every grid value is exact.

Code layouts:
    signs                 0 is -1, 1 is +1; there is no zero
    integers, symmetric   offset binary: value + 2^(b-1); values -2^(b-1) .. 2^(b-1) - 1, all used
    integers, asymmetric  value itself, 0 .. 2^b - 1
    tables                index into the table, which ascends
    floats                sign | exponent | mantissa, with subnormals, saturating; e4m3 and e5m2
                          codes equal torch's float8
    powers of two (E8M0)  exponent + 127, 0 .. 254 (255 is NaN and never written)

Sources: OCP Microscaling Formats (MX) v1.0, 5.3 and 6.3; OCP OFP8 v1.0. Rounding is to nearest,
ties to even, between -1 and +1 to +1, between two numbers of a table to the lower one.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

E8M0_BIAS = 127

TABLES: dict[str, tuple[int, ...]] = {
    "nl2": (-127, -43, 23, 99),
    "nl3": (-127, -74, -41, -15, 10, 37, 66, 106),
    "nl4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
"""Numbers that codes of non-linear formats stand for: integers, exact in float16 and bfloat16.

Those of 4 bits are the ones of llama.cpp's IQ4 types (`kvalues_iq4nl` in ggml-common.h).
"""


class Grid(Protocol):
    """What a grid can do; all methods work elementwise on any shape."""

    @property
    def low(self) -> float:
        """Smallest value."""

    @property
    def high(self) -> float:
        """Largest value."""

    def snap(self, scaled: Tensor) -> Tensor:
        """Nearest grid values (float32), saturating."""

    def to_codes(self, values: Tensor) -> Tensor:
        """Unsigned codes (uint8) of grid values."""

    def to_values(self, codes: Tensor) -> Tensor:
        """Grid values (float32) of unsigned codes."""


@dataclass(frozen=True)
class IntegerGrid:
    """Consecutive integers; `signed` takes -2^(b-1) .. 2^(b-1) - 1, else 0 .. 2^b - 1."""

    bits: int
    signed: bool

    @property
    def low(self) -> float:
        """Smallest value."""
        return -(2.0 ** (self.bits - 1)) if self.signed else 0.0

    @property
    def high(self) -> float:
        """Largest value."""
        return self.low + 2.0**self.bits - 1.0

    def snap(self, scaled: Tensor) -> Tensor:
        """Nearest integers, ties to even, saturating."""
        # Adding zero turns -0.0 into 0.0, the only zero that a code stands for.
        return scaled.round().clamp_(self.low, self.high).add_(0.0)

    def to_codes(self, values: Tensor) -> Tensor:
        """Value minus `low`, uint8."""
        return (values - self.low).to(torch.uint8)

    def to_values(self, codes: Tensor) -> Tensor:
        """Code plus `low`, float32."""
        return codes.to(torch.float32) + self.low


@dataclass(frozen=True)
class SignGrid:
    """The two values -1 and +1 of one bit."""

    @property
    def low(self) -> float:
        """Smallest value."""
        return -1.0

    @property
    def high(self) -> float:
        """Largest value."""
        return 1.0

    def snap(self, scaled: Tensor) -> Tensor:
        """Signs; +1 for zeros of either sign, and for 0 / 0, a zero under a zero scale."""
        return torch.where(scaled < 0, -1.0, 1.0)

    def to_codes(self, values: Tensor) -> Tensor:
        """0 for -1, 1 for +1, uint8."""
        return (values > 0).to(torch.uint8)

    def to_values(self, codes: Tensor) -> Tensor:
        """2 * code - 1, float32."""
        return 2.0 * codes.to(torch.float32) - 1.0


@dataclass(frozen=True)
class TableGrid:
    """Integers that lie closer together near zero; there is no zero.

    Attributes:
        table: ascending, 2^b of them.
    """

    table: tuple[int, ...]

    @property
    def low(self) -> float:
        """Smallest value, the one of largest magnitude."""
        return float(self.table[0])

    @property
    def high(self) -> float:
        """Largest value."""
        return float(self.table[-1])

    @property
    def middles(self) -> tuple[float, ...]:
        """Half way between neighbours, exact in float32."""
        return tuple((a + b) / 2 for a, b in pairwise(self.table))

    def snap(self, scaled: Tensor) -> Tensor:
        """Nearest numbers; the smallest for 0 / 0, a zero under a zero scale."""
        # Not a number is beyond every middle for bucketize, and above none of them.
        known = torch.where(torch.isnan(scaled), -torch.inf, scaled)
        middles = torch.tensor(self.middles, dtype=torch.float32, device=scaled.device)
        return self.to_values(torch.bucketize(known.contiguous(), middles))

    def to_codes(self, values: Tensor) -> Tensor:
        """Places in the table, uint8."""
        table = torch.tensor(self.table, dtype=torch.float32, device=values.device)
        return torch.bucketize(values.contiguous(), table).to(torch.uint8)

    def to_values(self, codes: Tensor) -> Tensor:
        """Numbers (float32) of codes."""
        table = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int64)]


@dataclass(frozen=True)
class FloatGrid:
    """Small floating-point numbers with subnormals.

    Attributes:
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        max_value: largest finite value; larger inputs saturate.
    """

    exponent_bits: int
    mantissa_bits: int
    max_value: float

    @property
    def low(self) -> float:
        """Smallest value."""
        return -self.max_value

    @property
    def high(self) -> float:
        """Largest value."""
        return self.max_value

    @property
    def _bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1) - 1)

    def snap(self, scaled: Tensor) -> Tensor:
        """Nearest grid values, ties to even, saturating; exact: the step is a power of two."""
        clipped = scaled.clamp(self.low, self.high)
        # frexp gives |x| in [0.5, 1) * 2^e, so floor(log2 |x|) = e - 1; subnormals share the step
        # of exponent 1 - bias.
        exponent = torch.frexp(clipped).exponent - 1
        step = power_of_two(exponent.clamp_(min=1 - self._bias) - self.mantissa_bits)
        return (clipped / step).round_().mul_(step).clamp_(self.low, self.high)

    def to_codes(self, values: Tensor) -> Tensor:
        """Sign, exponent and mantissa fields as uint8; minus zero keeps its sign bit."""
        magnitude = values.abs()
        exponent = (torch.frexp(magnitude).exponent - 1).clamp_(min=1 - self._bias)
        exponent = exponent.masked_fill_(magnitude == 0, 1 - self._bias)
        mantissa = (magnitude * power_of_two(self.mantissa_bits - exponent)).to(torch.int32)
        # A normal number's mantissa carries its leading one, which adds 1 to the exponent field.
        field = ((exponent + self._bias - 1) << self.mantissa_bits) + mantissa
        sign = torch.signbit(values).to(torch.int32) << (self.exponent_bits + self.mantissa_bits)
        return (sign | field).to(torch.uint8)

    def to_values(self, codes: Tensor) -> Tensor:
        """Values (float32) of codes, by table."""
        return self._table(codes.device)[codes.to(torch.int64)]

    def _table(self, device: torch.device) -> Tensor:
        n_magnitudes = 2 ** (self.exponent_bits + self.mantissa_bits)
        fields = torch.arange(n_magnitudes, device=device)
        exponent = fields >> self.mantissa_bits
        mantissa = (fields & (2**self.mantissa_bits - 1)) + (exponent > 0) * 2**self.mantissa_bits
        shift = exponent.clamp(min=1) - self._bias - self.mantissa_bits
        magnitudes = mantissa * power_of_two(shift)
        return torch.cat([magnitudes, -magnitudes])


def whole_grid(kind: str, *, is_signed: bool) -> SignGrid | IntegerGrid | TableGrid:
    """The grid of codes that stand for whole numbers.

    Args:
        kind: `int1` to `int8`, or a name in `TABLES`.
        is_signed: whether integers are centred; false where they have zero points.
    """
    if kind in TABLES:
        return TableGrid(TABLES[kind])
    if kind == "int1":
        return SignGrid()
    return IntegerGrid(int(kind.removeprefix("int")), is_signed)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32 for integers -127 .. 127, exact on every device.

    The bits are put together, because exp2 and pow of a device may be off by a rounding error.
    2^-127 is the float32 subnormal with the highest bit of the mantissa.
    """
    field = exponent.to(torch.int32) + 127
    return torch.where(field > 0, field << 23, 1 << 22).to(torch.int32).view(torch.float32)


def to_e8m0(exponent: Tensor) -> Tensor:
    """E8M0 bytes of integer exponents, clamped to -127 .. 127 (OCP MX 5.4.1)."""
    return (exponent.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).to(torch.uint8)


def from_e8m0(codes: Tensor) -> Tensor:
    """2^(code - 127) in float32; 2^-127 is a float32 subnormal and exact."""
    return power_of_two(codes.to(torch.int32) - E8M0_BIAS)
