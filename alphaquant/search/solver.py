"""Multiple-choice knapsack: one format per unit, least total cost within a number of bits.

`frontier` walks the lower convex hulls of all units at once: every prefix of its steps is the
optimum of its own budget and of the linear relaxation. `solve` takes the longest prefix that fits
and spends what is left greedily; the linear relaxation bounds what any choice could reach, so its
gap is certified. `close_gap` lets HiGHS search what that gap leaves open. Costs are plain numbers
here; what they mean is decided in `alphaquant.search.knobs`.

Worked example, two units, bits: cost::

    unit 0    100: 9   200: 4   300: 3     hull 9 -> 4 -> 3, slopes 0.05 and 0.01
    unit 1    100: 5   200: 3   300: 0     hull 5 -> 0, slope 0.025; 200: 3 lies above it
    frontier  (200 bits, cost 14) (300, 9) (500, 4) (600, 3)
    limit 400 prefix (300, 9), bound 9 - 100 * 0.025 = 6.5, fill takes 200: 3 of unit 1,
              cost 7, gap 0.5 / 6.5 = 0.077

A larger limit never makes the solution worse. Both parts together are one greedy: take the
steepest single-unit move that fits. Compare limits A < B up to the first move m that only B can
take. All that A still gains is, unit by unit, a move that B could have taken instead of m, so it
has at most m's slope; and A has fewer bits left than m takes.

Source: Sinha and Zoltners 1979: the hulls solve the relaxation, with at most one fractional unit.
Letters: U units, F options per unit, P points of the frontier.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult
from scipy.sparse import csr_array

from alphaquant.errors import BudgetError
from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.highs import quiet_milp

_NO_BITS = np.iinfo(np.int64).max // 4
_GAP_UNITS = 1000.0
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Solution:
    """One option per unit, and how far from the optimum it can be.

    Attributes:
        choice: int64 [U], the option of each unit.
        cost: sum of the chosen costs.
        bits: sum of the chosen bits.
        lower_bound: no choice within the limit costs less, up to rounding of 1e-12 of the costs.
        gap: (cost - lower_bound) / lower_bound.
    """

    choice: IntArray
    cost: float
    bits: int
    lower_bound: float
    gap: float


@dataclass(frozen=True, eq=False)
class Frontier:
    """The hull path: for every budget the best choice that the linear relaxation does not split.

    Attributes:
        bits: int64 [P], strictly increasing.
        cost: float64 [P], decreasing and convex in `bits`.
        slopes: float64 [P - 1], cost saved per bit by step p from point p to p + 1, descending.
        start: int64 [U], the choice of point 0, the fewest bits that are possible.
        step_units: int64 [P - 1], the unit that step p changes.
        step_options: int64 [P - 1], the option that it gets.
    """

    bits: IntArray
    cost: FloatArray
    slopes: FloatArray
    start: IntArray
    step_units: IntArray
    step_options: IntArray

    def choice(self, point: int) -> IntArray:
        """int64 [U], the choice of a point in [0, P)."""
        chosen = self.start.copy()
        # NumPy assigns in order: where a unit repeats, its last step stays.
        chosen[self.step_units[:point]] = self.step_options[:point]
        return chosen

    def point_within(self, limit_bits: int) -> int:
        """The last point within a limit.

        Raises:
            BudgetError: the limit is below the first point.
        """
        if limit_bits < self.bits[0]:
            raise BudgetError(
                f"{limit_bits} bits were asked for, but the smallest formats take {self.bits[0]}; "
                "raise the budget or add smaller formats"
            )
        return int(np.searchsorted(self.bits, limit_bits, side="right")) - 1


@dataclass(frozen=True, eq=False)
class _Options:
    """The options of each unit by ascending bits, the better first where bits are equal.

    Attributes:
        bits: int64 [U, F]; `_NO_BITS` for what is not allowed, at the end of its row.
        cost: float64 [U, F]; infinite for what is not allowed.
        columns: int64 [U, F], the caller's column of each option.
    """

    bits: IntArray
    cost: FloatArray
    columns: IntArray

    def choice(self, positions: IntArray) -> IntArray:
        """The caller's columns [U] of sorted positions [U]."""
        return self.columns[np.arange(len(positions)), positions]


