# mypy: ignore-errors
"""The loop over coupled rows on a CPU, compiled with numba; see `columns_numba.py`.

Unlike the loops there it has columns as the lanes of a vector, because a row has to know what
those before it changed.

Letters: B columns of a block, R rows of a tile, N rows, G groups; as in `columns_numba.py`.
"""

import numpy as np
from numba import int64, uint64

from alphaquant.quant.columns.columns_numba import ERROR_MAX
from alphaquant.quant.columns.compiled import entry, inner
from alphaquant.quant.columns.grids_numba import EXPONENT, ONE, TWO, ZERO, store
from alphaquant.quant.format_rules import SIGN, TABLE, ZERO_POINT


@entry
def sweep_rows(residual, coupling, hessian, products, ends, groups, start, n_rows, rule, shared,
               per_shared, scales, zeros, centred, delta, changes):  # fmt: skip
    """One pass of scales and codes over a block of columns, some coupled rows after each other.

    Args:
        residual: float32 [R * B], P H D of each row, P the coupling; brought up to date in place.
        coupling: float32 [R * R], P between these rows, with ones on its diagonal.
        hessian: float32 [B * B], H.
        products: float32 [R * B], H_gg c_g of each group g; empty where scales stay.
        ends: int64 [B], as in `sweep_block`.
        groups: int64 [B], each column's group among all.
        start: the first of these rows among all.
        n_rows: N, all rows.
        rule: of the format.
        shared: float32 [P * N], what scales of neighbouring groups share, or empty.
        per_shared: groups that do.
        scales: float32 [G * N], read and written.
        zeros: float32 [G * N], read.
        centred: float32 [B * N], c, read and written.
        delta: float32 [B * N], D, read and written.
        changes: float32 [R * B], written: what became of H D.
    """
    n_columns = len(ends)
    n_coupled = len(residual) // n_columns
    t = np.empty(1, dtype=np.float32)
    power = np.empty(1, dtype=np.float32)
    bits, power_bits = t.view(np.uint32), power.view(np.uint32)
    own = np.empty(n_columns, dtype=np.float32)
    # A call per number takes longer than its rounding: `grids_numba.snap` is here once more.
    kind, low, high, least, width = rule.kind, rule.low, rule.high, rule.least, rule.step
    table, middles = rule.table, rule.middles
    for i in range(n_coupled):
        row, at = uint64(i * n_columns), uint64(start + i)
        for k in range(n_columns):
            own[k] = residual[row + uint64(k)]
        is_same = True
        run = int64(0)
        while run < n_columns:
            end = ends[run]
            if len(products) > 0:
                of_shared = groups[run] // per_shared * n_rows + start + i
                step = _fit_row(
                    own, products[i * n_columns :], run, end, groups[run] * n_rows + start + i,
                    n_rows, at, rule, shared[of_shared : of_shared + 1], scales, centred, power,
                )  # fmt: skip
                if step != ZERO:
                    is_same = False
                    for k in range(run, end):
                        change = step * centred[uint64(k) * uint64(n_rows) + at]
                        delta[uint64(k) * uint64(n_rows) + at] -= change
                        _subtract_row(own, hessian, k, change, n_columns)
            scale = scales[groups[run] * n_rows + start + i]
            zero = zeros[groups[run] * n_rows + start + i]
            for k in range(run, end):
                if groups[k] != groups[run]:
                    scale = scales[groups[k] * n_rows + start + i]
                    zero = zeros[groups[k] * n_rows + start + i]
                place = uint64(k) * uint64(n_rows) + at
                known = centred[place]
                best = known * scale + own[k] / hessian[k * n_columns + k]
                value = best / scale + zero
                if kind == SIGN:
                    value = -ONE if value < ZERO else ONE
                elif kind <= ZERO_POINT:
                    value = min(max(np.rint(value), low), high) + ZERO
                elif kind == TABLE:
                    level = 0
                    while level < len(middles) and value > middles[level]:
                        level += 1
                    value = table[level]
                else:
                    t[0] = min(max(value, -high), high)
                    power_bits[0] = bits[0] & EXPONENT
                    unit = max(power[0], least) * width
                    value = np.rint(t[0] / unit) * unit
                code = value - zero
                if code != known:
                    change = (code - known) * scale
                    centred[place] = code
                    delta[place] -= change
                    is_same = False
                    _subtract_row(own, hessian, k, change, n_columns)
            run = end
        for k in range(n_columns):
            changes[row + uint64(k)] = own[k] - residual[row + uint64(k)]
        if is_same:
            continue
        for j in range(i + 1, n_coupled):
            share, to = coupling[j * n_coupled + i], uint64(j * n_columns)
            for k in range(n_columns):
                residual[to + uint64(k)] += share * changes[row + uint64(k)]


@inner
def _subtract_row(own, hessian, k, change, n_columns):
    """Own -= change * H[k]."""
    row = uint64(k * n_columns)
    for j in range(n_columns):
        own[j] -= change * hessian[row + uint64(j)]


@inner
def _fit_row(own, products, run, end, of_group, n_rows, at, rule, shared, scales, centred, power):
    """The step of the scale of one row's group that `_fit_run` would take; it is taken here."""
    curvature, slope = ZERO, ZERO
    for k in range(run, end):
        code = centred[uint64(k) * uint64(n_rows) + at]
        curvature += code * products[k]
        slope += code * own[k]
    known = scales[of_group]
    solved = known + slope / curvature
    fitted = np.empty(1, dtype=np.float32)
    usable = curvature > ZERO and abs(solved) < ERROR_MAX and solved != ZERO
    fitted[0] = solved if usable else known
    store(fitted, shared, power, int64(1), rule)
    step = fitted[0] - known
    if not (step * curvature - TWO * slope) * step < ZERO:
        return ZERO
    scales[of_group] = known + step
    return step
