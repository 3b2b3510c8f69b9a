"""Which formats of a unit can win, from costs in a few: only those are worth quantizing.

A unit's costs in all formats lie near one curve over bits. What GPTQ gains over rounding to
nearest belongs to the unit much more than to the format, so a unit is measured in a few anchor
formats and the curve through them is taken for the others; how far formats lie beside the line
between their neighbouring anchors is learned from units that are measured in all of them.

    log c_f = (1 - t) log c_a + t log c_b + shift_f,  t = (bits_f - bits_a) / (bits_b - bits_a)

with a, b the anchors around f by bits (outside, the nearest one alone), shift_f the median over
the units that are measured in all formats. Of the completed costs the solver's choices at several
sizes are taken, and for each unit what comes next at the same price of a bit.

Letters: U units, F formats.
"""

from collections.abc import Sequence

import numpy as np

from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.solver import frontier, solve

_LEAST = 1e-30


def complete_costs(cost: FloatArray, bits: FloatArray, anchors: Sequence[int]) -> FloatArray:
    """Fill in what was not measured.

    Worked example: anchors of 2 and 4 bits at costs 16 and 1; a format of 3 bits that is measured
    at 5 where the line says 4 (shift log 1.25) in the one unit that has all formats. A unit with
    costs 160 and 10 gets 40 * 1.25 = 50 there.

    Args:
        cost: float64 [U, F], >= 0; NaN where not measured, nowhere in the columns of anchors.
        bits: float64 [F], nominal bits per weight.
        anchors: columns that every unit is measured in, at least one.

    Returns:
        float64 [U, F] without NaN; what was measured is kept.
    """
    logs = np.log(np.maximum(cost, _LEAST))
    ordered = sorted(anchors, key=lambda column: bits[column])
    found = logs.copy()
    for column in range(cost.shape[1]):
        if column in anchors:
            continue
        line = _line(logs, bits, ordered, column)
        measured = ~np.isnan(cost[:, column])
        shift = np.median((logs[:, column] - line)[measured]) if measured.any() else 0.0
        found[:, column] = np.where(measured, logs[:, column], line + shift)
    return np.where(np.isnan(cost), np.exp(found), cost)


def shortlist(
    cost: FloatArray,
    bits: IntArray,
    allowed: BoolArray,
    limits: Sequence[int],
    n_per_unit: int = 2,
) -> BoolArray:
    """What can win at some sizes.

    Args:
        cost: float64 [U, F], complete.
        bits: int64 [U, F], stored bits.
        allowed: bool [U, F].
        limits: stored bits of all units together, each one a size to choose for, none below the
            smallest formats.
        n_per_unit: formats of a unit that are taken at each size, the best first.

    Returns:
        bool [U, F]: the choices at these sizes and the next best formats.
    """
    path = frontier(cost, bits, allowed)
    found = np.zeros_like(allowed)
    for limit in limits:
        found[np.arange(len(cost)), solve(cost, bits, allowed, limit).choice] = True
        price = path.slopes[min(path.point_within(limit), len(path.slopes) - 1)]
        priced = np.where(allowed, cost + price * bits, np.inf)
        best = np.argsort(priced, axis=1, kind="stable")[:, :n_per_unit]
        np.put_along_axis(found, best, True, axis=1)
    return found & allowed


def _line(logs: FloatArray, bits: FloatArray, anchors: Sequence[int], column: int) -> FloatArray:
    """The line between the anchors around a column, float64 [U]."""
    below = [a for a in anchors if bits[a] <= bits[column]]
    above = [a for a in anchors if bits[a] >= bits[column]]
    if not below or not above or bits[below[-1]] == bits[above[0]]:
        nearest: FloatArray = logs[:, (below[-1] if below else above[0])]
        return nearest
    first, last = below[-1], above[0]
    share = (bits[column] - bits[first]) / (bits[last] - bits[first])
    line: FloatArray = (1 - share) * logs[:, first] + share * logs[:, last]
    return line
