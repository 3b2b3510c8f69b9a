"""HiGHS over what a certified gap leaves open, for allocations with side constraints.

At prices of the limits the best choice of a layer costs at least `least`; with option f for unit
u it costs at least `alone` plus u's reduced cost. What exceeds the gap by that cannot be part of
a better choice; the rest is an integer program with x_uf for options and, where formats of a
layer are limited, z_lf >= x_uf for the formats of layer l. No clock stops it, so that equal
arguments give equal choices: it is skipped beyond `MAX_VARIABLES` and stops at a number of nodes.

Letters: U units, F formats, L layers, K limits, N variables x, S searched units.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult
from scipy.sparse import csr_array, hstack

from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.highs import quiet_milp
from alphaquant.search.side.cohorts import choose
from alphaquant.search.side.prices import Case
from alphaquant.search.solver import one_per_row

MAX_VARIABLES = 2000
_GAP_UNITS = 1000.0
_INFEASIBLE = 2
_EXACT = 10_000


@dataclass(frozen=True, eq=False)
class Closed:
    """What the integer search found.

    Attributes:
        choice: int64 [U] within all limits, None if none was found.
        bound: lower bound of the open choices; -inf without one.
        is_impossible: no choice keeps the limits; only said where all options were open.
    """

    choice: IntArray | None
    bound: float
    is_impossible: bool = False


@dataclass(frozen=True, eq=False)
class _Search:
    """The variables: an open option of a unit that has several.

    Attributes:
        units: int64 [S], searched units.
        rows: int64 [N], position in `units` of each variable.
        columns: int64 [N], its option.
        fixed: int64 [U], the first open option of each unit: what units not searched take.
        is_fixed: bool [U].
    """

    units: IntArray
    rows: IntArray
    columns: IntArray
    fixed: IntArray
    is_fixed: BoolArray


def open_options(case: Case, prices: FloatArray, cost: float) -> BoolArray:
    """Options [U, F] that a choice cheaper than `cost` can contain."""
    table = case.priced(prices)
    found = choose(table, case.cohorts)
    bound = float(found.least.sum()) - float(prices @ case.limits.limits)
    room = (cost - bound) * (1 + 1e-9) + 1e-12 * abs(cost)
    # A layer where the limit on formats costs something is not cheaper than its least anyway.
    room_of_layer = room + found.least - found.alone
    reduced = table - table.min(axis=1, keepdims=True)
    return np.asarray(case.allowed & (reduced <= room_of_layer[case.cohorts.layers][:, None]))


def close(case: Case, is_open: BoolArray, unit_cost: float, max_nodes: int) -> Closed:
    """The cheapest choice of open options within all limits, as far as `max_nodes` lead.

    Args:
        case: what to allocate.
        is_open: bool [U, F], at least one option per unit.
        unit_cost: a cost difference > 0 that counts; HiGHS stops at 1e-9 of it.
        max_nodes: of the branch and bound.
    """
    search = _make_search(is_open)
    if not search.units.size or len(search.rows) > MAX_VARIABLES:
        return Closed(None, -np.inf)
    open_cost = np.where(is_open, case.cost, np.inf)
    least = open_cost.min(axis=1)
    gains = _GAP_UNITS / unit_cost * (open_cost - least[:, None])
    objective = gains[search.units[search.rows], search.columns]
    formats, needed = _format_rows(case, search)
    n_formats = len(needed)
    result: OptimizeResult = quiet_milp(
        np.concatenate([objective, np.zeros(n_formats)]),
        integrality=np.ones(len(objective) + n_formats, dtype=np.int64),
        bounds=Bounds(np.concatenate([np.zeros(len(objective)), needed]), 1),
        constraints=[*_unit_rows(case, search, n_formats), *(formats or ())],
        options={"node_limit": max_nodes, "mip_rel_gap": 0.0},
    )
    is_impossible = result.status == _INFEASIBLE and bool((is_open == case.allowed).all())
    fixed_cost = float(least.sum())
    bound = -np.inf
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        bound = fixed_cost + (result.mip_dual_bound - 1e-6) * unit_cost / _GAP_UNITS
    if result.x is None:
        return Closed(None, bound, is_impossible)
    choice = search.fixed.copy()
    taken = result.x[: len(objective)] > 0.5
    choice[search.units[search.rows[taken]]] = search.columns[taken]
    # HiGHS keeps a limit to 1e-6 only: what it found is counted again.
    return Closed(choice if case.keeps_limits(choice) else None, bound)


def _make_search(is_open: BoolArray) -> _Search:
    is_fixed = is_open.sum(axis=1) == 1
    units = np.flatnonzero(~is_fixed)
    rows, columns = np.nonzero(is_open[units])
    return _Search(units, rows, columns, is_open.argmax(axis=1), is_fixed)


def _unit_rows(case: Case, search: _Search, n_formats: int) -> list[LinearConstraint]:
    """One option per unit; and the limits, on bits beyond each unit's first open option."""
    limits, units = case.limits, search.units[search.rows]
    first = case.taken(case.bits, search.fixed)
    extra = case.bits[units, search.columns] - first[units]
    spare = -limits.excess(first)
    table = np.zeros((len(spare), len(units)))
    for index, weights in zip(limits.index[units].T, limits.weights[units].T, strict=True):
        table[index, np.arange(len(units))] += weights * extra
    for k, row in enumerate(table):
        largest = divisor = max(1.0, float(np.abs(row).max()))
        common = float(np.gcd.reduce(np.rint(row).astype(np.int64)))
        if (row == np.rint(row)).all() and common > 0 and largest <= _EXACT * common:
            # HiGHS keeps limits to 1e-6: integers this small stay exact. Larger ones make it
            # refuse its own roundings, so those are scaled to 1 and counted again.
            divisor, spare[k] = common, np.floor(spare[k] / common) * common
        row /= divisor
        spare[k] /= divisor
    empty = csr_array((len(spare), n_formats))
    one = one_per_row(search.rows)
    none = csr_array((one.shape[0], n_formats))
    return [
        LinearConstraint(hstack([one, none], format="csr"), 1, 1),
        LinearConstraint(hstack([csr_array(table), empty], format="csr"), -np.inf, spare),
    ]


