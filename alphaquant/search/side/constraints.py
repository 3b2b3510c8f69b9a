"""Allocation with side constraints: formats per layer, least bits of a layer, bits per token.

Side constraints say what the budget cannot: how many launches the experts of a layer need, that
no layer is starved, how much a token reads. `solve_constrained` finds prices of all limits
(`alphaquant.search.side.prices`), keeps the formats that each layer's experts take at these
prices, repairs what the choice then still violates, fills what is left with single-unit moves, and
lets HiGHS close the gap where little is open (`alphaquant.search.side.closing`). The gap is
certified by the prices. Unlike `solve`, a larger limit can give a slightly worse choice, within
the gap.

Letters: U units, F formats, L layers, K limits, q formats per layer.
"""

from dataclasses import dataclass, replace
from math import isfinite

import numpy as np

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.search.problem import Problem
from alphaquant.search.side.closing import close, open_options
from alphaquant.search.side.cohorts import Cohorts, uncovered
from alphaquant.search.side.moves import fill, repair
from alphaquant.search.side.prices import Case, Dual, Limits, find_prices
from alphaquant.search.solver import Solution, frontier, make_solution, solve

MAX_NODES = 100
_ROUNDING = 1e-12


@dataclass(frozen=True)
class SideConstraints:
    """What a choice has to keep besides the budget; None leaves a constraint out.

    Attributes:
        max_formats_per_layer: most distinct formats of the routed experts of a layer, >= 1.
        layer_minimum_bits: least mean of stored bits per weight over the units of every layer.
        active_bits: most stored bits that a token is expected to read: the sum over units of
            active share times bits. Kept up to rounding of 1e-12.
    """

    max_formats_per_layer: int | None = None
    layer_minimum_bits: float | None = None
    active_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no choice can keep.

        Raises:
            ConfigError: a constraint that is not finite or not positive.
        """
        for name, least, value in (
            ("max_formats_per_layer", "1 or more", self.max_formats_per_layer),
            ("layer_minimum_bits", "more than 0", self.layer_minimum_bits),
            ("active_bits", "1 or more", self.active_bits),
        ):
            if value is not None and not (isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value}; give {least}, or leave it out")

    @property
    def text(self) -> str:
        """What is given, for messages: `active budget of 1125 bytes, layer_minimum_bits = 3.0`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        active_bits = given.pop("active_bits", None)
        active = [] if active_bits is None else [f"active budget of {active_bits // 8} bytes"]
        return ", ".join([*active, *(f"{name} = {given[name]}" for name in sorted(given))])


def solve_constrained(
    problem: Problem,
    cost: FloatArray,
    limit_bits: int,
    constraints: SideConstraints,
    active_share: FloatArray,
    max_nodes: int = MAX_NODES,
) -> Solution:
    """A choice within the budget and all side constraints, with a certified gap.

    Equal arguments give equal choices. Without side constraints this is `solve`.

    Args:
        problem: units, formats, their bits and what is allowed.
        cost: float64 [U, F], finite where allowed.
        limit_bits: total that the choice may take.
        constraints: what else it has to keep.
        active_share: float64 [U], expected share of tokens that read each unit, 0 to 1: 1
            for all but routed experts.
        max_nodes: of the integer search that closes the gap of small problems; 0 leaves it out.

    Raises:
        BudgetError: no choice keeps the limits, or none was found.
        ConfigError: shares that are none, or a layer whose experts need more formats.
    """
    first = solve(cost, problem.bits, problem.allowed, limit_bits)
    if constraints == SideConstraints():
        return first
    case = _make_case(problem, cost, limit_bits, constraints, active_share)
    _check_reachable(case, problem, constraints)
    prices, bound = _start_prices(case, limit_bits), first.lower_bound
    scale = _scale(case, first)
    choice: IntArray | None = first.choice
    if not _keeps(case, first.choice):
        dual = find_prices(case, prices, scale)
        choice = _best_choice(case, dual, scale)
        prices, bound = dual.prices, max(dual.bound, bound)
    found = None if choice is None else make_solution(case.cost, case.bits, choice, bound)
    closed = _close_gap(case, found, (prices, bound), scale, max_nodes)
    if isinstance(closed, str):
        raise BudgetError(
            f"{limit_bits} bits with {constraints.text}: {closed}; raise the budget or loosen a "
            "side constraint"
        )
    return closed


