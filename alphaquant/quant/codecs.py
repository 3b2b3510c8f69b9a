"""One interface over all formats: choose the scales of a group once, then round column by column.

RTN calls `fit` and `snap` on whole groups, GPTQ calls `fit` when it reaches a group and `snap` on
each column. How scales are chosen is the only thing that differs between format families:

    int1            float16, the mean magnitude: the least-squares scale of signs; 0 for zeros
    int symmetric   float16, may be negative: the element of largest magnitude maps to -2^(b-1),
                    so the full range is used and int2 has four levels
    int asymmetric  float16 and a b-bit zero point
    nl              float16, may be negative: the element of largest magnitude maps to the number
                    of largest magnitude of the table; zero for a group of zeros, as there is no
                    zero in the table
    fp              float16
    mxfp            2^k per 32 inputs, k = floor(log2 amax) - emax (OCP MX v1.0, 6.3), -127 for
                    zeros
    nvfp4           E4M3 per 16 inputs times one float32 per matrix, amax(matrix) / (448 * 6)

With `search="mse"` the scale that minimizes the squared error of the group is searched around that
rule, and the rule's own scale is always among the candidates; with `search="hessian"` GPTQ weights
each column's error by its cost in its own loss (RTN, which has no Hessian, weights all alike);
with `search="minmax"` the rule's scale is used as it is.

Inside super-blocks a scale is a multiple, -32 to 31, of one float16 per 256 inputs, the
super-scale, which is chosen first (`choose_super_scales`); it is zero only where codes have no
zero.

Letters: B matrices in a batch, N rows, C columns of the group. A weight is (value - zero) * scale
in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.grids import (
    FloatGrid,
    Grid,
    IntegerGrid,
    SignGrid,
    TableGrid,
    power_of_two,
    whole_grid,
)
from alphaquant.spaces.formats import ELEMENTS, SUB_BITS, Format
from alphaquant.specs.scale_search import ScaleSearch

_F16_MAX = 65504.0
_F16_TINY = 2.0**-24
_E4M3 = FloatGrid(4, 3, 448.0)
_E4M3_TINY = 2.0**-9
_GLOBAL_MIN = 2.0**-117

LEAST_MULTIPLE, MOST_MULTIPLE = -(2 ** (SUB_BITS - 1)), 2 ** (SUB_BITS - 1) - 1
"""Of a super-scale."""
_DIVISORS = (-32.0, 31.0, -31.0, 30.0, -30.0, 29.0, -29.0, 28.0, -28.0, 26.0, -26.0, 24.0, -24.0)
"""Which multiple the largest scale of a super-block becomes; not more than one, so that small
scales keep their resolution."""


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
class StoredScales:
    """How scales that are free numbers are stored.

    Attributes:
        super_scale: float32 [B, N], whose multiples scales are; None where they are float16.
        keeps_zero: whether a scale may be zero, which codes without a zero need.
    """

    super_scale: Tensor | None = None
    keeps_zero: bool = False

    def nearest(self, scale: Tensor) -> Tensor:
        """The nearest scale that can be stored."""
        if self.super_scale is None:
            rounded = round_scale(scale)
            return torch.where(scale == 0, scale, rounded) if self.keeps_zero else rounded
        ratio = scale / self.super_scale
        # Adding zero turns -0.0 into 0.0, the only zero that is stored.
        multiple = ratio.round().clamp_(LEAST_MULTIPLE, MOST_MULTIPLE).add_(0.0)
        if not self.keeps_zero:
            multiple = torch.where(multiple == 0, torch.where(ratio < 0, -1.0, 1.0), multiple)
        return multiple * self.super_scale


@dataclass(frozen=True)
class IntegerCodec:
    """Integers with float16 scales; see the file header."""

    grid: IntegerGrid
    shrinks: tuple[float, ...]
    stored: StoredScales = StoredScales()

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The rule's scale, then clipped ones."""
        return self._symmetric(group) if self.grid.signed else self._asymmetric(group)

    def _symmetric(self, group: Tensor) -> Iterator[GroupScales]:
        yield from _by_extreme(group, self.grid.low, self.shrinks, self.stored)

    def _asymmetric(self, group: Tensor) -> Iterator[GroupScales]:
        low = group.amin(-1).clamp(max=0.0)
        high = group.amax(-1).clamp(min=0.0)
        for shrink in self.shrinks:
            scale = round_scale(shrink * (high - low) / self.grid.high)
            zero = (-shrink * low / scale).round_().clamp_(self.grid.low, self.grid.high)
            yield GroupScales(scale, zero)


@dataclass(frozen=True)
class TableCodec:
    """Numbers of a table with float16 scales."""

    grid: TableGrid
    shrinks: tuple[float, ...]
    stored: StoredScales = StoredScales(keeps_zero=True)

    def candidates(self, group: Tensor) -> Iterator[GroupScales]:
        """The rule's scale, then others, of both signs."""
        yield from _by_extreme(group, self.grid.low, self.shrinks, self.stored)


def _by_extreme(
    group: Tensor, low: float, shrinks: tuple[float, ...], stored: StoredScales
) -> Iterator[GroupScales]:
    """Scales that map the element of largest magnitude to the lowest value, or beyond it."""
    extreme = group.gather(-1, group.abs().argmax(-1, keepdim=True)).squeeze(-1)  # [B, N]
    for shrink in shrinks:
        for sign in (1.0, -1.0) if len(shrinks) > 1 else (1.0,):
            yield GroupScales(stored.nearest(sign * shrink * extreme / low))


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
    if not isinstance(codec, SignCodec | IntegerCodec | TableCodec | FloatCodec):
        return best
    stored = codec.stored if isinstance(codec, IntegerCodec | TableCodec) else StoredScales()
    refined = _least_squares_scale(codec.grid, group, best, weight, stored)
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


