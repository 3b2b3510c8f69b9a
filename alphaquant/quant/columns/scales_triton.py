# mypy: ignore-errors
"""Choosing the scales of a group of columns, inside Triton kernels (`codecs.fit`).

What `grids_numba.py` does for 64 rows, a program does for its R rows: the format's own scale and
other candidates, the one of least weighted squared error, then least squares for scales that are
free numbers. Columns are read from memory P at a time, once per candidate.

`row_step` is 1 and no constant: so Triton does not know that rows are neighbours, loads one row
per thread, and sums over columns stay inside a thread. Where it knows, a thread gets four rows,
threads share columns, and every sum goes through shared memory.

Letters: S stacks, K columns, N rows, G groups, P columns of a panel, R rows of a program.
"""

import triton
import triton.language as tl

from alphaquant.quant.columns.grids_triton import (
    FLOAT,
    INTEGER,
    MX,
    SIGN,
    TABLE,
    ZERO_POINT,
    clip,
    divide,
    largest,
    power_below,
    round_e4m3,
    round_half,
    round_whole,
    smallest,
    snap,
    store,
    to_half,
    total,
    zeros_of,
)

_LEAST_POWER_BITS = tl.constexpr(1 << 22)  # 2^-127, which Triton would take for a float64
_MOST_POWER = tl.constexpr(2.0**127)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def load_panel(base, columns, is_column, n_rows, at_rows, is_row):
    """Some columns of a program's rows, 0 where there are none.

    Args:
        base: pointer to the first column, float32 [columns, N].
        columns: int [P].
        is_column: bool [P].
        n_rows: N.
        at_rows: int [R], rows times their step.
        is_row: bool [R].
    """
    at = base + columns[:, None] * n_rows + at_rows[None, :]  # [P, R]
    return tl.load(at, mask=is_column[:, None] & is_row[None, :], other=0.0)


@triton.jit
def _statistics(base, n_columns, n_rows, at_rows, is_row, KIND: tl.constexpr, PANEL: tl.constexpr):
    """What scales are made of, by row, [R] each.

    The mean magnitude (signs), the number of largest magnitude (symmetric integers), the least and
    the largest number (with zero points), the largest magnitude (floats).
    """
    first = zeros_of(at_rows)
    second = first
    places = tl.arange(0, PANEL)
    for start in range(0, n_columns, PANEL):
        columns = start + places
        x = load_panel(base, columns, columns < n_columns, n_rows, at_rows, is_row)
        if KIND == SIGN:
            first += total(tl.abs(x), 0)
        elif KIND == INTEGER or KIND == TABLE:  # noqa: SIM109
            magnitudes = tl.abs(x)
            most = largest(magnitudes, 0)  # [R]
            is_most = magnitudes == most[None, :]
            place = smallest(tl.where(is_most, places[:, None], PANEL), 0)  # the first of them
            number = total(tl.where(places[:, None] == place[None, :], x, 0.0), 0)
            first = tl.where(most > tl.abs(first), number, first)
        elif KIND == ZERO_POINT:
            first = tl.minimum(first, smallest(x, 0))
            second = tl.maximum(second, largest(x, 0))
        else:
            first = tl.maximum(first, largest(tl.abs(x), 0))
    if KIND == SIGN:
        first = divide(first, zeros_of(first) + n_columns)
    return first, second


@triton.jit
def _candidate(factor, first, second, shared, numbers, KIND: tl.constexpr):
    """Scale and zero point of one candidate, [R] each (`codecs.*Codec.candidates`)."""
    zero = zeros_of(first)
    if KIND == SIGN:
        scale = to_half(first)
    elif KIND == INTEGER or KIND == TABLE:  # noqa: SIM109
        scale = store(divide(factor * first, numbers.low), shared, numbers, KIND)
    elif KIND == ZERO_POINT:
        scale = round_half(divide(factor * (second - first), numbers.high))
        zero = round_whole(clip(divide(-factor * first, scale), numbers.low, numbers.high))
    elif KIND == FLOAT:
        scale = round_half(divide(factor * first, numbers.high))
    elif KIND == MX:
        least = tl.full((), _LEAST_POWER_BITS, tl.int32).to(tl.float32, bitcast=True)
        scale = clip(power_below(first) * numbers.unit * factor, least, _MOST_POWER)
    else:
        scale = round_e4m3(factor * divide(divide(first, numbers.high), shared)) * shared
    return scale, zero