def is_kept(problem: Problem, choice: IntArray, constraints: SideConstraints) -> bool:
    """Whether a choice [U] keeps all side constraints; the budget plays no part.

    Raises:
        ConfigError: `active_bits` is given and the problem has no `active_share`.
    """
    share = np.ones(len(choice))
    if constraints.active_bits is not None:
        share = problem.feature("active_share")
    n_bits = int(problem.bits[np.arange(len(choice)), choice].sum())
    no_cost = np.zeros(problem.bits.shape)
    return _keeps(_make_case(problem, no_cost, n_bits, constraints, share), choice)


def check_reachable(problem: Problem, limit_bits: int, constraints: SideConstraints) -> None:
    """Refuse side constraints that one look at sizes shows to be out of reach; costs play no part.

    A search asks this before it measures anything. Without `active_share` routed experts count as
    never read, so a budget of active bytes can still turn out to be too small later.

    Raises:
        BudgetError: saying what is in reach.
        ConfigError: a layer whose experts need more formats.
    """
    if constraints == SideConstraints():
        return
    if problem.has("active_share"):
        share = problem.feature("active_share")
    else:
        is_read = [u.kind != "expert" and not u.matrices[0].is_looked_up for u in problem.units]
        share = np.array(is_read, dtype=np.float64)
    no_cost = np.zeros(problem.bits.shape)
    case = _make_case(problem, no_cost, limit_bits, constraints, share)
    _check_reachable(case, problem, constraints)


def _make_case(
    problem: Problem,
    cost: FloatArray,
    limit_bits: int,
    constraints: SideConstraints,
    active_share: FloatArray,
) -> Case:
    n_units = len(problem.units)
    if active_share.shape != (n_units,) or not ((active_share >= 0) & (active_share <= 1)).all():
        raise ConfigError(
            f"active shares of shape {list(active_share.shape)}; give {n_units} from 0 to 1"
        )
    layers, n_layers = _numbered(problem.layers)
    is_expert = np.array([unit.kind == "expert" for unit in problem.units])
    index, weights = [np.zeros(n_units, dtype=np.int64)], [np.ones(n_units)]
    limits = [float(limit_bits)]
    if constraints.active_bits is not None:
        index.append(np.full(n_units, 1))
        weights.append(active_share)
        limits.append(constraints.active_bits * (1 + _ROUNDING))
    if constraints.layer_minimum_bits is not None:
        index.append(len(limits) + layers)
        weights.append(-np.ones(n_units))
        least = constraints.layer_minimum_bits * np.bincount(layers, problem.n_weights)
        limits += (-least * (1 - _ROUNDING)).tolist()
    return Case(
        np.where(problem.allowed, cost, 0.0),
        problem.bits,
        problem.allowed,
        Cohorts(layers, n_layers, is_expert, constraints.max_formats_per_layer),
        Limits(np.stack(index, axis=1), np.stack(weights, axis=1), np.array(limits)),
    )


def _numbered(layers: IntArray) -> tuple[IntArray, int]:
    """Layers from 0 to L - 1 in their order, and L."""
    found, numbered = np.unique(layers, return_inverse=True)
    return numbered.astype(np.int64), len(found)


def _check_reachable(case: Case, problem: Problem, constraints: SideConstraints) -> None:
    """Refuse limits that one look shows to be out of reach, with what is in reach."""
    starved = uncovered(case.allowed, case.cohorts)
    if starved is not None:
        raise ConfigError(
            f"{constraints.text}, but no such set of formats was found for the experts of layer "
            f"{np.unique(problem.layers)[starved]}; allow more formats per layer, or add formats "
            "that all of them can take"
        )
    least = np.where(case.allowed, case.bits, np.iinfo(np.int64).max).min(axis=1)
    if constraints.active_bits is not None:
        lowest = float(case.limits.weights[:, 1] @ least)
        if lowest > case.limits.limits[1]:
            raise BudgetError(
                f"{constraints.text}, but a token reads {lowest / 8:.0f} bytes in the "
                "smallest formats; raise the active budget or add smaller formats"
            )
    if constraints.layer_minimum_bits is not None:
        _check_minimum(case, problem, constraints, least)


