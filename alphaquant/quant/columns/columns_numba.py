# mypy: ignore-errors
"""The column loops of GPTQ and of coordinate descent on a CPU, compiled with numba.

They do what `rounding.quantize_gptq` and `refine.refine` do inside one block of columns; products
between blocks are `descent.py`'s. Compiled once per machine (16 s) and cached beside this file, or
where NUMBA_CACHE_DIR says. It is one file, although a long one, because numba looks at nothing but
the file of an entry point to see whether what it cached is old: after a change of a function that
the entry point calls in another file, the old code would run. So it would after a change of the
constants below that `codecs` and `format_rules` give: touch this file then.

Everything is transposed, [columns, rows] and contiguous, so that neighbouring numbers belong to
neighbouring rows, which are independent: they are the lanes of a vector. A tile of 64 rows of the
block is copied to a scratch of 32 KiB, because in place all columns would fall into the same sets
of the first cache. Columns go through it in panels of 16: inside a panel one after the other, then
the panel's changes reach the rest of the block 8 columns at a time.

What makes LLVM vectorize these loops: divisions that are not checked (`error_model`), offsets that
cannot be negative (uint64), one-dimensional arrays, at most eight pairs of pointers in a loop.

Letters: B columns of a block, N rows, G groups; x weights, q rounded weights, c centred codes
(value - zero), s scales, z zeros, U the diagonal block of the inverse Hessian's upper factor,
H the diagonal block of the Hessian, R = H D the block's rows of the residual, D = W - Q.
"""

from math import copysign

import numpy as np
from numba import int64, njit, uint64

from alphaquant.quant.codecs import LEAST_MULTIPLE, MOST_MULTIPLE
from alphaquant.quant.format_rules import FLOAT, INTEGER, MX, SIGN, TABLE, ZERO_POINT

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
# Only the entry points are called from Python and cached; with wrappers and files for every
# function, and variants for literal numbers, compiling took 24 s instead of 16.
_INNER = {**_OPTIONS, "cache": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_TILE = 64
_PANEL = 16
_STEP = 8
_ERROR_MAX = np.float32(2.0**100)
_EXPONENT = np.uint32(0x7F800000)
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
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)


@njit(**_INNER)
def _round_float(t, power, m, high, least, step):
    """Numbers t[:m] to the nearest small floats, ties to even, saturating; in place."""
    bits, power_bits = t.view(np.uint32), power.view(np.uint32)
    for n in range(m):
        t[n] = min(max(t[n], -high), high)
    for n in range(m):
        power_bits[n] = bits[n] & _EXPONENT  # the power of two at or below |t|
    for n in range(m):
        width = max(power[n], least) * step
        t[n] = np.rint(t[n] / width) * width


@njit(**_INNER)
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
                low = (d0 if x > m0 else _ZERO) + (d1 if x > m1 else _ZERO)
                t[n] += low + (d2 if x > m2 else _ZERO)
            j += 3
        else:
            for n in range(m):
                t[n] += d0 if scratch[n] > m0 else _ZERO
            j += 1


@njit(**_INNER)
def _snap(t, power, m, rule):
    """Scaled numbers t[:m], zero point added, to grid values; in place."""
    if rule.kind == SIGN:
        for n in range(m):
            t[n] = -_ONE if t[n] < _ZERO else _ONE
    elif rule.kind <= ZERO_POINT:
        low, high = rule.low, rule.high
        for n in range(m):
            t[n] = min(max(np.rint(t[n]), low), high) + _ZERO
    elif rule.kind == TABLE:
        _snap_table(t, power, m, rule.table, rule.middles)
    else:
        _round_float(t, power, m, rule.high, rule.least, rule.step)


@njit(**_INNER)
def _round_half(t, power, m):
    """Scales t[:m] to float16, neither zero nor infinite; 1 for zeros (`codecs.round_scale`)."""
    asked = t.copy()
    _round_float(t, power, m, _HALF_MAX, _HALF_LEAST, _HALF_STEP)
    for n in range(m):
        if t[n] == _ZERO:
            t[n] = _ONE if asked[n] == _ZERO else np.float32(copysign(_HALF_TINY, asked[n]))