@triton.jit
def _squared_error(
    base, weights, n_columns, n_rows, at_rows, is_row, scale, zero, numbers,
    KIND: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Weighted squared errors of a group under given scales, [R]."""
    error = zeros_of(scale)
    for start in range(0, n_columns, PANEL):
        columns = start + tl.arange(0, PANEL)
        is_column = columns < n_columns
        x = load_panel(base, columns, is_column, n_rows, at_rows, is_row)
        weight = tl.load(weights + columns, mask=is_column, other=0.0)  # [P]
        values = snap(divide(x, scale[None, :]) + zero[None, :], numbers, KIND)
        off = (values - zero[None, :]) * scale[None, :] - x
        error += total(weight[:, None] * off * off, 0)
    return error


@triton.jit
def _least_squares(
    base, weights, n_columns, n_rows, at_rows, is_row, shared, scale, zero, numbers,
    KIND: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """The best scale for the codes that the given one leads to, rounded: <x, c> / <c, c>; [R]."""
    cross = zeros_of(scale)
    square = zeros_of(scale)
    for start in range(0, n_columns, PANEL):
        columns = start + tl.arange(0, PANEL)
        is_column = columns < n_columns
        x = load_panel(base, columns, is_column, n_rows, at_rows, is_row)
        weight = tl.load(weights + columns, mask=is_column, other=0.0)  # [P]
        values = snap(divide(x, scale[None, :]) + zero[None, :], numbers, KIND)
        weighted = weight[:, None] * (values - zero[None, :])
        cross += total(weighted * x, 0)
        square += total(weighted * (values - zero[None, :]), 0)
    best = divide(cross, tl.maximum(square, _TINY))
    return store(tl.where(square > 0.0, best, scale), shared, numbers, KIND)


@triton.jit
def fit(
    base, weights, n_columns, n_rows, at_rows, is_row, shared, numbers,
    KIND: tl.constexpr, SEARCHES: tl.constexpr, FITS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Choose scales and zero points of a group of columns, [R] each.

    Args:
        base: pointer to the group's first column, float32 [g, N].
        weights: pointer to the importance of its columns, float32 [g].
        n_columns: g.
        n_rows: N.
        at_rows: int [R], rows times their step.
        is_row: bool [R].
        shared: float32 [R], what the scales share with those of other groups, 1 where nothing.
        numbers: `GridNumbers`.
        KIND: of the rule.
        SEARCHES: whether there is more than one candidate, or columns differ in importance.
        FITS: whether scales are free numbers.
        PANEL: P.
    """
    first, second = _statistics(base, n_columns, n_rows, at_rows, is_row, KIND, PANEL)
    factor = tl.load(numbers.factors)
    scale, zero = _candidate(factor, first, second, shared, numbers, KIND)
    if SEARCHES:
        least = _squared_error(
            base, weights, n_columns, n_rows, at_rows, is_row, scale, zero, numbers, KIND, PANEL
        )
        for c in range(1, numbers.n_factors):
            factor = tl.load(numbers.factors + c)
            tried, tried_zero = _candidate(factor, first, second, shared, numbers, KIND)
            error = _squared_error(
                base, weights, n_columns, n_rows, at_rows, is_row, tried, tried_zero, numbers,
                KIND, PANEL,
            )  # fmt: skip
            is_better = error < least
            least = tl.where(is_better, error, least)
            scale = tl.where(is_better, tried, scale)
            zero = tl.where(is_better, tried_zero, zero)
        if FITS:
            tried = _least_squares(
                base, weights, n_columns, n_rows, at_rows, is_row, shared, scale, zero, numbers,
                KIND, PANEL,
            )  # fmt: skip
            error = _squared_error(
                base, weights, n_columns, n_rows, at_rows, is_row, tried, zero, numbers,
                KIND, PANEL,
            )  # fmt: skip
            scale = tl.where(error < least, tried, scale)
    return scale, zero


@triton.jit(do_not_specialize=["row_step", "n_columns"])
def fit_groups_kernel(
    x_ptr,  # float32 [S, C, N], stacks `stack_step` apart
    importance_ptr,  # float32 [S, C] or [1, C], rows `importance_step` apart
    shared_ptr,  # float32 [S, P, N], stacks `shared_step` apart, or None
    scales_ptr,  # float32 [S, G, N], stacks `scale_step` apart; written
    zeros_ptr,  # likewise
    numbers,
    steps,  # of stacks: x, importance, shared, scales
    sizes,  # group_size, N, first group, groups per shared number
    n_columns,  # C
    row_step,  # 1
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,  # SEARCHES, FITS
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scales of groups from all of their columns; grid (ceil(N / R), groups, S)."""
    group, stack = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row, at_rows = rows < sizes.n_rows, rows * row_step
    start = group * sizes.group_size
    shared = tl.full((ROWS,), 1.0, tl.float32)
    if shared_ptr is not None:
        place = (sizes.first + group) // sizes.per_shared
        at = shared_ptr + stack * steps.shared + place * sizes.n_rows + at_rows
        shared = tl.load(at, mask=is_row, other=1.0)
    scale, zero = fit(
        x_ptr + stack * steps.columns + start.to(tl.int64) * sizes.n_rows,
        importance_ptr + stack * steps.importance + start,
        tl.minimum(sizes.group_size, n_columns - start),
        sizes.n_rows, at_rows, is_row, shared, numbers, KIND, FLAGS[0], FLAGS[1], PANEL,
    )  # fmt: skip
    at = stack * steps.scales + group * sizes.n_rows + at_rows
    tl.store(scales_ptr + at, scale, mask=is_row)
    tl.store(zeros_ptr + at, zero, mask=is_row)
