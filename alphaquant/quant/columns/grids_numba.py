# mypy: ignore-errors
"""Numbers on the grids of formats, and scales that fit them, on a CPU; compiled with numba.

For all rows of a tile at once: the loops over rows are the lanes of a vector. What
`alphaquant.quant.codecs` does in torch, bit for bit, as `grids_triton.py` and `scales_triton.py`
do on a GPU.

Letters: m rows of a tile, x weights, t scaled numbers.
"""

from math import copysign

import numpy as np
from numba import uint64

from alphaquant.quant.codecs import LEAST_MULTIPLE, MOST_MULTIPLE
from alphaquant.quant.columns.compiled import inner
from alphaquant.quant.format_rules import FLOAT, INTEGER, MX, SIGN, TABLE, ZERO_POINT

TILE = 64
EXPONENT = np.uint32(0x7F800000)
_HALF_MAX, _HALF_LEAST, _HALF_STEP = (
    np.float32(65504.0),
    np.float32(2.0**-14),
    np.float32(2.0**-10),
)
_HALF_TINY = np.float32(2.0**-24)
_E4M3_MAX, _E4M3_LEAST, _E4M3_STEP = np.float32(448.0), np.float32(2.0**-6), np.float32(2.0**-3)
_E4M3_TINY = np.float32(2.0**-9)
_E8M0_MIN, _E8M0_MAX = np.float32(2.0**-127), np.float32(2.0**127)
_TINY = np.float32(np.finfo(np.float32).tiny)
_LEAST_MULTIPLE, _MOST_MULTIPLE = np.float32(LEAST_MULTIPLE), np.float32(MOST_MULTIPLE)
ZERO, ONE, TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)


@inner
def round_float(t, power, m, high, least, step):
    """Numbers t[:m] to the nearest small floats, ties to even, saturating; in place."""
    bits, power_bits = t.view(np.uint32), power.view(np.uint32)
    for n in range(m):
        t[n] = min(max(t[n], -high), high)
    for n in range(m):
        power_bits[n] = bits[n] & EXPONENT  # the power of two at or below |t|
    for n in range(m):
        width = max(power[n], least) * step
        t[n] = np.rint(t[n] / width) * width


@inner
def _snap_table(t, scratch, m, table, middles):
    """Numbers t[:m] to the nearest of a table, in place; the first for what is no number.

    The steps between neighbours that lie below are added up: integers, so exact.
    """
    for n in range(m):
        scratch[n] = t[n]
    for n in range(m):
        t[n] = table[0]
    j = 0
    while j < len(middles):  # 3, 7 or 15 of them
        m0, d0 = middles[j], table[j + 1] - table[j]
        if j + 3 <= len(middles):
            m1, d1 = middles[j + 1], table[j + 2] - table[j + 1]
            m2, d2 = middles[j + 2], table[j + 3] - table[j + 2]
            for n in range(m):
                x = scratch[n]
                low = (d0 if x > m0 else ZERO) + (d1 if x > m1 else ZERO)
                t[n] += low + (d2 if x > m2 else ZERO)
            j += 3
        else:
            for n in range(m):
                t[n] += d0 if scratch[n] > m0 else ZERO
            j += 1


@inner
def snap(t, power, m, rule):
    """Scaled numbers t[:m], zero point added, to grid values; in place."""
    if rule.kind == SIGN:
        for n in range(m):
            t[n] = -ONE if t[n] < ZERO else ONE
    elif rule.kind <= ZERO_POINT:
        low, high = rule.low, rule.high
        for n in range(m):
            t[n] = min(max(np.rint(t[n]), low), high) + ZERO
    elif rule.kind == TABLE:
        _snap_table(t, power, m, rule.table, rule.middles)
    else:
        round_float(t, power, m, rule.high, rule.least, rule.step)


@inner
def _round_half(t, power, m):
    """Scales t[:m] to float16, neither zero nor infinite; 1 for zeros (`codecs.round_scale`)."""
    asked = t.copy()
    round_float(t, power, m, _HALF_MAX, _HALF_LEAST, _HALF_STEP)
    for n in range(m):
        if t[n] == ZERO:
            t[n] = ONE if asked[n] == ZERO else np.float32(copysign(_HALF_TINY, asked[n]))


@inner
def store(t, shared, power, m, rule):
    """Free scales t[:m] to those that can be stored (`codecs.StoredScales.nearest`); in place."""
    if rule.is_multiple:
        for n in range(m):
            ratio = t[n] / shared[n]
            least = -ONE if ratio < ZERO else ONE
            found = min(max(np.rint(ratio), _LEAST_MULTIPLE), _MOST_MULTIPLE) + ZERO
            if rule.kind == INTEGER:
                found = least if found == ZERO else found
            t[n] = found * shared[n]
    elif rule.kind == TABLE:
        asked = t.copy()
        _round_half(t, power, m)
        for n in range(m):
            t[n] = asked[n] if asked[n] == ZERO else t[n]
    else:
        _round_half(t, power, m)


@inner
def _statistics(x, base, stride, n_columns, m, rule, first, second):
    """What scales are made of: `first` and, with zero points, `second`, by row.

    The mean magnitude (signs), the number of largest magnitude (symmetric integers), the least and
    the largest number (with zero points), the largest magnitude (floats).
    """
    for n in range(m):
        first[n] = ZERO
        second[n] = ZERO
    for c in range(n_columns):
        at = base + uint64(c) * stride
        if rule.kind == SIGN:
            for n in range(m):
                first[n] += abs(x[at + uint64(n)])
        elif rule.kind == INTEGER or rule.kind == TABLE:
            for n in range(m):
                number = x[at + uint64(n)]
                first[n] = number if abs(number) > abs(first[n]) else first[n]
        elif rule.kind == ZERO_POINT:
            for n in range(m):
                number = x[at + uint64(n)]
                first[n] = min(first[n], number)
                second[n] = max(second[n], number)
        else:
            for n in range(m):
                first[n] = max(first[n], abs(x[at + uint64(n)]))
    if rule.kind == SIGN:
        for n in range(m):
            first[n] = first[n] / np.float32(n_columns)


