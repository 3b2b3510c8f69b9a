"""Pools: experts as the members of one knapsack, and layers that keep wide experts.

Published allocators give an expert one format and ask that no layer loses all its wide experts.
Merging an expert's units is adding their bits; the layer rule is solved as the plain knapsack with
some formats of some experts taken away.

Letters: U units, F formats, R units that are searched, P members (experts or units), W widths.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor

import numpy as np

from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.problem import Problem
from alphaquant.search.solver import Solution, close_gap, frontier, solve
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import GATE, UP, Unit

_FUSED_ATTENTION = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
)
_TINY = float(np.finfo(np.float64).tiny)
_PRICE_FACTORS = (1.0, 2.0, 4.0, 8.0)
_CLOSE_ENOUGH = 1e-3
"""Certified gap that is left open. Many alike members take HiGHS long: 512 units of AlphaQ with a
gap of 1e-4 ran into its limit of 10 s, and a search that ends by time need not repeat itself; of
28 problems up to 2048 units, those above 1e-3 took 0.6 s at most (one core, Intel Xeon)."""


@dataclass(frozen=True, eq=False)
class Pool:
    """What an expert-level allocator searches over: P experts, or units.

    Attributes:
        rows: int64 [R], units of the problem.
        member: int64 [R], which of the P members each of them belongs to.
        bits: int64 [P, F], sums over the units.
        allowed: bool [P, F], allowed for all units.
        layers: int64 [P].
        n_weights: float64 [P].
    """

    rows: IntArray
    member: IntArray
    bits: IntArray
    allowed: BoolArray
    layers: IntArray
    n_weights: FloatArray

    def sum(self, values: FloatArray) -> FloatArray:
        """Add values of units [U, F] up to members, [P, F]."""
        totals = np.zeros(self.bits.shape)
        np.add.at(totals, self.member, values[self.rows])
        return totals

    def share(self, values: FloatArray) -> FloatArray:
        """Each member's share of its layer, [P]; the largest of its units' values [U] counts.

        Units of an expert see the same tokens, so their values agree. A layer without any value
        has shares of 0.
        """
        largest = np.zeros(len(self.layers))
        np.maximum.at(largest, self.member, values[self.rows])
        totals = np.bincount(self.layers, weights=largest)[self.layers]
        return np.divide(largest, totals, out=np.zeros_like(largest), where=totals > 0)

    def part(self, members: IntArray) -> "Pool":
        """The pool of some members, ascending int64."""
        is_inside = np.isin(self.member, members)
        return Pool(
            self.rows[is_inside],
            np.searchsorted(members, self.member[is_inside]),
            self.bits[members],
            self.allowed[members],
            self.layers[members],
            self.n_weights[members],
        )


def make_pool(problem: Problem, rows: IntArray, is_whole: bool, limit_bits: int) -> Pool:
    """Merge the units of each expert if the result fits, else keep the units.

    Args:
        problem: units, bits, allowed formats.
        rows: int64 [R], the units to search.
        is_whole: whether to merge.
        limit_bits: what the members may take.
    """
    if is_whole:
        pool = _pool_of(problem, rows, expert_members(problem, rows))
        if least_bits(pool.bits, pool.allowed) <= limit_bits:
            return pool
    return _pool_of(problem, rows, np.arange(len(rows)))


def expert_members(problem: Problem, rows: IntArray) -> IntArray:
    """Which expert each unit belongs to; units outside routed experts are on their own.

    So is a unit that a profile made of several experts.

    Args:
        problem: the units.
        rows: int64 [R], those that are asked for.

    Returns:
        int64 [R], numbered by first appearance.
    """
    index: dict[str, int] = {}
    keys = (_expert_key(problem.units[row]) for row in rows)
    return np.array([index.setdefault(key, len(index)) for key in keys], dtype=np.int64)


def fused_pool(problem: Problem, limit_bits: int) -> Pool:
    """What one kernel of an engine loads as one: each layer's experts, its q/k/v, its gate and up.

    Units on their own where the smallest formats of such members exceed the limit together.

    Args:
        problem: all units are in the pool.
        limit_bits: what the members may take.
    """
    rows, index = np.arange(len(problem.units)), dict[object, int]()
    member = np.array([index.setdefault(_fused_key(u), len(index)) for u in problem.units])
    pool = _pool_of(problem, rows, member)
    fits = least_bits(pool.bits, pool.allowed) <= limit_bits
    return pool if fits else _pool_of(problem, rows, rows)


def least_bits(bits: IntArray, allowed: BoolArray) -> float:
    """Bits [P, F] of the smallest allowed formats together; infinite where a row has none."""
    return float(np.where(allowed, bits, np.inf).min(axis=1).sum())


def layer_parts(pool: Pool, limit_bits: int) -> Iterator[tuple[Pool, int]]:
    """The pool of each layer with its budget: the least that it takes, and its part of the spare.

    The spare is dealt out by weights, so equal layers get equal budgets.

    Args:
        pool: of all layers.
        limit_bits: at least what its smallest formats take.
    """
    spare = limit_bits - int(least_bits(pool.bits, pool.allowed))
    for layer in np.unique(pool.layers):
        part = pool.part(np.flatnonzero(pool.layers == layer))
        share = float(part.n_weights.sum() / pool.n_weights.sum())
        yield part, int(least_bits(part.bits, part.allowed)) + floor(spare * share)


def code_widths(problem: Problem) -> IntArray:
    """int64 [F], bits of one code in each format: 4 for `int4-g128` and `mxfp4`."""
    return np.array([parse_format(name).bits for name in problem.formats], dtype=np.int64)


def solve_keeping_wide(
    pool: Pool, cost: FloatArray, limit_bits: int, widths: IntArray
) -> Solution:
    """The optimum in which every layer keeps one expert at the highest and one at the next width.

    The lower width is the widest that all members could take within the limit, the higher one the
    menu's next; a wider format counts too. What does not fit is dropped, first the higher width,
    then both. Layers of fewer than three members keep nothing.

    Which members are held is decided at the price per bit of the optimum without the rule, which
    the rule raises or leaves: several multiples are tried. The bound of that optimum is kept, so
    the gap covers the decision.

    Worked example: 8 experts of 100 weights, widths 2, 3, 4 of as many bits, limit 2000: all could
    take 2 bits (1600), not 3 (2400), so one expert has at least 3 bits and another at least 2.

    Args:
        pool: P members.
        cost: float64 [P, F].
        limit_bits: at least what the smallest formats take.
        widths: int64 [F], see `code_widths`.
    """
    free = solve_closely(cost, pool.bits, pool.allowed, limit_bits)
    path = frontier(cost, pool.bits, pool.allowed)
    point = path.point_within(limit_bits)
    price = float(path.slopes[point]) if point < len(path.slopes) else 0.0
    kept = _kept_widths(pool, limit_bits, widths)
    for wanted in (kept, kept[1:]):
        if _keeps(pool, free.choice, widths, wanted):
            return free
        # By bits alone is the tightest way to hold members.
        priced = [cost + factor * price * pool.bits for factor in _PRICE_FACTORS]
        masks = [_hold(pool, table, widths, wanted) for table in (*priced, 1.0 * pool.bits)]
        fitting = {m.tobytes(): m for m in masks if least_bits(pool.bits, m) <= limit_bits}
        held = [solve_closely(cost, pool.bits, mask, limit_bits) for mask in fitting.values()]
        if held:
            best = min(held, key=lambda solution: solution.cost)
            return with_bound(best, free.lower_bound)
    return free


def solve_closely(
    cost: FloatArray, bits: IntArray, allowed: BoolArray, limit_bits: int
) -> Solution:
    """Greedy where it is certified to be within 0.1 %, else the optimum; as `solve` otherwise."""
    greedy = solve(cost, bits, allowed, limit_bits)
    if greedy.gap <= _CLOSE_ENOUGH:
        return greedy
    return close_gap(cost, bits, allowed, limit_bits)


def with_bound(solution: Solution, bound: float) -> Solution:
    """The solution with another lower bound and the gap to it."""
    bound = min(bound, solution.cost)
    gap = (solution.cost - bound) / max(bound, _TINY) if solution.cost > bound else 0.0
    return replace(solution, lower_bound=bound, gap=gap)


def _pool_of(problem: Problem, rows: IntArray, member: IntArray) -> Pool:
    shape = (int(member.max()) + 1, len(problem.formats))
    bits, allowed = np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.bool_)
    np.add.at(bits, member, problem.bits[rows])
    np.logical_and.at(allowed, member, problem.allowed[rows])
    layers = np.zeros(shape[0], dtype=np.int64)
    layers[member] = problem.layers[rows]
    n_weights = np.zeros(shape[0])
    np.add.at(n_weights, member, problem.n_weights[rows])
    return Pool(rows, member, bits, allowed, layers, n_weights)


def _expert_key(unit: Unit) -> str:
    """The path of the one expert that holds all matrices of a unit, else the unit's own key."""
    experts = {(m.expert, m.name.rpartition(".")[0]) for m in unit.matrices}
    expert, path = next(iter(experts))
    return path if len(experts) == 1 and expert is not None else f"unit {unit.name}"


