"""The cheapest choice at given prices where the routed experts of a layer share a few formats.

Experts of one format are one launch (a cohort). At given prices units decide alone, but for the
experts of a layer, which may use at most q formats together: the q columns whose row minima add
up to least. All subsets are tried where there are few; elsewhere columns are added greedily and
exchanged while that helps, and the bound is what the units would take without the limit.

Worked example, three experts, q = 2, priced costs of formats a, b, c::

    0 5 5      {a, b}: 0 + 0 + 5 = 5
    5 0 4      {a, c}: 0 + 4 + 0 = 4, the best
    5 5 0      {b, c}: 5 + 0 + 0 = 5; alone 0 + 0 + 0 = 0, the bound of the greedy

Letters: U units, F formats, L layers, q formats per layer.
"""

from dataclasses import dataclass
from math import comb

import numpy as np

from alphaquant.search.arrays import BoolArray, FloatArray, IntArray

MAX_SUBSETS = 1000
"""Subsets of formats that are tried one by one: those of 12 formats for every q."""


@dataclass(frozen=True, eq=False)
class Cohorts:
    """Whose formats are counted together.

    Attributes:
        layers: int64 [U], layer of each unit, 0 to L - 1.
        n_layers: L.
        is_expert: bool [U], routed experts; all others choose alone.
        max_formats: q, None without a limit.
    """

    layers: IntArray
    n_layers: int
    is_expert: BoolArray
    max_formats: int | None


@dataclass(frozen=True, eq=False)
class Priced:
    """The cheapest choice at some prices.

    Attributes:
        choice: int64 [U].
        least: float64 [L], no choice of the layer costs less at these prices.
        alone: float64 [L], the same if every unit chose alone.
        is_in: bool [L, F], formats that the experts of a layer may take.
    """

    choice: IntArray
    least: FloatArray
    alone: FloatArray
    is_in: BoolArray


def choose(priced: FloatArray, cohorts: Cohorts) -> Priced:
    """The cheapest choice of every layer, exact where there are at most `MAX_SUBSETS` subsets.

    Args:
        priced: float64 [U, F], infinite where not allowed; `covering` tells whether q suffice.
        cohorts: see `Cohorts`.
    """
    choice = priced.argmin(axis=1)
    lowest = priced[np.arange(len(priced)), choice]
    alone = np.bincount(cohorts.layers, lowest, cohorts.n_layers).astype(np.float64)
    least = alone.copy()
    is_in = np.ones((cohorts.n_layers, priced.shape[1]), dtype=np.bool_)
    if cohorts.max_formats is not None:
        for layer in range(cohorts.n_layers):
            experts = np.flatnonzero(cohorts.is_expert & (cohorts.layers == layer))
            if not experts.size:
                continue
            table = np.ascontiguousarray(priced[experts].T)
            columns, is_exact = best_columns(table, cohorts.max_formats)
            choice[experts] = columns[table[columns].argmin(axis=0)]
            if is_exact:
                taken = priced[experts, choice[experts]]
                least[layer] += float((taken - lowest[experts]).sum())
            is_in[layer] = False
            is_in[layer, columns] = True
    return Priced(choice, least, alone, is_in)


def best_columns(table: FloatArray, max_formats: int) -> tuple[IntArray, bool]:
    """At most q formats whose minima add up to least.

    Args:
        table: float64 [F, experts], infinite where not allowed.
        max_formats: q.

    Returns:
        int64 [<= q], ascending; and whether nothing is better.
    """
    usable = np.flatnonzero(np.isfinite(table).any(axis=1))
    if len(usable) <= max_formats:
        return usable, True
    if comb(len(usable), max_formats) > MAX_SUBSETS:
        return _exchanged(table, usable, max_formats), False
    return _best_subset(table, usable, max_formats), True


def uncovered(allowed: BoolArray, cohorts: Cohorts) -> int | None:
    """A layer for whose experts no q formats were found that give each an allowed one.

    Args:
        allowed: bool [U, F].
        cohorts: see `Cohorts`.

    Returns:
        The first such layer, None if there is none.
    """
    missing = np.where(allowed, 0.0, np.inf)
    found = choose(missing, cohorts)
    taken = missing[np.arange(len(missing)), found.choice]
    layers = cohorts.layers[~np.isfinite(taken)]
    return int(layers.min()) if layers.size else None


def _best_subset(table: FloatArray, usable: IntArray, max_formats: int) -> IntArray:
    """The best of all subsets; each takes the minima of its first q - 1 members from before."""
    members, lowest = np.arange(len(usable))[:, None], table[usable]
    for size in range(2, max_formats + 1):
        # Ascending, and enough columns are left to reach q.
        follows = members[:, -1:] < np.arange(len(usable) - max_formats + size)
        parents, added = np.nonzero(follows)
        members = np.concatenate([members[parents], added[:, None]], axis=1)
        lowest = np.minimum(lowest[parents], table[usable[added]])
    return np.asarray(usable[members[lowest.sum(axis=1).argmin()]])


def _exchanged(table: FloatArray, usable: IntArray, max_formats: int) -> IntArray:
    """Greedy additions, then exchanges of one column while the sum falls."""
    inside: list[int] = []
    for _ in range(max_formats):
        trials = [[*inside, int(c)] for c in usable if c not in inside]
        inside = min(trials, key=lambda columns: _sum_of_minima(table, columns))
    best = _sum_of_minima(table, inside)
    while True:
        trials = [
            [*(c for c in inside if c != out), int(new)]
            for out in inside
            for new in usable
            if new not in inside
        ]
        found = min(trials, key=lambda columns: _sum_of_minima(table, columns))
        if not _sum_of_minima(table, found) < best:
            return np.array(sorted(inside), dtype=np.int64)
        inside, best = found, _sum_of_minima(table, found)


def _sum_of_minima(table: FloatArray, columns: list[int]) -> tuple[int, float]:
    """Experts without an allowed column, and the sum over the others."""
    lowest = table[columns].min(axis=0)
    is_covered = np.isfinite(lowest)
    return int((~is_covered).sum()), float(lowest[is_covered].sum())
