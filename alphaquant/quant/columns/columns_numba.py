# mypy: ignore-errors
"""The column loops of GPTQ and of coordinate descent on a CPU, compiled with numba.

They do what `rounding.quantize_gptq` and `refine.refine` do inside one block of columns; products
between blocks are `descent.py`'s. Compiled once per machine (16 s) and kept beside this file, or
where NUMBA_CACHE_DIR says (`compiled.py`).

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

import numpy as np
from numba import int64, uint64

from alphaquant.quant.columns.compiled import entry, inner
from alphaquant.quant.columns.grids_numba import TILE, TWO, ZERO, fit, snap, store

_PANEL = 16
_STEP = 8
ERROR_MAX = np.float32(2.0**100)


@entry
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
    for start in range(0, n_rows, TILE):
        m = min(TILE, n_rows - start)
        rows = slice(start, start + m)
        scale = np.empty(TILE, dtype=np.float32)
        zero = np.empty(TILE, dtype=np.float32)
        fit(
            x, uint64(start), stride, importance, int64(0), len(importance), m, rule, shared[rows],
            scale, zero,
        )  # fmt: skip
        scales[rows] = scale[:m]
        zeros[rows] = zero[:m]


@inner
def _spread(tile, changes, first, stop, j, matrix, width, row, m):
    """tile[j] -= sum over k of changes[k] * matrix[row + k, j], k in first .. stop - 1."""
    to = uint64(j * TILE)
    k = first
    while k + _STEP <= stop:
        at = uint64((k - first) * TILE)
        above = (row + k - first) * width + j
        h0, h1 = matrix[above], matrix[above + width]
        h2, h3 = matrix[above + 2 * width], matrix[above + 3 * width]
        h4, h5 = matrix[above + 4 * width], matrix[above + 5 * width]
        h6, h7 = matrix[above + 6 * width], matrix[above + 7 * width]
        for n in range(m):
            o = at + uint64(n)
            low = (
                changes[o] * h0
                + changes[o + uint64(TILE)] * h1
                + changes[o + uint64(2 * TILE)] * h2
                + changes[o + uint64(3 * TILE)] * h3
            )
            high = (
                changes[o + uint64(4 * TILE)] * h4
                + changes[o + uint64(5 * TILE)] * h5
                + changes[o + uint64(6 * TILE)] * h6
                + changes[o + uint64(7 * TILE)] * h7
            )
            tile[to + uint64(n)] -= low + high
        k += _STEP
    while k < stop:
        at = uint64((k - first) * TILE)
        h0 = matrix[(row + k - first) * width + j]
        for n in range(m):
            tile[to + uint64(n)] -= changes[at + uint64(n)] * h0
        k += 1


@inner
def _load(tile, x, start, stride, n_columns, m):
    """Copy m rows, from `start` on, of columns that are `stride` apart into a tile."""
    for k in range(n_columns):
        at, to = uint64(start) + uint64(k) * stride, uint64(k * TILE)
        for n in range(m):
            tile[to + uint64(n)] = x[at + uint64(n)]


@entry
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
    tile = np.empty(n_columns * TILE, dtype=np.float32)
    errors = np.empty(_PANEL * TILE, dtype=np.float32)
    t = np.empty(TILE, dtype=np.float32)
    power = np.empty(TILE, dtype=np.float32)
    scale = np.empty(TILE, dtype=np.float32)
    zero = np.empty(TILE, dtype=np.float32)
    for start in range(0, n_rows, TILE):
        m = min(TILE, n_rows - start)
        _load(tile, ahead, start, stride, n_columns, m)
        first = int64(0)
        while first < n_columns:
            if begins[first] > 0:
                of_shared = groups[first] // per_shared * n_rows + start
                fit(
                    tile, uint64(first * TILE), uint64(TILE), importance, first, begins[first],
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
                own, at = uint64(k * TILE), uint64(start) + uint64(k) * stride
                _load(scale, scales, groups[k] * n_rows + start, stride, int64(1), m)
                _load(zero, zeros, groups[k] * n_rows + start, stride, int64(1), m)
                for n in range(m):
                    t[n] = tile[own + uint64(n)] / scale[n] + zero[n]
                snap(t, power, m, rule)
                inside, error = upper[k * n_columns + k], uint64((k - first) * TILE)
                for n in range(m):
                    code = t[n] - zero[n]
                    q = code * scale[n]
                    e = (tile[own + uint64(n)] - q) / inside
                    e = min(max(e, -ERROR_MAX), ERROR_MAX)
                    centred[at + uint64(n)] = code
                    delta[at + uint64(n)] = original[at + uint64(n)] - q
                    errors[error + uint64(n)] = e
                for n in range(m):
                    e = errors[error + uint64(n)]
                    objective[uint64(start) + uint64(n)] += e * e
                for j in range(k + 1, stop):
                    u, to = upper[k * n_columns + j], uint64(j * TILE)
                    for n in range(m):
                        tile[to + uint64(n)] -= errors[error + uint64(n)] * u
            for j in range(stop, n_columns):
                _spread(tile, errors, first, stop, j, upper, n_columns, first, m)
            first = stop


@entry
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
    tile = np.empty(n_columns * TILE, dtype=np.float32)
    totals = np.zeros(n_columns * TILE, dtype=np.float32)
    steps = np.empty(_PANEL * TILE, dtype=np.float32)
    t = np.empty(TILE, dtype=np.float32)
    power = np.empty(TILE, dtype=np.float32)
    scale = np.empty(TILE, dtype=np.float32)
    zero = np.empty(TILE, dtype=np.float32)
    for start in range(0, n_rows, TILE):
        m = min(TILE, n_rows - start)
        _load(tile, residual, start, stride, n_columns, m)
        totals[:] = ZERO
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
                    own, at = uint64(k * TILE), uint64(start) + uint64(k) * stride
                    _load(scale, scales, groups[k] * n_rows + start, stride, int64(1), m)
                    _load(zero, zeros, groups[k] * n_rows + start, stride, int64(1), m)
                    curvature = hessian[k * n_columns + k]
                    for n in range(m):
                        q = centred[at + uint64(n)] * scale[n]
                        best = q + tile[own + uint64(n)] / curvature
                        t[n] = best / scale[n] + zero[n]
                    snap(t, power, m, rule)
                    step = uint64((k - first) * TILE)
                    for n in range(m):
                        code = t[n] - zero[n]
                        change = (code - centred[at + uint64(n)]) * scale[n]
                        centred[at + uint64(n)] = code
                        delta[at + uint64(n)] -= change
                        steps[step + uint64(n)] = change
                        totals[own + uint64(n)] += change
                    for j in range(k + 1, stop):
                        h, to = hessian[k * n_columns + j], uint64(j * TILE)
                        for n in range(m):
                            tile[to + uint64(n)] -= steps[step + uint64(n)] * h
                for j in range(stop, end):
                    _spread(tile, steps, first, stop, j, hessian, n_columns, first, m)
                first = stop
            for j in range(end, n_columns):
                _spread(tile, totals[run * TILE :], run, end, j, hessian, n_columns, run, m)
            run = end


@inner
def _fit_run(tile, totals, products, run, end, group, start, m, stride, rule, shared, scales,
             centred, delta, power):  # fmt: skip
    """The best scale for a group's codes, where it helps after rounding to what is stored.

    With a step d of the scale the objective changes by d (d A - 2 r), A = c' H c, r = c' R.
    """
    curvature = np.zeros(TILE, dtype=np.float32)
    slope = np.zeros(TILE, dtype=np.float32)
    fitted = np.empty(TILE, dtype=np.float32)
    for k in range(run, end):
        own, at = uint64(k * TILE), uint64(start) + uint64(k) * stride
        for n in range(m):
            code = centred[at + uint64(n)]
            curvature[n] += code * products[at + uint64(n)]
            slope[n] += code * tile[own + uint64(n)]
    of_group = uint64(group) * stride + uint64(start)
    for n in range(m):
        known = scales[of_group + uint64(n)]
        solved = known + slope[n] / curvature[n]
        usable = curvature[n] > ZERO and abs(solved) < ERROR_MAX and solved != ZERO
        fitted[n] = solved if usable else known
    store(fitted, shared, power, m, rule)
    for n in range(m):
        known = scales[of_group + uint64(n)]
        step = fitted[n] - known
        helps = (step * curvature[n] - TWO * slope[n]) * step < ZERO
        fitted[n] = step if helps else ZERO  # from here on the step
        scales[of_group + uint64(n)] = known + fitted[n]
    for k in range(run, end):
        own, at = uint64(k * TILE), uint64(start) + uint64(k) * stride
        for n in range(m):
            change = fitted[n] * centred[at + uint64(n)]
            totals[own + uint64(n)] = change
            delta[at + uint64(n)] -= change
            tile[own + uint64(n)] -= fitted[n] * products[at + uint64(n)]