def _fused_key(unit: Unit) -> object:
    """What units of one kernel share."""
    projections = {m.projection for m in unit.matrices}
    if unit.kind == "expert":
        return unit.layer, "experts"
    if unit.kind == "attention":
        fused = (part for part in _FUSED_ATTENTION if projections <= part)
        return unit.layer, next(fused, unit.name)
    if unit.kind in ("shared", "dense") and projections <= {*GATE, *UP}:
        return unit.layer, unit.kind
    return unit.name


def _kept_widths(pool: Pool, limit_bits: int, widths: IntArray) -> tuple[int, ...]:
    """The widths that each layer keeps, the higher first; the menu's widest has no higher."""
    known = sorted(set(widths.tolist()))
    fits = [least_bits(pool.bits, pool.allowed & (widths >= w)) <= limit_bits for w in known]
    n_fitting = fits.index(False) if False in fits else len(fits)
    return tuple(reversed(known[n_fitting - 1 : n_fitting + 1]))


def _layers_that_keep(pool: Pool) -> Iterator[IntArray]:
    """The members of each layer that has at least three."""
    for layer in np.unique(pool.layers):
        members = np.flatnonzero(pool.layers == layer)
        if len(members) > 2:
            yield members


def _keeps(pool: Pool, choice: IntArray, widths: IntArray, wanted: tuple[int, ...]) -> bool:
    chosen = widths[choice]
    return all(
        (np.sort(chosen[members])[::-1][: len(wanted)] >= wanted).all()
        for members in _layers_that_keep(pool)
    )


def _hold(pool: Pool, priced: FloatArray, widths: IntArray, wanted: tuple[int, ...]) -> BoolArray:
    """What stays allowed [P, F] once each layer's cheapest holders of the wanted widths are held.

    Holding a member costs what its best format of that width is dearer than its best of all.
    """
    allowed = pool.allowed.copy()
    best = np.where(allowed, priced, np.inf).min(axis=1)
    extra = [np.where(allowed & (widths >= w), priced, np.inf).min(axis=1) - best for w in wanted]
    for members in _layers_that_keep(pool):
        dearer = extra[0][members][:, None]  # [m, 1]
        if len(wanted) == 2:
            dearer = dearer + extra[1][members]  # [m, m]: holder of the higher, of the lower
            np.fill_diagonal(dearer, np.inf)
        holders = np.unravel_index(int(dearer.argmin()), dearer.shape)[: len(wanted)]
        for holder, width in zip(holders, wanted, strict=True):
            allowed[members[holder]] &= widths >= width
    return allowed
