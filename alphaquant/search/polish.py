"""Local search around a choice on the true divergence: moves and exchanges within the limit.

Near an additive optimum many exchanges cost next to nothing by the costs, less than the costs are
wrong. They are proposed in order of what a surrogate expects of them and raced against the
incumbent, window by window; one that is better by more than its standard error replaces it.

Letters: U units, F formats, M moves, N windows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem
from alphaquant.search.sweep import Truth

_TRIPLE_MOVES = 24


@dataclass(frozen=True)
class PolishSettings:
    """How far a local search goes.

    Attributes:
        n_evaluations: most candidates to measure.
        first_windows: of a race's first round; each round doubles.
        separation: standard errors by which a candidate must be better over all windows, and by
            which it may be worse in an earlier round.
        most_moves: single moves that are combined to pairs, in each direction.
    """

    n_evaluations: int = 24
    first_windows: int = 16
    separation: float = 1.0
    most_moves: int = 200


@dataclass(frozen=True, eq=False)
class Polished:
    """The end of a local search.

    Attributes:
        choice: int64 [U].
        kl: float64 [N], per window.
        n_evaluations: candidates measured.
        n_accepted: of which replaced the incumbent.
    """

    choice: IntArray
    kl: FloatArray
    n_evaluations: int
    n_accepted: int


@dataclass(frozen=True, eq=False)
class _Moves:
    """Single moves: unit [M] to option [M], with what they change: bits [M] and cost [M]."""

    units: IntArray
    options: IntArray
    bits: IntArray
    cost: FloatArray


def polish(
    problem: Problem,
    surrogate: Callable[[], FloatArray],
    truth: Truth,
    start: IntArray,
    limit_bits: int,
    settings: PolishSettings | None = None,
) -> Polished:
    """Improve a choice by measured exchanges.

    Args:
        problem: units and formats.
        surrogate: the cost to propose by, float64 [U, F], asked for at every new incumbent.
        truth: measures.
        start: int64 [U], within the limit.
        limit_bits: total bits allowed.
        settings: how far.

    Returns:
        A choice within the limit whose KL is at most that of the start.
    """
    settings = settings or PolishSettings()
    best, kl = start, truth.measure(start, truth.n_windows)
    truth.accept(best)
    seen, n_accepted, n_measured = {best.tobytes()}, 0, 0
    proposals = propose_exchanges(problem, surrogate(), best, limit_bits, settings.most_moves)
    while n_measured < settings.n_evaluations:
        candidate = next((c for c in proposals if c.tobytes() not in seen), None)
        if candidate is None:
            break
        seen.add(candidate.tobytes())
        n_measured += 1
        found = _race(truth, candidate, kl, settings)
        if found is not None:
            best, kl = candidate, found
            n_accepted += 1
            truth.accept(best)
            cost = surrogate()
            proposals = propose_exchanges(problem, cost, best, limit_bits, settings.most_moves)
    return Polished(best, kl, n_measured, n_accepted)


def propose_exchanges(
    problem: Problem, cost: FloatArray, choice: IntArray, limit_bits: int, most_moves: int
) -> Iterator[IntArray]:
    """Neighbours of a choice within the limit, those of the least cost first.

    One unit changes its format, or two do; after all of these, three. Of single moves those of
    least reduced cost at the price that the choice implies are combined: `most_moves` in each
    direction to pairs, `_TRIPLE_MOVES` to triples.

    Args:
        problem: units and formats.
        cost: float64 [U, F].
        choice: int64 [U].
        limit_bits: total bits allowed.
        most_moves: bounds the pairs to its square.

    Yields:
        int64 [U].
    """
    moves = _single_moves(problem, cost, choice)
    spare = limit_bits - int(problem.bits[np.arange(len(choice)), choice].sum())
    reduced = moves.cost + _implied_price(moves) * moves.bits
    order = np.argsort(reduced, kind="stable")
    ups = order[moves.bits[order] > 0][:most_moves]
    downs = order[moves.bits[order] <= 0][:most_moves]
    singles = np.arange(len(order))[:, None]
    pairs = np.stack([part.ravel() for part in np.meshgrid(ups, downs, indexing="ij")], axis=1)
    few = order[:_TRIPLE_MOVES]
    triples = np.array(list(combinations(few.tolist(), 3)), dtype=np.int64).reshape(-1, 3)
    yield from _neighbours(moves, choice, spare, [singles, pairs])
    yield from _neighbours(moves, choice, spare, [triples])


def _neighbours(
    moves: _Moves, choice: IntArray, spare: int, sets: Sequence[IntArray]
) -> Iterator[IntArray]:
    """Choices after sets of moves that fit and do not meet in a unit, the cheapest first."""
    fitting: list[tuple[FloatArray, IntArray]] = []
    for rows in sets:  # [n, moves per set]
        units = np.sort(moves.units[rows], axis=1)
        is_apart = (units[:, 1:] != units[:, :-1]).all(axis=1)
        kept = rows[is_apart & (moves.bits[rows].sum(axis=1) <= spare)]
        fitting.append((moves.cost[kept].sum(axis=1), kept))
    costs = np.concatenate([cost for cost, _ in fitting])
    taken = [row for _, kept in fitting for row in kept]
    for index in np.argsort(costs, kind="stable").tolist():
        neighbour = choice.copy()
        neighbour[moves.units[taken[index]]] = moves.options[taken[index]]
        yield neighbour


def _single_moves(problem: Problem, cost: FloatArray, choice: IntArray) -> _Moves:
    rows = np.arange(len(choice))
    is_move = problem.allowed.copy()
    is_move[rows, choice] = False
    units, options = np.nonzero(is_move)
    bits = problem.bits[units, options] - problem.bits[units, choice[units]]
    return _Moves(units, options, bits, cost[units, options] - cost[units, choice[units]])


def _implied_price(moves: _Moves) -> float:
    """Cost per bit between the best gain per bit upward and the least loss per bit downward."""
    up, down = moves.bits > 0, moves.bits < 0
    gain = float((-moves.cost[up] / moves.bits[up]).max()) if up.any() else 0.0
    loss = float((-moves.cost[down] / moves.bits[down]).min()) if down.any() else gain
    return max(0.0, (gain + loss) / 2)


def _race(
    truth: Truth, candidate: IntArray, kl: FloatArray, settings: PolishSettings
) -> FloatArray | None:
    """KL per window of a candidate that is better than the incumbent's, None otherwise."""
    n = min(settings.first_windows, len(kl))
    while True:
        found = truth.measure(candidate, n)
        difference = found - kl[:n]
        error = float(difference.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
        mean = float(difference.mean())
        if n == len(kl):
            return found if mean < -settings.separation * error else None
        if mean > settings.separation * error:
            return None
        n = min(2 * n, len(kl))