@dataclass(frozen=True, eq=False)
class _Steps:
    """Hull steps of all units, steepest first.

    Attributes:
        slopes: float64 [P - 1], cost saved per bit.
        gains: float64 [P - 1], cost saved.
        units: int64 [P - 1], the unit that moves.
        positions: int64 [P - 1], the sorted position that it moves to.
        extra_bits: int64 [P - 1], bits that the move takes.
    """

    slopes: FloatArray
    gains: FloatArray
    units: IntArray
    positions: IntArray
    extra_bits: IntArray


def frontier(cost: FloatArray, bits: IntArray, allowed: BoolArray) -> Frontier:
    """The hull path over all budgets.

    Args:
        cost: float64 [U, F], finite where allowed.
        bits: int64 [U, F], storage of each option.
        allowed: bool [U, F], at least one option per unit.
    """
    options = _sort_options(cost, bits, allowed)
    return _make_frontier(options, _hull_steps(options))


def solve(cost: FloatArray, bits: IntArray, allowed: BoolArray, limit_bits: int) -> Solution:
    """The hull path up to a limit, and greedy single-unit moves into the bits that are left.

    Equal slopes are broken by unit, then by fewer bits. A larger limit never costs more.

    Args:
        cost: float64 [U, F], finite where allowed.
        bits: int64 [U, F], storage of each option.
        allowed: bool [U, F], at least one option per unit.
        limit_bits: total that the choice may take.

    Raises:
        BudgetError: the limit is below the cheapest choice.
    """
    options = _sort_options(cost, bits, allowed)
    steps = _hull_steps(options)
    path = _make_frontier(options, steps)
    point = path.point_within(limit_bits)
    spare_bits = limit_bits - int(path.bits[point])
    positions = np.zeros(len(cost), dtype=np.int64)
    positions[steps.units[:point]] = steps.positions[:point]
    bound = _total(cost, options.choice(positions))
    if point < len(path.slopes):
        bound -= float(path.slopes[point]) * spare_bits
    _fill(options, positions, spare_bits)
    return make_solution(cost, bits, options.choice(positions), bound)


def close_gap(
    cost: FloatArray,
    bits: IntArray,
    allowed: BoolArray,
    limit_bits: int,
    time_limit_seconds: float = 10.0,
) -> Solution:
    """The optimum, or what HiGHS found in time, with its certified gap.

    Let l be the slope of the first hull step that does not fit. A choice costs the bound of
    `solve` plus, per unit, the reduced cost of its option, (c + l b) minus the unit's least, plus
    l times the unused bits. All terms are >= 0, so an option whose reduced cost exceeds the gap
    cannot be part of a better choice: few units stay open.

    Args:
        cost: float64 [U, F], finite where allowed.
        bits: int64 [U, F], storage of each option.
        allowed: bool [U, F], at least one option per unit.
        limit_bits: total that the choice may take.
        time_limit_seconds: of the integer search; the result of `solve` is always there.

    Raises:
        BudgetError: the limit is below the cheapest choice.
    """
    first = solve(cost, bits, allowed, limit_bits)
    open_gap = first.cost - first.lower_bound
    path = frontier(cost, bits, allowed)
    point = path.point_within(limit_bits)
    if open_gap <= 1e-12 * abs(first.cost) or point == len(path.slopes):
        return first
    price = float(path.slopes[point])
    priced = np.where(allowed, cost + price * (bits - bits.min(axis=1, keepdims=True)), np.inf)
    reduced = priced - priced.min(axis=1, keepdims=True)
    is_open = reduced <= open_gap * (1 + 1e-9)
    shares, price = reduced / open_gap, price / open_gap
    found = _search_open(shares, is_open, bits, limit_bits, price, time_limit_seconds)
    return _better_of(first, found, cost, bits, limit_bits)


