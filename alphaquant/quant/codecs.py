"""One interface over all formats: choose the scales of a group once, then round column by column.

RTN calls `fit` and `snap` on whole groups, GPTQ calls `fit` when it reaches a group and `snap` on
each column. How scales are chosen is the only thing that differs between format families:

    int1            float16, the mean magnitude: the least-squares scale of signs; 0 for zeros
    int symmetric   float16, may be negative: the element of largest magnitude maps to -2^(b-1),
                    so the full range is used and int2 has four levels
    int asymmetric  float16 and a b-bit zero point
    fp              float16
    mxfp            2^k per 32 inputs, k = floor(log2 amax) - emax (OCP MX v1.0, 6.3), -127 for
                    zeros
    nvfp4           E4M3 per 16 inputs times one float32 per matrix, amax(matrix) / (448 * 6)

With `search="mse"` the scale that minimizes the squared error of the group is searched around that
rule, and the rule's own scale is always among the candidates; with `search="hessian"` GPTQ weights
each column's error by its cost in its own loss (RTN, which has no Hessian, weights all alike);
with `search="minmax"` the rule's scale is used as it is.

Letters: B matrices in a batch, N rows, C columns of the group. A weight is (value - zero) * scale
in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.grids import FloatGrid, Grid, IntegerGrid, SignGrid, power_of_two
from alphaquant.spaces.formats import ELEMENTS, Format
from alphaquant.specs.scale_search import ScaleSearch

_F16_MAX = 65504.0
_F16_TINY = 2.0**-24
_E4M3 = FloatGrid(4, 3, 448.0)
_E4M3_TINY = 2.0**-9
_GLOBAL_MIN = 2.0**-117


@dataclass(frozen=True)
class GroupScales:
    """What turns the codes of one group of columns into weights.

    Attributes:
        scale: float32 [B, N], exactly as stored (float16, 2^k, or E4M3 times the matrix's
            float32).
        zero: float32 [B, N] integers, None when symmetric.
    """

    scale: Tensor
    zero: Tensor | None = None


class Codec(Protocol):
    """Scales and rounding of one format for one batch of matrices."""

    @property
    def grid(self) -> Grid:
        """The values that codes stand for."""

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """Scales to try for a group [B, N, C]; the first is the format's own rule."""


@dataclass(frozen=True)
class SignCodec:
    """Signs with float16 scales; there is nothing to search."""

    grid: SignGrid

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The mean magnitude; zero for a group of zeros, as signs have no zero of their own."""
        yield GroupScales(_to_float16(group.abs().sum(-1) / group.shape[-1]))


@dataclass(frozen=True)
class IntegerCodec:
    """Integers with float16 scales; see the file header."""

    grid: IntegerGrid
    shrinks: tuple[float, ...]

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The rule's scale, then clipped ones."""
        return self._symmetric(group) if self.grid.signed else self._asymmetric(group)

    def _symmetric(self, group: Tensor) -> Iterator[GroupScales]:
        extreme = group.gather(-1, group.abs().argmax(-1, keepdim=True)).squeeze(-1)  # [B, N]
        for shrink in self.shrinks:
            for sign in (1.0, -1.0) if len(self.shrinks) > 1 else (1.0,):
                yield GroupScales(round_scale(sign * shrink * extreme / self.grid.low))

    def _asymmetric(self, group: Tensor) -> Iterator[GroupScales]:
        low = group.amin(-1).clamp(max=0.0)
        high = group.amax(-1).clamp(min=0.0)
        for shrink in self.shrinks:
            scale = round_scale(shrink * (high - low) / self.grid.high)
            zero = (-shrink * low / scale).round_().clamp_(self.grid.low, self.grid.high)
            yield GroupScales(scale, zero)


