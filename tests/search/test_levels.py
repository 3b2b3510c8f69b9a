"""Levels: ladders of stored bits, and filling them to a common line."""

import numpy as np
import pytest

from alphaquant.search.levels import make_levels
from alphaquant.search.problem import Problem
from alphaquant.testing.allocators import changed, example_problem, take


def _problem(bits: list[list[int]], fisher: list[list[float]] | None = None) -> Problem:
    """Expert units of 32768, 16384, ... weights with given bits; the names of formats are idle."""
    n_units, n_formats = len(bits), len(bits[0])
    problem = take(example_problem(0), np.arange(1, n_units + 1), np.arange(n_formats))
    table = np.array(fisher if fisher is not None else np.zeros((n_units, n_formats)))
    return changed(problem, bits=bits, costs={**problem.costs, "fisher": table})


def test_the_worked_example_of_the_header() -> None:
    levels = make_levels(_problem([[200, 400, 300, 400]], [[9, 2, 4, 1]]), np.array([0]))
    assert levels.n_levels.tolist() == [3]
    assert levels.bits[0, :3].tolist() == [200, 300, 400]
    assert levels.columns[0, :3].tolist() == [0, 2, 3]


def test_formats_that_are_not_allowed_are_no_levels() -> None:
    problem = _problem([[200, 300, 400]] * 2)
    problem = changed(problem, allowed=[[True, True, True], [False, True, False]])
    levels = make_levels(problem, np.array([1, 0]))
    assert levels.n_levels.tolist() == [1, 3]
    assert levels.choice(np.array([0, 2])).tolist() == [1, 2]
    assert levels.total_bits(np.array([0, 2])) == 700


def test_a_cap_keeps_what_is_below_it_and_a_units_lowest() -> None:
    problem = _problem([[200, 300, 400], [500, 600, 700]])
    levels = make_levels(problem, np.arange(2), np.array([300, 300]))
    assert levels.n_levels.tolist() == [2, 1]
    assert levels.at_most(np.array([10**9, 10**9])).tolist() == [1, 0]


@pytest.mark.parametrize(("cap_bits", "position"), [(199, 0), (200, 0), (399, 1), (400, 2)])
def test_the_highest_level_within_a_cap(cap_bits: int, position: int) -> None:
    levels = make_levels(_problem([[200, 300, 400]]), np.array([0]))
    assert levels.at_most(np.array([cap_bits])).tolist() == [position]


@pytest.mark.parametrize(
    ("limit_bits", "positions"),
    [
        pytest.param(96, [0, 0], id="the least"),
        pytest.param(111, [0, 0], id="one bit short of the next step"),
        pytest.param(143, [0, 0], id="units of one height rise together"),
        pytest.param(144, [1, 1], id="exactly the next step"),
        pytest.param(10**6, [2, 2], id="everything"),
    ],
)
def test_units_rise_to_one_line_per_weight(limit_bits: int, positions: list[int]) -> None:
    # Units of 32768 and 16384 weights: bits of 2 to 1 are equal heights.
    levels = make_levels(_problem([[64, 96, 128], [32, 48, 64]]), np.arange(2))
    assert levels.fill(np.zeros(2), limit_bits).tolist() == positions


def test_offsets_lift_units_above_the_line() -> None:
    levels = make_levels(_problem([[64, 96, 128], [32, 48, 64]]), np.arange(2))
    one_step = 32 / 32768
    assert levels.fill(np.array([0.0, one_step]), 112).tolist() == [0, 1]
    assert levels.fill(np.array([one_step, 0.0]), 128).tolist() == [1, 0]
    assert levels.fill(np.array([0.0, one_step]), 160).tolist() == [1, 2]