def _sort_options(cost: FloatArray, bits: IntArray, allowed: BoolArray) -> _Options:
    masked_cost = np.where(allowed, cost, np.inf)
    masked_bits = np.where(allowed, bits, _NO_BITS)
    columns = np.lexsort((masked_cost, masked_bits), axis=-1)  # stable: ties keep column order
    return _Options(
        np.take_along_axis(masked_bits, columns, axis=1),
        np.take_along_axis(masked_cost, columns, axis=1),
        columns,
    )


def _slopes(
    options: _Options, units: IntArray, positions: IntArray, spare_bits: int
) -> FloatArray:
    """Cost saved per bit [len(units), F] by each move that saves cost and fits; -inf otherwise."""
    extra = options.bits[units] - options.bits[units, positions][:, None]
    gain = options.cost[units, positions][:, None] - options.cost[units]
    is_move = (extra > 0) & (extra <= spare_bits) & (gain > 0)
    slopes = np.full(extra.shape, -np.inf)
    np.divide(gain, extra, out=slopes, where=is_move)
    return slopes


def _hull_steps(options: _Options) -> _Steps:
    """Gift wrapping of all units at once: round r finds the r-th step of every hull."""
    units = np.arange(len(options.bits))
    positions = np.zeros(len(units), dtype=np.int64)
    last_slopes = np.full(len(units), np.inf)
    found: list[tuple[FloatArray, IntArray, IntArray, IntArray]] = []
    while units.size:
        slopes = _slopes(options, units, positions, _NO_BITS // 2)
        steepest = slopes.argmax(axis=1)  # the first of equals has the fewest bits
        # Slopes descend along a hull; the minimum keeps rounding from reordering a unit's steps.
        last_slopes = np.minimum(last_slopes, slopes[np.arange(len(units)), steepest])
        goes_on = last_slopes > 0
        units, last_slopes = units[goes_on], last_slopes[goes_on]
        found.append((last_slopes, units, positions[goes_on], steepest[goes_on]))
        positions = steepest[goes_on]
    slopes, units, before, after = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((after, units, -slopes))
    slopes, units, before, after = slopes[order], units[order], before[order], after[order]
    gains = options.cost[units, before] - options.cost[units, after]
    return _Steps(
        slopes, gains, units, after, options.bits[units, after] - options.bits[units, before]
    )


def _make_frontier(options: _Options, steps: _Steps) -> Frontier:
    first = np.zeros(len(options.bits), dtype=np.int64)
    last = first.copy()
    last[steps.units] = steps.positions
    rows = np.arange(len(first))
    # Summed from the cheap end: its terms are the small ones, and it is where budgets usually are.
    saved_later = np.concatenate([np.cumsum(steps.gains[::-1])[::-1], [0.0]])
    extra_bits = np.concatenate([[0], np.cumsum(steps.extra_bits)])
    return Frontier(
        int(options.bits[:, 0].sum()) + extra_bits,
        float(options.cost[rows, last].sum()) + saved_later,
        steps.slopes,
        options.choice(first),
        steps.units,
        options.columns[steps.units, steps.positions],
    )


def _fill(options: _Options, positions: IntArray, spare_bits: int) -> None:
    """Take the steepest move that fits, again and again; changes `positions` [U].

    A queued slope is an upper bound of its unit's best, because spare bits only shrink; so the
    top of the queue is the steepest of all if it still fits, and is looked up anew if not.
    """
    units = np.arange(len(positions))
    slopes = _slopes(options, units, positions, spare_bits)
    best = slopes.argmax(axis=1)
    top = slopes[units, best]
    has_move = top > 0
    queue = list(
        zip(
            (-top[has_move]).tolist(),
            units[has_move].tolist(),
            best[has_move].tolist(),
            strict=True,
        )
    )
    heapify(queue)
    while queue:
        _, unit, position = heappop(queue)
        extra_bits = int(options.bits[unit, position] - options.bits[unit, positions[unit]])
        if extra_bits <= spare_bits:
            positions[unit] = position
            spare_bits -= extra_bits
        move = _best_move(options, unit, int(positions[unit]), spare_bits)
        if move is not None:
            heappush(queue, move)


def _best_move(
    options: _Options, unit: int, position: int, spare_bits: int
) -> tuple[float, int, int] | None:
    """The unit's steepest move that fits as (-slope, unit, position), None if there is none.

    Python lists: a row of 12 takes 2 us here and 9 us through `_slopes` (one core, AMD EPYC).
    """
    bits, cost = options.bits[unit].tolist(), options.cost[unit].tolist()
    best: tuple[float, int, int] | None = None
    for other in range(position + 1, len(bits)):
        extra_bits, gain = bits[other] - bits[position], cost[position] - cost[other]
        if extra_bits > spare_bits:
            break
        if extra_bits > 0 and gain > 0 and (best is None or -gain / extra_bits < best[0]):
            best = (-gain / extra_bits, unit, other)
    return best


def _total(table: FloatArray, choice: IntArray) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


def make_solution(cost: FloatArray, bits: IntArray, choice: IntArray, bound: float) -> Solution:
    """Count a choice [U] out; `bound` is a lower bound of the cost of every choice."""
    total = _total(cost, choice)
    bound = min(bound, total)
    n_bits = int(bits[np.arange(len(choice)), choice].sum())
    gap = (total - bound) / max(abs(bound), _TINY) if total > bound else 0.0
    return Solution(choice, total, n_bits, bound, gap)


def _better_of(
    first: Solution,
    found: tuple[IntArray | None, float],
    cost: FloatArray,
    bits: IntArray,
    limit_bits: int,
) -> Solution:
    """The cheaper of the two choices with the tighter of the two bounds."""
    choice, share = found
    bound = max(first.lower_bound, first.lower_bound + share * (first.cost - first.lower_bound))
    fallback = make_solution(cost, bits, first.choice, bound)
    if choice is None:
        return fallback
    second = make_solution(cost, bits, choice, bound)
    # HiGHS keeps a constraint to 1e-6 only: what it found is counted again in integers.
    return second if second.bits <= limit_bits and second.cost < first.cost else fallback


def _search_open(
    reduced: FloatArray,
    is_open: BoolArray,
    bits: IntArray,
    limit_bits: int,
    price: float,
    time_limit_seconds: float,
) -> tuple[IntArray | None, float]:
    """HiGHS over the open options: least reduced cost + price * unused bits, as shares of the gap.

    Args:
        reduced: float64 [U, F], reduced costs as shares of the gap.
        is_open: bool [U, F]; a unit with one open option is not searched.
        bits: int64 [U, F].
        limit_bits: total that the choice may take.
        price: cost of an unused bit as a share of the gap.
        time_limit_seconds: of HiGHS.

    Returns:
        The choice, int64 [U], None if there is none in time; and a proven share of the gap, 0..1.
    """
    choice = np.where(is_open, reduced, np.inf).argmin(axis=1)
    searched = np.flatnonzero(is_open.sum(axis=1) > 1)
    rows, columns = np.nonzero(is_open[searched])
    least = np.where(is_open, bits, _NO_BITS).min(axis=1)
    extra = (bits - least[:, None])[searched[rows], columns]
    spare = limit_bits - int(bits[np.arange(len(choice)), choice].sum())
    spare += int((bits[searched, choice[searched]] - least[searched]).sum())
    # Common factors out: HiGHS keeps constraints to 1e-6, so small integers stay exact.
    factor = max(1, int(np.gcd.reduce(extra)))
    result: OptimizeResult = quiet_milp(
        _GAP_UNITS * (reduced[searched[rows], columns] - price * extra),
        integrality=np.ones(len(rows), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_per_row(rows), 1, 1),
            LinearConstraint((extra // factor)[None, :], -np.inf, spare // factor),
        ],
        options={"time_limit": time_limit_seconds, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None, 0.0
    taken = result.x > 0.5
    choice[searched[rows[taken]]] = columns[taken]
    proven = result.mip_dual_bound / _GAP_UNITS + price * spare
    return choice, float(min(max(proven, 0.0), 1.0))


def one_per_row(rows: IntArray) -> csr_array:
    """The [rows, variables] matrix of ones that adds up the variables of each unit."""
    shape = (int(rows.max()) + 1, len(rows))
    return csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=shape)