@dataclass(frozen=True)
class FloatCodec:
    """Small floats with float16 scales."""

    grid: FloatGrid
    shrinks: tuple[float, ...]

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The scale that maps the largest magnitude to the largest value, then others."""
        largest = group.abs().amax(-1)
        for shrink in self.shrinks:
            yield GroupScales(round_scale(shrink * largest / self.grid.high))


@dataclass(frozen=True)
class MxCodec:
    """Small floats with power-of-two scales."""

    grid: FloatGrid
    emax: int
    shifts: tuple[int, ...]

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The OCP exponent, then its neighbours."""
        # frexp: amax = m * 2^e with m in [0.5, 1), so floor(log2 amax) = e - 1. OCP MX leaves open
        # which scale a block of zeros gets; 2^-127 is what published implementations write.
        largest = group.abs().amax(-1)
        exponent = torch.frexp(largest).exponent - 1 - self.emax
        exponent = exponent.masked_fill_(largest == 0, -127)
        for shift in self.shifts:
            yield GroupScales(power_of_two((exponent + shift).clamp(-127, 127)))


@dataclass(frozen=True)
class NvCodec:
    """E2M1 with E4M3 block scales under one float32 per matrix.

    Attributes:
        global_scale: float32 [B, N], each row holding its matrix's value.
    """

    grid: FloatGrid
    global_scale: Tensor
    shrinks: tuple[float, ...]

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The E4M3 scale that maps the largest magnitude to 6, then others."""
        target = group.abs().amax(-1) / self.grid.high / self.global_scale
        for shrink in self.shrinks:
            # At least the smallest E4M3 number above zero: a zero scale would lose the block.
            block = _E4M3.snap(shrink * target).clamp_(min=_E4M3_TINY)
            yield GroupScales(block * self.global_scale)


def fit(codec: Codec, group: Tensor, importance: Tensor | None = None) -> GroupScales:
    """Choose the scales of a group: the candidate of least squared error.

    Float16-scaled formats refine it by least squares where that helps. A single candidate is
    taken as it is, unless columns differ in importance.

    Args:
        codec: the format's codec for this batch.
        group: float32 [B, N, C].
        importance: float32 [B, C], weight of each column's squared error; None for equal weights.

    Returns:
        scales [B, N] and zeros [B, N].
    """
    best: GroupScales | None = None
    best_error: Tensor | None = None
    weight = None if importance is None else importance.unsqueeze(-2)  # [B, 1, C]
    tried = list(codec.candidates(group))
    if len(tried) == 1 and weight is None:
        return tried[0]
    for candidate in tried:
        error = _squared_error(codec.grid, group, candidate, weight)
        if best is None or best_error is None:
            best, best_error = candidate, error
            continue
        better = error < best_error
        best = _choose(better, candidate, best)
        best_error = torch.where(better, error, best_error)
    assert best is not None
    if not isinstance(codec, SignCodec | IntegerCodec | FloatCodec):
        return best
    refined = _least_squares_scale(codec.grid, group, best, weight)
    error = _squared_error(codec.grid, group, refined, weight)
    assert best_error is not None
    return _choose(error < best_error, refined, best)


def snap(grid: Grid, weights: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Grid values of weights; scale and zero must broadcast against them.

    Returns:
        float32 grid values (with the zero point added when asymmetric).
    """
    scaled = weights / scale
    return grid.snap(scaled if zero is None else scaled.add_(zero))