@njit(**_INNER)
def _store(t, shared, power, m, rule):
    """Free scales t[:m] to those that can be stored (`codecs.StoredScales.nearest`); in place."""
    if rule.is_multiple:
        for n in range(m):
            ratio = t[n] / shared[n]
            least = -_ONE if ratio < _ZERO else _ONE
            found = min(max(np.rint(ratio), _LEAST_MULTIPLE), _MOST_MULTIPLE) + _ZERO
            if rule.kind == INTEGER:
                found = least if found == _ZERO else found
            t[n] = found * shared[n]
    elif rule.kind == TABLE:
        asked = t.copy()
        _round_half(t, power, m)
        for n in range(m):
            t[n] = asked[n] if asked[n] == _ZERO else t[n]
    else:
        _round_half(t, power, m)


@njit(**_INNER)
def _statistics(x, base, stride, n_columns, m, rule, first, second):
    """What scales are made of: `first` and, with zero points, `second`, by row.

    The mean magnitude (signs), the number of largest magnitude (symmetric integers), the least and
    the largest number (with zero points), the largest magnitude (floats).
    """
    for n in range(m):
        first[n] = _ZERO
        second[n] = _ZERO
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


@njit(**_INNER)
def _candidate(factor, first, second, shared, m, rule, scale, zero, power):
    """Scales and zero points of one candidate (`codecs.*Codec.candidates`)."""
    if rule.kind == SIGN:
        for n in range(m):
            scale[n] = first[n]
        _round_float(scale, power, m, _HALF_MAX, _HALF_LEAST, _HALF_STEP)
    elif rule.kind == INTEGER or rule.kind == TABLE:
        for n in range(m):
            scale[n] = factor * first[n] / rule.low
        _store(scale, shared, power, m, rule)
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
            power_bits[n] = bits[n] & _EXPONENT
        for n in range(m):
            scale[n] = min(max(power[n] * rule.unit * factor, _E8M0_MIN), _E8M0_MAX)
    else:
        for n in range(m):
            scale[n] = factor * (first[n] / rule.high / shared[n])
        _round_float(scale, power, m, _E4M3_MAX, _E4M3_LEAST, _E4M3_STEP)
        for n in range(m):
            scale[n] = max(scale[n], _E4M3_TINY) * shared[n]


@njit(**_INNER)
def _squared_error(
    x, base, stride, importance, i, n_columns, m, rule, scale, zero, error, t, power
):
    """Weighted squared errors of a group under given scales, by row."""
    for n in range(m):
        error[n] = _ZERO
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
            _snap(t, power, m, rule)
            for n in range(m):
                off = t[n] * scale[n] - x[at + uint64(n)]
                error[n] += weight * off * off


@njit(**_INNER)
def _least_squares(
    x, base, stride, importance, i, n_columns, m, rule, shared, scale, zero, fitted, t, power
):
    """The best scale for the codes that the given scales lead to, rounded: <x, c> / <c, c>."""
    cross = np.zeros(_TILE, dtype=np.float32)
    square = np.zeros(_TILE, dtype=np.float32)
    for c in range(n_columns):
        at, weight = base + uint64(c) * stride, importance[i + c]
        for n in range(m):
            t[n] = x[at + uint64(n)] / scale[n] + zero[n]
        _snap(t, power, m, rule)
        for n in range(m):
            code = t[n] - zero[n]
            cross[n] += weight * code * x[at + uint64(n)]
            square[n] += weight * code * code
    for n in range(m):
        best = cross[n] / max(square[n], _TINY)
        fitted[n] = best if square[n] > _ZERO else scale[n]
    _store(fitted, shared, power, m, rule)


@njit(**_INNER)
def _fit(x, base, stride, importance, i, n_columns, m, rule, shared, scale, zero):
    """Choose scales and zeros of a group of columns, by row (`codecs.fit`)."""
    t = np.empty(_TILE, dtype=np.float32)
    power = np.empty(_TILE, dtype=np.float32)
    first = np.empty(_TILE, dtype=np.float32)
    second = np.empty(_TILE, dtype=np.float32)
    _statistics(x, base, stride, n_columns, m, rule, first, second)
    for n in range(m):
        zero[n] = _ZERO
    _candidate(rule.factors[0], first, second, shared, m, rule, scale, zero, power)
    if len(rule.factors) == 1 and not rule.weighted:
        return
    tried = np.empty(_TILE, dtype=np.float32)
    tried_zero = np.zeros(_TILE, dtype=np.float32)
    least = np.empty(_TILE, dtype=np.float32)
    error = np.empty(_TILE, dtype=np.float32)
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