def _format_rows(case: Case, search: _Search) -> tuple[list[LinearConstraint] | None, FloatArray]:
    """z_lf >= x_uf and sum_f z_lf <= q; and z_lf that units not searched need, float64."""
    cohorts, n_formats = case.cohorts, case.cost.shape[1]
    if cohorts.max_formats is None:
        return None, np.zeros(0)
    n_cells, n_options = cohorts.n_layers * n_formats, len(search.rows)
    needed = np.zeros(n_cells)
    held = np.flatnonzero(search.is_fixed & cohorts.is_expert)
    needed[cohorts.layers[held] * n_formats + search.fixed[held]] = 1
    units = search.units[search.rows]
    of_experts = np.flatnonzero(cohorts.is_expert[units])
    cells = cohorts.layers[units[of_experts]] * n_formats + search.columns[of_experts]
    rows = np.tile(np.arange(len(of_experts)), 2)
    values = np.repeat([1.0, -1.0], len(of_experts))
    columns = np.concatenate([of_experts, n_options + cells])
    shape = (len(of_experts), n_options + n_cells)
    links = LinearConstraint(csr_array((values, (rows, columns)), shape=shape), -np.inf, 0)
    layers, at = np.repeat(np.arange(cohorts.n_layers), n_formats), np.arange(n_cells) + n_options
    shape = (cohorts.n_layers, n_options + n_cells)
    counts = csr_array((np.ones(n_cells), (layers, at)), shape=shape)
    return [links, LinearConstraint(counts, -np.inf, cohorts.max_formats)], needed
