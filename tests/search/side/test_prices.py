"""Limits, prices and moves on numbers that can be followed by hand, and on random cases."""

import numpy as np
import pytest

from alphaquant.search.side.closing import close, open_options
from alphaquant.search.side.cohorts import Cohorts
from alphaquant.search.side.moves import fill, repair
from alphaquant.search.side.prices import Case, Limits, find_prices

# Three units in two layers. Limits: all bits <= 500, half of unit 0 and the others <= 350, layer 1
# (unit 2) at least 150.
LIMITS = Limits(
    np.array([[0, 1, 2], [0, 1, 2], [0, 1, 3]]),
    np.array([[1.0, 0.5, -1.0], [1.0, 1.0, -1.0], [1.0, 1.0, -1.0]]),
    np.array([500.0, 350.0, -0.0, -150.0]),
)
CASE = Case(
    np.array([[9.0, 4.0], [6.0, 1.0], [2.0, 1.5]]),
    np.array([[100, 200], [100, 200], [100, 200]]),
    np.ones((3, 2), dtype=np.bool_),
    Cohorts(np.array([0, 0, 1]), 2, np.zeros(3, dtype=np.bool_), None),
    LIMITS,
)


def _choice(*options: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(options, dtype=np.int64)


def test_excess_counts_every_limit_of_a_unit() -> None:
    bits = np.array([100.0, 200.0, 100.0])
    assert LIMITS.excess(bits).tolist() == [-100, 0, -300, 50]
    assert LIMITS.per_bit(np.array([3.0, 2.0, 1.0, 4.0])).tolist() == [3, 4, 1]
    layers = LIMITS.per_layer(bits, CASE.cohorts)
    assert layers.tolist() == [[300, 100], [250, 100], [-300, 0], [0, -100]]


def test_prices_bound_the_best_choice_that_keeps_the_limits() -> None:
    # Layer 1 must take 200; then reading 100/2 + 100 + 200 = 350 leaves no larger unit 0 or 1.
    assert CASE.keeps_limits(_choice(0, 0, 1))
    assert not CASE.keeps_limits(_choice(1, 0, 1))
    dual = find_prices(CASE, np.zeros(4), 10.0)
    # Mixed: unit 2 takes 150 for 1.75; reading 200 remains, unit 0 at 200 for 4, unit 1 for 6.
    assert dual.bound == pytest.approx(11.75, rel=1e-6)
    assert dual.bound <= 11.75
    assert (dual.prices >= 0).all()
    assert dual.prices[1] > 0


def test_repair_ends_within_all_limits_or_says_that_no_move_helps() -> None:
    repaired = repair(CASE, _choice(1, 1, 0), np.zeros(4))
    assert repaired is not None
    assert CASE.keeps_limits(repaired)
    assert repaired.tolist() == [0, 0, 1]
    tight = Limits(LIMITS.index, LIMITS.weights, np.array([200.0, 350.0, 0.0, -150.0]))
    stuck = Case(CASE.cost, CASE.bits, CASE.allowed, CASE.cohorts, tight)
    assert repair(stuck, _choice(0, 0, 0), np.zeros(4)) is None


def test_fill_takes_the_most_saved_per_priced_bit_that_fits() -> None:
    free = Limits(LIMITS.index, LIMITS.weights, np.array([400.0, 999.0, 0.0, 0.0]))
    case = Case(CASE.cost, CASE.bits, CASE.allowed, CASE.cohorts, free)
    start = _choice(0, 0, 0)
    # Both save 5 per 100 bits; a price on reading makes those of unit 0 cheaper.
    assert fill(case, start, np.array([1.0, 0.0, 0, 0])).tolist() == [1, 0, 0]
    assert fill(case, start, np.array([1.0, 1.0, 0, 0])).tolist() == [1, 0, 0]
    dear = Case(np.array([[8.9, 4.0], [6, 1], [2, 1.5]]), *list(vars(case).values())[1:])
    assert fill(dear, start, np.array([1.0, 0.0, 0, 0])).tolist() == [0, 1, 0]
    assert fill(dear, start, np.array([1.0, 1.0, 0, 0])).tolist() == [1, 0, 0]
    assert start.tolist() == [0, 0, 0]


def test_options_of_a_better_choice_stay_open_and_are_found() -> None:
    is_open = open_options(CASE, np.zeros(4), 16.5)
    assert is_open[[0, 1, 2], [0, 0, 1]].all()
    found = close(CASE, CASE.allowed, 1.0, 10)
    assert found.choice is not None
    assert (found.choice.tolist(), found.is_impossible) == ([0, 0, 1], False)
    assert found.bound == pytest.approx(16.5)
    # At a bound of 7.5, 12.5 leaves room for less than the 5 that units 0 and 1 lose.
    assert open_options(CASE, np.zeros(4), 11.0).tolist() == [
        [False, True],
        [False, True],
        [True, True],
    ]


def test_a_search_without_a_solution_says_so() -> None:
    tight = Limits(LIMITS.index, LIMITS.weights, np.array([350.0, 350.0, 0.0, -150.0]))
    case = Case(CASE.cost, CASE.bits, CASE.allowed, CASE.cohorts, tight)
    found = close(case, case.allowed, 1.0, 10)
    assert (found.choice, found.is_impossible) == (None, True)
