"""Single-unit moves under several limits: repair what a choice violates, fill what is left.

Prices turn bits that count in several limits into one cost, so that moves can be compared.

Letters: U units, F formats, K limits.
"""

from heapq import heapify, heappop, heappush

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.side.prices import Case

_MAX_REPAIRS = 1000
_TINY = float(np.finfo(np.float64).tiny)


def repair(case: Case, choice: IntArray, prices: FloatArray) -> IntArray | None:
    """Moves, each with the most relief per priced cost, until all limits are kept.

    Args:
        case: what to allocate; its limit on formats plays no part.
        choice: int64 [U], where to begin.
        prices: float64 [K].

    Returns:
        int64 [U], None where no move helps or 1000 do not suffice.
    """
    choice, units, priced = choice.copy(), np.arange(len(choice)), case.priced(prices)
    for _ in range(_MAX_REPAIRS):
        excess = case.limits.excess(case.taken(case.bits, choice))
        if (excess <= 0).all():
            return choice
        relief = _relief(case, choice, excess)
        now = priced[units, choice][:, None]
        loss = np.maximum(priced - now, 0.0) + 1e-12 * float(np.abs(now).max()) + _TINY
        score = np.where(case.allowed & (relief > 0), relief / loss, 0.0)
        best = int(score.argmax())
        if score.flat[best] <= 0:
            return None
        choice[best // score.shape[1]] = best % score.shape[1]
    return None


def fill(case: Case, choice: IntArray, prices: FloatArray) -> IntArray:
    """Moves that save cost and keep all limits, the most saved per priced bit first.

    Sums only grow, so what a unit can save only falls: a queued move is an upper bound of its
    unit's best, and is looked up anew when it no longer fits.

    Args:
        case: what to allocate; its limit on formats plays no part.
        choice: int64 [U] within all limits.
        prices: float64 [K].
    """
    choice = choice.copy()
    spare = -case.limits.excess(case.taken(case.bits, choice))
    per_bit = np.maximum(case.limits.per_bit(prices), 0.0)
    # A unit whose bits are free now still takes room that others may need.
    per_bit = np.maximum(per_bit, 1e-6 * float(per_bit.max()) or 1.0)
    queue = [
        move
        for unit in range(len(choice))
        if (move := _best_move(case, unit, int(choice[unit]), spare)) is not None
    ]
    queue = [(-gain / per_bit[unit], unit, option) for gain, unit, option in queue]
    heapify(queue)
    while queue:
        _, unit, option = heappop(queue)
        move = _best_move(case, unit, int(choice[unit]), spare)
        if move is None:
            continue
        if move[2] == option:
            extra = case.bits[unit, option] - case.bits[unit, choice[unit]]
            spare[case.limits.index[unit]] -= case.limits.weights[unit] * extra
            choice[unit] = option
            move = _best_move(case, unit, option, spare)
        if move is not None:
            heappush(queue, (-move[0] / per_bit[unit], unit, move[2]))
    return choice


def _relief(case: Case, choice: IntArray, excess: FloatArray) -> FloatArray:
    """float64 [U, F], how much less the limits are exceeded after a move, as shares of them."""
    extra = case.bits - case.bits[np.arange(len(choice)), choice][:, None]
    sizes = np.maximum(np.abs(case.limits.limits), 1.0)
    relief = np.zeros(extra.shape)
    for index, weights in zip(case.limits.index.T, case.limits.weights.T, strict=True):
        before = excess[index][:, None]
        after = np.maximum(before + weights[:, None] * extra, 0.0)
        relief += (np.maximum(before, 0.0) - after) / sizes[index][:, None]
    return relief


def _best_move(
    case: Case, unit: int, option: int, spare: FloatArray
) -> tuple[float, int, int] | None:
    """The unit's move that saves most per bit and fits, as (cost per bit, unit, option)."""
    extra = case.bits[unit] - case.bits[unit, option]
    gain = case.cost[unit, option] - case.cost[unit]
    weights = case.limits.weights[unit][:, None]
    room = spare[case.limits.index[unit]][:, None]
    fits = ((weights <= 0) | (weights * extra <= room)).all(axis=0)
    is_move = case.allowed[unit] & (extra > 0) & (gain > 0) & fits
    if not is_move.any():
        return None
    slopes = np.where(is_move, gain / np.maximum(extra, 1), -np.inf)
    best = int(slopes.argmax())
    return float(slopes[best]), unit, best