def _check_minimum(
    case: Case, problem: Problem, constraints: SideConstraints, least: IntArray
) -> None:
    """Refuse a minimum beyond a layer's largest formats or beyond the budget."""
    layers = case.cohorts.layers
    asked = -case.limits.limits[-case.cohorts.n_layers :]
    most = np.bincount(layers, np.where(case.allowed, case.bits, 0).max(axis=1))
    short = np.flatnonzero(most < asked)
    if short.size:
        highest = most[short[0]] / np.bincount(layers, problem.n_weights)[short[0]]
        raise BudgetError(
            f"{constraints.text}, but layer {np.unique(problem.layers)[short[0]]} reaches "
            f"{highest:.4f} bits in the largest formats; lower layer_minimum_bits or add larger "
            "formats"
        )
    needed = float(np.maximum(np.bincount(layers, least), asked).sum())
    if needed > case.limits.limits[0]:
        raise BudgetError(
            f"{constraints.text} takes {needed:.0f} bits, and the budget is "
            f"{case.limits.limits[0]:.0f}; raise the budget or lower layer_minimum_bits"
        )


def _start_prices(case: Case, limit_bits: int) -> FloatArray:
    """float64 [K], the price of the budget where nothing else is limited."""
    path = frontier(case.cost, case.bits, case.allowed)
    point = path.point_within(limit_bits)
    prices = np.zeros(len(case.limits.limits))
    prices[0] = path.slopes[point] if point < len(path.slopes) else 0.0
    return prices


def _scale(case: Case, first: Solution) -> float:
    """A cost of the size of the optimum."""
    spread = np.where(case.allowed, case.cost, -np.inf).max(axis=1)
    spread = spread - np.where(case.allowed, case.cost, np.inf).min(axis=1)
    return max(abs(first.cost), 1e-6 * float(spread.sum())) or 1.0


def _keeps(case: Case, choice: IntArray) -> bool:
    """Whether a choice is within the linear limits and the formats per layer."""
    most = case.cohorts.max_formats
    if most is not None:
        used = np.zeros((case.cohorts.n_layers, case.cost.shape[1]), dtype=np.bool_)
        experts = case.cohorts.is_expert
        used[case.cohorts.layers[experts], choice[experts]] = True
        if (used.sum(axis=1) > most).any():
            return False
    return case.keeps_limits(choice)


def _best_choice(case: Case, dual: Dual, scale: float) -> IntArray | None:
    """The cheapest choice [U] over a few sets of formats per layer, None if none is kept."""
    distinct = {is_in.tobytes(): is_in for is_in in dual.sets}
    found = [_choose_within(case, is_in, dual, scale) for is_in in distinct.values()]
    tried = [choice for choice in found if choice is not None]
    if not tried:
        return None
    return min(tried, key=lambda choice: float(case.taken(case.cost, choice).sum()))


def _choose_within(case: Case, is_in: BoolArray, dual: Dual, scale: float) -> IntArray | None:
    """A choice [U] from the formats [L, F] of each layer's experts that keeps all limits."""
    is_expert = case.cohorts.is_expert[:, None]
    allowed = case.allowed & (is_in[case.cohorts.layers] | ~is_expert)
    if not allowed.any(axis=1).all():
        return None
    inside = replace(case, allowed=allowed, cohorts=replace(case.cohorts, max_formats=None))
    if len(case.limits.limits) == 1:
        try:
            return solve(case.cost, case.bits, allowed, int(case.limits.limits[0])).choice
        except BudgetError:
            return None
    found = dual if case.cohorts.max_formats is None else find_prices(inside, dual.prices, scale)
    choice = repair(inside, found.priced.choice, found.prices)
    return None if choice is None else fill(inside, choice, found.prices)


def _close_gap(
    case: Case,
    first: Solution | None,
    dual: tuple[FloatArray, float],
    scale: float,
    max_nodes: int,
) -> Solution | str:
    """The better of a solution and of what HiGHS finds among the options that are left open.

    Args:
        case: what to allocate.
        first: a solution within all limits, if one was found.
        dual: prices [K] and lower bound.
        scale: a cost > 0 of the size of the optimum.
        max_nodes: of HiGHS.

    Returns:
        The solution, or why there is none.
    """
    prices, bound = dual
    if first is None:
        closed = close(case, case.allowed, scale, max_nodes)
    elif max_nodes == 0 or first.cost - bound <= _ROUNDING * abs(first.cost):
        return first
    else:
        is_open = open_options(case, prices, first.cost)
        closed = close(case, is_open, first.cost - bound, max_nodes)
    choices = [] if first is None else [first.choice]
    choices += [] if closed.choice is None else [closed.choice]
    if not choices:
        return "no choice keeps all" if closed.is_impossible else "no choice was found"
    costs = [float(case.taken(case.cost, choice).sum()) for choice in choices]
    # Choices with an option that is not open cost as much as the first or more.
    proven = min(closed.bound, *costs)
    best = choices[int(np.argmin(costs))]
    return make_solution(case.cost, case.bits, best, max(bound, proven))