def make_codec(fmt: Format, search: ScaleSearch, shared: Tensor | None = None) -> Codec:
    """The codec of a format.

    Args:
        fmt: any quantized format.
        search: how scales are chosen, see the file header.
        shared: float32 [B, N], nvfp4's from `nv_global_scale`, or super-scales; with None scales
            are float16, as those from which super-scales are chosen.
    """
    grid, searched = make_grid(fmt), search != "minmax"
    if isinstance(grid, TableGrid):
        stored = StoredScales(shared, keeps_zero=True)
        return TableCodec(grid, _TABLE_SHRINKS[fmt.bits] if searched else (1.0,), stored)
    if isinstance(grid, SignGrid):
        return SignCodec(grid)
    if isinstance(grid, IntegerGrid):
        shrinks = _int_shrinks(fmt.bits) if searched else (1.0,)
        return IntegerCodec(grid, shrinks, StoredScales(shared))
    if fmt.shared.scale == "e8m0":
        shifts = (0, 1) if searched else (0,)
        return MxCodec(grid, ELEMENTS[fmt.element].emax, shifts)
    if fmt.shared.scale == "e4m3":
        assert shared is not None
        return NvCodec(grid, shared, (1.0, 0.75, 0.85, 0.95, 1.1, 1.3) if searched else (1.0,))
    return FloatCodec(grid, (1.0, 0.7, 0.8, 0.9, 1.2, 1.5) if searched else (1.0,))


def make_grid(fmt: Format) -> SignGrid | IntegerGrid | TableGrid | FloatGrid:
    """The grid of a format's codes."""
    if not fmt.element:
        return whole_grid(fmt.kind, is_signed=fmt.symmetric)
    element = ELEMENTS[fmt.element]
    return FloatGrid(element.exponent_bits, element.mantissa_bits, element.max_value)


def nv_global_scale(weight: Tensor) -> Tensor:
    """nvfp4's float32 per matrix, amax / (448 * 6), for weights [B, N, K]; [B, 1]."""
    largest = weight.abs().amax((-1, -2)).unsqueeze(-1)
    # Kept so large that its product with 2^-9, the smallest block scale, is a normal float32.
    scale = (largest / (_E4M3.high * 6.0)).clamp(min=_GLOBAL_MIN)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def choose_super_scales(scales: Tensor, energy: Tensor, per_super: int) -> Tensor:
    """The float16 of every super-block, whose multiples its scales become.

    Of those that make the largest scale one of the largest multiples, the one with the least error
    of scales, each weighted by what an error relative to it costs.

    Args:
        scales: float32 [.., G, N], free ones.
        energy: float32 [.., G, N], weighted squares of each group's weights.
        per_super: groups of a super-block.

    Returns:
        float32 [.., P, N], P super-blocks; never zero.
    """
    found = []
    for start in range(0, scales.shape[-2], per_super):
        own = scales[..., start : start + per_super, :]  # [.., g, N]
        cost = energy[..., start : start + per_super, :]
        cost = cost / torch.where(own == 0, 1.0, own).square()
        extreme = own.gather(-2, own.abs().argmax(-2, keepdim=True))  # [.., 1, N]
        tried = torch.stack([round_scale(extreme / n) for n in _DIVISORS])  # [D, .., 1, N]
        made = StoredScales(tried, keeps_zero=True).nearest(own)
        error = ((made - own).square() * cost).sum(-2, keepdim=True).nan_to_num_(torch.inf)
        found.append(tried.gather(0, error.argmin(0, keepdim=True)).squeeze(0))
    return torch.cat(found, -2)


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


_TABLE_SHRINKS = {
    2: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55),
    3: (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65),
    4: (1.0, 1.05, 1.1, 0.95, 0.9, 0.85, 0.8),
}
"""By bits: what the scale of a table is multiplied with."""


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


def scale_step(
    scale: Tensor, curvature: Tensor, slope: Tensor, stored: StoredScales = StoredScales()
) -> Tensor:
    """What is added to scales so that an objective falls; zero where nothing helps.

    With a step d the objective changes by d (d A - 2 r); the best one is r / A, then the scale is
    rounded to what can be stored.

    Args:
        scale: known scales, float32.
        curvature: A, of the same shape.
        slope: r, of the same shape.
        stored: how scales are.
    """
    solved = scale + slope / curvature
    usable = (curvature > 0) & torch.isfinite(solved) & (solved != 0)
    step = stored.nearest(torch.where(usable, solved, scale)) - scale
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
    grid: Grid, group: Tensor, scales: GroupScales, weight: Tensor | None, stored: StoredScales
) -> GroupScales:
    """The best scale for the codes that the given scales lead to: <w, v> / <v, v>."""
    zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
    values = snap(grid, group, scales.scale.unsqueeze(-1), zero)
    if zero is not None:
        values = values.sub_(zero)
    weighted = values if weight is None else values * weight
    power = (weighted * values).sum(-1)
    scale = (weighted * group).sum(-1) / power.clamp(min=torch.finfo(torch.float32).tiny)
    return GroupScales(stored.nearest(torch.where(power > 0, scale, scales.scale)), scales.zero)


def _choose(condition: Tensor, a: GroupScales, b: GroupScales) -> GroupScales:
    zero = None if a.zero is None or b.zero is None else torch.where(condition, a.zero, b.zero)
    return GroupScales(torch.where(condition, a.scale, b.scale), zero)