@njit(**_OPTIONS)
def fit_group(x, importance, n_rows, rule, shared, scales, zeros):
    """Choose scales and zeros of one group from all of its columns.

    Args:
        x: float32 [g * N], the group's weights.
        importance: float32 [g], weight of each column's squared error.
        n_rows: N.
        rule: of the format.
        shared: float32 [N], what the scales share with those of other groups, or empty.
        scales: float32 [N], written.
        zeros: float32 [N], written.
    """
    stride = uint64(n_rows)
    for start in range(0, n_rows, _TILE):
        m = min(_TILE, n_rows - start)
        rows = slice(start, start + m)
        scale = np.empty(_TILE, dtype=np.float32)
        zero = np.empty(_TILE, dtype=np.float32)
        _fit(
            x, uint64(start), stride, importance, int64(0), len(importance), m, rule, shared[rows],
            scale, zero,
        )  # fmt: skip
        scales[rows] = scale[:m]
        zeros[rows] = zero[:m]


@njit(**_INNER)
def _spread(tile, changes, first, stop, j, matrix, width, row, m):
    """tile[j] -= sum over k of changes[k] * matrix[row + k, j], k in first .. stop - 1."""
    to = uint64(j * _TILE)
    k = first
    while k + _STEP <= stop:
        at = uint64((k - first) * _TILE)
        above = (row + k - first) * width + j
        h0, h1 = matrix[above], matrix[above + width]
        h2, h3 = matrix[above + 2 * width], matrix[above + 3 * width]
        h4, h5 = matrix[above + 4 * width], matrix[above + 5 * width]
        h6, h7 = matrix[above + 6 * width], matrix[above + 7 * width]
        for n in range(m):
            o = at + uint64(n)
            low = (
                changes[o] * h0
                + changes[o + uint64(_TILE)] * h1
                + changes[o + uint64(2 * _TILE)] * h2
                + changes[o + uint64(3 * _TILE)] * h3
            )
            high = (
                changes[o + uint64(4 * _TILE)] * h4
                + changes[o + uint64(5 * _TILE)] * h5
                + changes[o + uint64(6 * _TILE)] * h6
                + changes[o + uint64(7 * _TILE)] * h7
            )
            tile[to + uint64(n)] -= low + high
        k += _STEP
    while k < stop:
        at = uint64((k - first) * _TILE)
        h0 = matrix[(row + k - first) * width + j]
        for n in range(m):
            tile[to + uint64(n)] -= changes[at + uint64(n)] * h0
        k += 1


@njit(**_INNER)
def _load(tile, x, start, stride, n_columns, m):
    """Copy m rows, from `start` on, of columns that are `stride` apart into a tile."""
    for k in range(n_columns):
        at, to = uint64(start) + uint64(k) * stride, uint64(k * _TILE)
        for n in range(m):
            tile[to + uint64(n)] = x[at + uint64(n)]