@inner
def _candidate(factor, first, second, shared, m, rule, scale, zero, power):
    """Scales and zero points of one candidate (`codecs.*Codec.candidates`)."""
    if rule.kind == SIGN:
        for n in range(m):
            scale[n] = first[n]
        round_float(scale, power, m, _HALF_MAX, _HALF_LEAST, _HALF_STEP)
    elif rule.kind == INTEGER or rule.kind == TABLE:
        for n in range(m):
            scale[n] = factor * first[n] / rule.low
        store(scale, shared, power, m, rule)
    elif rule.kind == ZERO_POINT:
        for n in range(m):
            scale[n] = factor * (second[n] - first[n]) / rule.high
        _round_half(scale, power, m)
        for n in range(m):
            found = np.rint(-factor * first[n] / scale[n])
            zero[n] = min(max(found, rule.low), rule.high)
    elif rule.kind == FLOAT:
        for n in range(m):
            scale[n] = factor * first[n] / rule.high
        _round_half(scale, power, m)
    elif rule.kind == MX:
        bits, power_bits = first.view(np.uint32), power.view(np.uint32)
        for n in range(m):
            power_bits[n] = bits[n] & EXPONENT
        for n in range(m):
            scale[n] = min(max(power[n] * rule.unit * factor, _E8M0_MIN), _E8M0_MAX)
    else:
        for n in range(m):
            scale[n] = factor * (first[n] / rule.high / shared[n])
        round_float(scale, power, m, _E4M3_MAX, _E4M3_LEAST, _E4M3_STEP)
        for n in range(m):
            scale[n] = max(scale[n], _E4M3_TINY) * shared[n]


@inner
def _squared_error(
    x, base, stride, importance, i, n_columns, m, rule, scale, zero, error, t, power
):
    """Weighted squared errors of a group under given scales, by row."""
    for n in range(m):
        error[n] = ZERO
    low, high = rule.low, rule.high
    for c in range(n_columns):
        at, weight = base + uint64(c) * stride, importance[i + c]
        if rule.kind == INTEGER or rule.kind == ZERO_POINT:
            for n in range(m):
                number = x[at + uint64(n)]
                value = min(max(np.rint(number / scale[n] + zero[n]), low), high)
                off = (value - zero[n]) * scale[n] - number
                error[n] += weight * off * off
        else:
            for n in range(m):
                t[n] = x[at + uint64(n)] / scale[n]
            snap(t, power, m, rule)
            for n in range(m):
                off = t[n] * scale[n] - x[at + uint64(n)]
                error[n] += weight * off * off


@inner
def _least_squares(
    x, base, stride, importance, i, n_columns, m, rule, shared, scale, zero, fitted, t, power
):
    """The best scale for the codes that the given scales lead to, rounded: <x, c> / <c, c>."""
    cross = np.zeros(TILE, dtype=np.float32)
    square = np.zeros(TILE, dtype=np.float32)
    for c in range(n_columns):
        at, weight = base + uint64(c) * stride, importance[i + c]
        for n in range(m):
            t[n] = x[at + uint64(n)] / scale[n] + zero[n]
        snap(t, power, m, rule)
        for n in range(m):
            code = t[n] - zero[n]
            cross[n] += weight * code * x[at + uint64(n)]
            square[n] += weight * code * code
    for n in range(m):
        best = cross[n] / max(square[n], _TINY)
        fitted[n] = best if square[n] > ZERO else scale[n]
    store(fitted, shared, power, m, rule)


@inner
def fit(x, base, stride, importance, i, n_columns, m, rule, shared, scale, zero):
    """Choose scales and zeros of a group of columns, by row (`codecs.fit`)."""
    t = np.empty(TILE, dtype=np.float32)
    power = np.empty(TILE, dtype=np.float32)
    first = np.empty(TILE, dtype=np.float32)
    second = np.empty(TILE, dtype=np.float32)
    _statistics(x, base, stride, n_columns, m, rule, first, second)
    for n in range(m):
        zero[n] = ZERO
    _candidate(rule.factors[0], first, second, shared, m, rule, scale, zero, power)
    if len(rule.factors) == 1 and not rule.weighted:
        return
    tried = np.empty(TILE, dtype=np.float32)
    tried_zero = np.zeros(TILE, dtype=np.float32)
    least = np.empty(TILE, dtype=np.float32)
    error = np.empty(TILE, dtype=np.float32)
    _squared_error(
        x, base, stride, importance, i, n_columns, m, rule, scale, zero, least, t, power
    )
    for k in range(1, len(rule.factors)):
        _candidate(rule.factors[k], first, second, shared, m, rule, tried, tried_zero, power)
        _squared_error(
            x, base, stride, importance, i, n_columns, m, rule, tried, tried_zero, error, t, power
        )
        for n in range(m):
            if error[n] < least[n]:
                least[n], scale[n], zero[n] = error[n], tried[n], tried_zero[n]
    if not rule.fits:
        return
    _least_squares(
        x, base, stride, importance, i, n_columns, m, rule, shared, scale, zero, tried, t, power
    )
    _squared_error(
        x, base, stride, importance, i, n_columns, m, rule, tried, zero, error, t, power
    )
    for n in range(m):
        if error[n] < least[n]:
            scale[n] = tried[n]
