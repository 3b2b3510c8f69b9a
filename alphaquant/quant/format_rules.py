"""What the compiled column loops know of a format: its grid and its scales as plain numbers.

`codecs.py` says the same as classes and is the reference; the contract suite compares both for
every format.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from alphaquant.kernels.grids import FloatGrid, TableGrid
from alphaquant.quant.codecs import (
    Codec,
    FloatCodec,
    IntegerCodec,
    MxCodec,
    NvCodec,
    SignCodec,
    TableCodec,
    make_codec,
    make_grid,
)
from alphaquant.spaces.formats import Format
from alphaquant.specs.scale_search import ScaleSearch

SIGN, INTEGER, ZERO_POINT, FLOAT, MX, NV, TABLE = range(7)
"""Kinds of rules; those up to `ZERO_POINT` round to integers."""

Floats = npt.NDArray[np.float32]


class Rule(NamedTuple):
    """How numbers of a format are rounded and its scales chosen; float32 throughout.

    Attributes:
        kind: one of the constants above.
        low: smallest grid value.
        high: largest grid value.
        least: smallest normal power of two of a float grid.
        step: distance of neighbouring floats, relative to the power of two below them.
        unit: 2^-emax of mx formats.
        factors: float32 [n], what the format's own scale is multiplied with to get candidates.
        weighted: whether columns differ in importance.
        fits: whether scales are free numbers, which least squares can improve.
        is_multiple: whether scales are multiples of a super-scale.
        table: float32 [2^b], numbers that codes stand for; empty but for tables.
        middles: float32 [2^b - 1], half way between them.
    """

    kind: int
    low: np.float32
    high: np.float32
    least: np.float32
    step: np.float32
    unit: np.float32
    factors: Floats
    weighted: bool
    fits: bool
    is_multiple: bool
    table: Floats
    middles: Floats


def rule_of(fmt: Format, search: ScaleSearch) -> Rule:
    """The rule of a quantized format.

    Args:
        fmt: the format.
        search: how scales are chosen; only `hessian` weighs columns.
    """
    codec = make_codec(fmt, search, torch.ones(1, 1) if fmt.shared.global_bits else None)
    kind, factors, unit = _kind(codec)
    grid = make_grid(fmt)
    table = grid if isinstance(grid, TableGrid) else None
    least = step = 1.0
    if isinstance(grid, FloatGrid):
        least, step = 2.0 ** (2 - 2 ** (grid.exponent_bits - 1)), 2.0**-grid.mantissa_bits
    return Rule(
        kind=kind,
        low=np.float32(grid.low),
        high=np.float32(grid.high),
        least=np.float32(least),
        step=np.float32(step),
        unit=np.float32(unit),
        factors=np.array(factors, dtype=np.float32),
        weighted=search == "hessian",
        fits=fmt.has_groups,
        is_multiple=fmt.super_size > 0,
        table=np.array(table.table if table else (), dtype=np.float32),
        middles=np.array(table.middles if table else (), dtype=np.float32),
    )


def _kind(codec: Codec) -> tuple[int, tuple[float, ...], float]:
    """The kind of a codec, what its candidates multiply the first one with, and 2^-emax."""
    if isinstance(codec, SignCodec):
        return SIGN, (1.0,), 1.0
    if isinstance(codec, IntegerCodec) and not codec.grid.signed:
        return ZERO_POINT, codec.shrinks, 1.0
    if isinstance(codec, IntegerCodec | TableCodec):
        signs = (1.0, -1.0) if len(codec.shrinks) > 1 else (1.0,)
        kind = TABLE if isinstance(codec, TableCodec) else INTEGER
        return kind, tuple(sign * shrink for shrink in codec.shrinks for sign in signs), 1.0
    if isinstance(codec, MxCodec):
        return MX, tuple(2.0**shift for shift in codec.shifts), 2.0**-codec.emax
    assert isinstance(codec, FloatCodec | NvCodec)
    return (NV if isinstance(codec, NvCodec) else FLOAT), codec.shrinks, 1.0