@njit(**_OPTIONS)
def gptq_block(ahead, original, upper, begins, groups, importance, n_rows, rule, shared,
               per_shared, scales, zeros, centred, delta, objective):  # fmt: skip
    """Round one block of columns with error compensation inside the block.

    Args:
        ahead: float32 [B * N], weights compensated for everything before the block.
        original: float32 [B * N], weights as they were.
        upper: float32 [B * B], U.
        begins: int64 [B], columns of the group that begins at a column and whose scales are to be
            chosen there; 0 elsewhere.
        groups: int64 [B], each column's group among all.
        importance: float32 [B], weight of each column's squared error in choosing scales.
        n_rows: N.
        rule: of the format.
        shared: float32 [P * N], what scales of neighbouring groups share, or empty.
        per_shared: groups that do.
        scales: float32 [G * N], read, and written where a group begins.
        zeros: float32 [G * N], likewise.
        centred: float32 [B * N], c, written.
        delta: float32 [B * N], D, written.
        objective: float32 [N], the squared scaled errors are added.
    """
    n_columns, stride = len(begins), uint64(n_rows)
    tile = np.empty(n_columns * _TILE, dtype=np.float32)
    errors = np.empty(_PANEL * _TILE, dtype=np.float32)
    t = np.empty(_TILE, dtype=np.float32)
    power = np.empty(_TILE, dtype=np.float32)
    scale = np.empty(_TILE, dtype=np.float32)
    zero = np.empty(_TILE, dtype=np.float32)
    for start in range(0, n_rows, _TILE):
        m = min(_TILE, n_rows - start)
        _load(tile, ahead, start, stride, n_columns, m)
        first = int64(0)
        while first < n_columns:
            if begins[first] > 0:
                of_shared = groups[first] // per_shared * n_rows + start
                _fit(
                    tile, uint64(first * _TILE), uint64(_TILE), importance, first, begins[first],
                    m, rule, shared[of_shared : of_shared + m], scale, zero,
                )  # fmt: skip
                at = uint64(groups[first]) * stride + uint64(start)
                for n in range(m):
                    scales[at + uint64(n)] = scale[n]
                    zeros[at + uint64(n)] = zero[n]
            stop = first + 1
            while stop < n_columns and stop - first < _PANEL and begins[stop] == 0:
                stop += 1
            for k in range(first, stop):
                own, at = uint64(k * _TILE), uint64(start) + uint64(k) * stride
                _load(scale, scales, groups[k] * n_rows + start, stride, int64(1), m)
                _load(zero, zeros, groups[k] * n_rows + start, stride, int64(1), m)
                for n in range(m):
                    t[n] = tile[own + uint64(n)] / scale[n] + zero[n]
                _snap(t, power, m, rule)
                inside, error = upper[k * n_columns + k], uint64((k - first) * _TILE)
                for n in range(m):
                    code = t[n] - zero[n]
                    q = code * scale[n]
                    e = (tile[own + uint64(n)] - q) / inside
                    e = min(max(e, -_ERROR_MAX), _ERROR_MAX)
                    centred[at + uint64(n)] = code
                    delta[at + uint64(n)] = original[at + uint64(n)] - q
                    errors[error + uint64(n)] = e
                for n in range(m):
                    e = errors[error + uint64(n)]
                    objective[uint64(start) + uint64(n)] += e * e
                for j in range(k + 1, stop):
                    u, to = upper[k * n_columns + j], uint64(j * _TILE)
                    for n in range(m):
                        tile[to + uint64(n)] -= errors[error + uint64(n)] * u
            for j in range(stop, n_columns):
                _spread(tile, errors, first, stop, j, upper, n_columns, first, m)
            first = stop