def rebuild(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Weights of grid values: (value - zero) * scale."""
    return (values if zero is None else values - zero) * scale


def make_codec(fmt: Format, search: ScaleSearch, global_scale: Tensor | None = None) -> Codec:
    """The codec of a format.

    Args:
        fmt: any quantized format.
        search: how scales are chosen, see the file header.
        global_scale: float32 [B, N], nvfp4 only, from `nv_global_scale`.
    """
    grid, searched = make_grid(fmt), search != "minmax"
    if isinstance(grid, SignGrid):
        return SignCodec(grid)
    if isinstance(grid, IntegerGrid):
        return IntegerCodec(grid, _int_shrinks(fmt.bits) if searched else (1.0,))
    if fmt.shared.scale == "e8m0":
        shifts = (0, 1) if searched else (0,)
        return MxCodec(grid, ELEMENTS[fmt.element].emax, shifts)
    if fmt.shared.scale == "e4m3":
        assert global_scale is not None
        return NvCodec(
            grid, global_scale, (1.0, 0.75, 0.85, 0.95, 1.1, 1.3) if searched else (1.0,)
        )
    return FloatCodec(grid, (1.0, 0.7, 0.8, 0.9, 1.2, 1.5) if searched else (1.0,))


def make_grid(fmt: Format) -> SignGrid | IntegerGrid | FloatGrid:
    """The grid of a format's codes."""
    if fmt.kind == "int1":
        return SignGrid()
    if not fmt.element:
        return IntegerGrid(fmt.bits, signed=fmt.symmetric)
    element = ELEMENTS[fmt.element]
    return FloatGrid(element.exponent_bits, element.mantissa_bits, element.max_value)


def nv_global_scale(weight: Tensor) -> Tensor:
    """nvfp4's float32 per matrix, amax / (448 * 6), for weights [B, N, K]; [B, 1]."""
    largest = weight.abs().amax((-1, -2)).unsqueeze(-1)
    # Kept so large that its product with 2^-9, the smallest block scale, is a normal float32.
    scale = (largest / (_E4M3.high * 6.0)).clamp(min=_GLOBAL_MIN)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        FormatError: naming the matrix.
    """
    if not bool(torch.isfinite(weight).all()):
        n_bad = int((~torch.isfinite(weight)).sum())
        raise FormatError(
            f"{name} has {n_bad} NaN or infinite weights; no format stores those: repair the "
            "checkpoint or skip the matrix"
        )


def _int_shrinks(bits: int) -> tuple[float, ...]:
    # Gaussian groups: the best clip falls from 1.0 at 8 bits to about 0.6 at 2 bits; a finer grid
    # gains < 0.5 % in error.
    if bits <= 3:
        return (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
    if bits <= 5:
        return (1.0, 0.97, 0.93, 0.89, 0.85, 0.8, 0.75, 0.7)
    return (1.0, 0.96, 0.92)


def round_scale(scale: Tensor) -> Tensor:
    """Round to float16, keep the sign, avoid zero and infinity; zero (a zero group) becomes 1."""
    rounded = _to_float16(scale)
    tiny = torch.copysign(torch.full_like(rounded, _F16_TINY), scale)
    rounded = torch.where(rounded == 0, tiny, rounded)
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def scale_step(scale: Tensor, curvature: Tensor, slope: Tensor) -> Tensor:
    """What is added to scales so that an objective falls; zero where nothing helps.

    With a step d the objective changes by d (d A - 2 r); the best one is r / A, then the scale is
    rounded to float16.

    Args:
        scale: known scales, float32.
        curvature: A, of the same shape.
        slope: r, of the same shape.
    """
    solved = scale + slope / curvature
    usable = (curvature > 0) & torch.isfinite(solved) & (solved != 0)
    step = round_scale(torch.where(usable, solved, scale)) - scale
    return torch.where((step * curvature - 2 * slope) * step < 0, step, torch.zeros_like(step))


def _to_float16(scale: Tensor) -> Tensor:
    return scale.clamp(-_F16_MAX, _F16_MAX).to(torch.float16).to(torch.float32)


def _squared_error(
    grid: Grid, group: Tensor, scales: GroupScales, weight: Tensor | None
) -> Tensor:
    scale = scales.scale.unsqueeze(-1)  # [B, N, 1]
    zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
    error = rebuild(snap(grid, group, scale, zero), scale, zero).sub_(group).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)


def _least_squares_scale(
    grid: Grid, group: Tensor, scales: GroupScales, weight: Tensor | None
) -> GroupScales:
    """The best scale for the codes that the given scales lead to: <w, v> / <v, v>."""
    zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
    values = snap(grid, group, scales.scale.unsqueeze(-1), zero)
    if zero is not None:
        values = values.sub_(zero)
    weighted = values if weight is None else values * weight
    power = (weighted * values).sum(-1)
    scale = (weighted * group).sum(-1) / power.clamp(min=torch.finfo(torch.float32).tiny)
    return GroupScales(round_scale(torch.where(power > 0, scale, scales.scale)), scales.zero)


def _choose(condition: Tensor, a: GroupScales, b: GroupScales) -> GroupScales:
    zero = None if a.zero is None or b.zero is None else torch.where(condition, a.zero, b.zero)
    return GroupScales(torch.where(condition, a.scale, b.scale), zero)
