"""Linear limits on the bits of a choice, and the prices at which a choice almost keeps them.

A limit is sum_u weight_u bits_u <= limit: weight 1 for the budget, the active share for what a
token reads, -1 for the least bits of a layer. At prices y >= 0 of all limits units (and cohorts of
experts) choose alone; what they then pay minus y times the limits is a lower bound for every
choice that keeps the limits. The best such bound is found by columns: each pricing gives one
choice per layer, a linear program mixes all choices so far within the limits, its duals are the
next prices (Kelley 1960, Dantzig and Wolfe 1960).

Letters: U units, F formats, L layers, K limits, R limits that a unit counts in.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, OptimizeResult

from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.highs import quiet_linprog, quiet_milp
from alphaquant.search.side.cohorts import Cohorts, Priced, choose

_MAX_ROUNDS = 40
_MAX_NODES = 100
_CLOSE = 1e-7
_PENALTY = 1e5
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Limits:
    """K limits on weighted sums of bits.

    Attributes:
        index: int64 [U, R], the limits that a unit counts in.
        weights: float64 [U, R], with which weight.
        limits: float64 [K].
    """

    index: IntArray
    weights: FloatArray
    limits: FloatArray

    def excess(self, bits: FloatArray) -> FloatArray:
        """float64 [K], sums beyond the limits, of bits [U]; kept where <= 0."""
        sums = np.zeros(len(self.limits))
        for index, weights in zip(self.index.T, self.weights.T, strict=True):
            sums += np.bincount(index, weights * bits, len(sums))
        return np.asarray(sums - self.limits)

    def per_bit(self, prices: FloatArray) -> FloatArray:
        """float64 [U], what a bit of each unit costs at prices [K]."""
        return np.asarray((prices[self.index] * self.weights).sum(axis=1))

    def per_layer(self, bits: FloatArray, cohorts: Cohorts) -> FloatArray:
        """float64 [K, L], weighted sums of bits [U] by layer."""
        shape = (len(self.limits), cohorts.n_layers)
        sums = np.zeros(shape[0] * shape[1])
        for index, weights in zip(self.index.T, self.weights.T, strict=True):
            cells = index * cohorts.n_layers + cohorts.layers
            sums += np.bincount(cells, weights * bits, len(sums))
        return sums.reshape(shape)


@dataclass(frozen=True, eq=False)
class Case:
    """One constrained allocation.

    Attributes:
        cost: float64 [U, F].
        bits: int64 [U, F].
        allowed: bool [U, F].
        cohorts: layers and the limit on their formats.
        limits: all linear limits, the budget first.
    """

    cost: FloatArray
    bits: IntArray
    allowed: BoolArray
    cohorts: Cohorts
    limits: Limits

    def taken(self, table: FloatArray | IntArray, choice: IntArray) -> FloatArray:
        """float64 [U], the entries of a choice in a table [U, F]."""
        return np.asarray(table[np.arange(len(choice)), choice], dtype=np.float64)

    def priced(self, prices: FloatArray) -> FloatArray:
        """float64 [U, F], costs and prices of bits; infinite where not allowed."""
        per_bit = self.limits.per_bit(prices)[:, None]
        return np.where(self.allowed, self.cost + per_bit * self.bits, np.inf)

    def keeps_limits(self, choice: IntArray) -> bool:
        """Whether a choice is within all linear limits."""
        return bool((self.limits.excess(self.taken(self.bits, choice)) <= 0).all())


@dataclass(frozen=True, eq=False)
class Dual:
    """The best lower bound that was found.

    Attributes:
        prices: float64 [K], >= 0.
        bound: no choice that keeps all limits costs less.
        priced: the choice at these prices.
        sets: bool [L, F] each, formats that experts of each layer may take: those of the largest
            share of the mix, of the best whole mix (one choice per layer), and of `priced`.
    """

    prices: FloatArray
    bound: float
    priced: Priced
    sets: tuple[BoolArray, ...]


@dataclass(frozen=True, eq=False)
class _Column:
    """One pricing: a choice for every layer.

    Attributes:
        dual: prices and bound.
        cost: float64 [L].
        sums: float64 [K, L].
    """

    dual: Dual
    cost: FloatArray
    sums: FloatArray


def find_prices(case: Case, start: FloatArray, scale: float) -> Dual:
    """Prices of the best bound.

    Args:
        case: what to allocate.
        start: float64 [K], first prices; the bound is never below theirs.
        scale: a cost > 0 of the size of the optimum.
    """
    columns = [_price(case, start * factor) for factor in (1.0, 0.5, 2.0)]
    best = max(columns, key=lambda column: column.dual.bound)
    sizes = np.maximum(np.abs(case.limits.limits), 1.0)
    mix, prices = _mix(case, columns, scale, sizes), start
    for _ in range(_MAX_ROUNDS):
        last, prices = prices, np.maximum(-mix.ineqlin.marginals, 0.0) * scale / sizes
        is_settled = np.allclose(prices, last, rtol=1e-9, atol=0.0)
        if is_settled or mix.fun * scale - best.dual.bound <= _CLOSE * scale:
            break
        columns.append(_price(case, prices))
        best = max(best, columns[-1], key=lambda column: column.dual.bound)
        mix = _mix(case, columns, scale, sizes)
    sets = [best.dual.priced.is_in]
    if case.cohorts.max_formats is not None:
        whole = _mix(case, columns, scale, sizes, is_whole=True)
        found = [mix.x] if whole.x is None else [mix.x, whole.x]
        sets = [*(_sets_of(columns, x) for x in found), *sets]
    return Dual(best.dual.prices, best.dual.bound, best.dual.priced, tuple(sets))


def _sets_of(columns: list[_Column], shares: FloatArray) -> BoolArray:
    """Formats [L, F] of the largest share of each layer; shares [columns * L and more]."""
    n_layers = len(columns[0].cost)
    largest = shares[: len(columns) * n_layers].reshape(-1, n_layers).argmax(axis=0)
    return np.array([columns[c].dual.priced.is_in[layer] for layer, c in enumerate(largest)])


def _price(case: Case, prices: FloatArray) -> _Column:
    table = case.priced(prices)
    found = choose(table, case.cohorts)
    paid = float(prices @ case.limits.limits)
    size = float(np.abs(case.taken(table, found.choice)).sum())
    size += float(np.abs(prices) @ np.abs(case.limits.limits))
    bound = float(found.least.sum()) - paid - 8 * _EPS * size  # what rounding can add
    taken = case.taken(case.cost, found.choice)
    cost = np.bincount(case.cohorts.layers, taken, case.cohorts.n_layers).astype(np.float64)
    sums = case.limits.per_layer(case.taken(case.bits, found.choice), case.cohorts)
    return _Column(Dual(prices, bound, found, ()), cost, sums)


def _mix(
    case: Case,
    columns: list[_Column],
    scale: float,
    sizes: FloatArray,
    *,
    is_whole: bool = False,
) -> OptimizeResult:
    """Shares [columns * L] of the choices, then [K] what exceeds the limits, at a high price."""
    n_limits, n_layers = len(case.limits.limits), case.cohorts.n_layers
    cost = np.concatenate([column.cost for column in columns]) / scale
    sums = np.concatenate([column.sums for column in columns], axis=1) / sizes[:, None]
    objective = np.concatenate([cost, np.full(n_limits, _PENALTY)])
    above = np.concatenate([sums, -np.eye(n_limits)], axis=1)
    limits = case.limits.limits / sizes
    one = np.concatenate(
        [np.tile(np.eye(n_layers), len(columns)), np.zeros((n_layers, n_limits))], axis=1
    )
    if not is_whole:
        return quiet_linprog(objective, above, limits, one, np.ones(n_layers), method="highs")
    return quiet_milp(
        objective,
        integrality=np.repeat([1, 0], [len(cost), n_limits]),
        constraints=[LinearConstraint(above, -np.inf, limits), LinearConstraint(one, 1, 1)],
        options={"node_limit": _MAX_NODES, "mip_rel_gap": 1e-4},
    )