@njit(**_OPTIONS)
def sweep_block(residual, hessian, products, ends, groups, n_rows, rule, shared, per_shared,
                scales, zeros, centred, delta):  # fmt: skip
    """One pass of scales and codes over a block of columns.

    Args:
        residual: float32 [B * N], R with D as it is.
        hessian: float32 [B * B], H.
        products: float32 [B * N], H_gg c_g of each group g that lies in the block; empty where
            scales stay.
        ends: int64 [B], where a run of columns that is gone through together begins, its end (a
            group whose scale is fitted, otherwise the whole block); 0 elsewhere.
        groups: int64 [B], each column's group among all.
        n_rows: N.
        rule: of the format.
        shared: float32 [P * N], what scales of neighbouring groups share, or empty.
        per_shared: groups that do.
        scales: float32 [G * N], read and written.
        zeros: float32 [G * N], read.
        centred: float32 [B * N], c, read and written.
        delta: float32 [B * N], D, read and written.
    """
    n_columns, stride = len(ends), uint64(n_rows)
    tile = np.empty(n_columns * _TILE, dtype=np.float32)
    totals = np.zeros(n_columns * _TILE, dtype=np.float32)
    steps = np.empty(_PANEL * _TILE, dtype=np.float32)
    t = np.empty(_TILE, dtype=np.float32)
    power = np.empty(_TILE, dtype=np.float32)
    scale = np.empty(_TILE, dtype=np.float32)
    zero = np.empty(_TILE, dtype=np.float32)
    for start in range(0, n_rows, _TILE):
        m = min(_TILE, n_rows - start)
        _load(tile, residual, start, stride, n_columns, m)
        totals[:] = _ZERO
        run = int64(0)
        while run < n_columns:
            end = ends[run]
            if len(products) > 0:
                of_shared = groups[run] // per_shared * n_rows + start
                _fit_run(tile, totals, products, run, end, groups[run], start, m, stride, rule,
                         shared[of_shared : of_shared + m], scales, centred, delta,
                         power)  # fmt: skip
            first = run
            while first < end:
                stop = min(first + _PANEL, end)
                for k in range(first, stop):
                    own, at = uint64(k * _TILE), uint64(start) + uint64(k) * stride
                    _load(scale, scales, groups[k] * n_rows + start, stride, int64(1), m)
                    _load(zero, zeros, groups[k] * n_rows + start, stride, int64(1), m)
                    curvature = hessian[k * n_columns + k]
                    for n in range(m):
                        q = centred[at + uint64(n)] * scale[n]
                        best = q + tile[own + uint64(n)] / curvature
                        t[n] = best / scale[n] + zero[n]
                    _snap(t, power, m, rule)
                    step = uint64((k - first) * _TILE)
                    for n in range(m):
                        code = t[n] - zero[n]
                        change = (code - centred[at + uint64(n)]) * scale[n]
                        centred[at + uint64(n)] = code
                        delta[at + uint64(n)] -= change
                        steps[step + uint64(n)] = change
                        totals[own + uint64(n)] += change
                    for j in range(k + 1, stop):
                        h, to = hessian[k * n_columns + j], uint64(j * _TILE)
                        for n in range(m):
                            tile[to + uint64(n)] -= steps[step + uint64(n)] * h
                for j in range(stop, end):
                    _spread(tile, steps, first, stop, j, hessian, n_columns, first, m)
                first = stop
            for j in range(end, n_columns):
                _spread(tile, totals[run * _TILE :], run, end, j, hessian, n_columns, run, m)
            run = end


@njit(**_INNER)
def _fit_run(tile, totals, products, run, end, group, start, m, stride, rule, shared, scales,
             centred, delta, power):  # fmt: skip
    """The best scale for a group's codes, where it helps after rounding to what is stored.

    With a step d of the scale the objective changes by d (d A - 2 r), A = c' H c, r = c' R.
    """
    curvature = np.zeros(_TILE, dtype=np.float32)
    slope = np.zeros(_TILE, dtype=np.float32)
    fitted = np.empty(_TILE, dtype=np.float32)
    for k in range(run, end):
        own, at = uint64(k * _TILE), uint64(start) + uint64(k) * stride
        for n in range(m):
            code = centred[at + uint64(n)]
            curvature[n] += code * products[at + uint64(n)]
            slope[n] += code * tile[own + uint64(n)]
    of_group = uint64(group) * stride + uint64(start)
    for n in range(m):
        known = scales[of_group + uint64(n)]
        solved = known + slope[n] / curvature[n]
        usable = curvature[n] > _ZERO and abs(solved) < _ERROR_MAX and solved != _ZERO
        fitted[n] = solved if usable else known
    _store(fitted, shared, power, m, rule)
    for n in range(m):
        known = scales[of_group + uint64(n)]
        step = fitted[n] - known
        helps = (step * curvature[n] - _TWO * slope[n]) * step < _ZERO
        fitted[n] = step if helps else _ZERO  # from here on the step
        scales[of_group + uint64(n)] = known + fitted[n]
    for k in range(run, end):
        own, at = uint64(k * _TILE), uint64(start) + uint64(k) * stride
        for n in range(m):
            change = fitted[n] * centred[at + uint64(n)]
            totals[own + uint64(n)] = change
            delta[at + uint64(n)] -= change
            tile[own + uint64(n)] -= fitted[n] * products[at + uint64(n)]
