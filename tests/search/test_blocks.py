"""Blocks of units: levels at common prices, and the weights that make the solver agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.blocks import Block, BlockGrid, make_blocks, next_level
from alphaquant.search.problem import Problem
from alphaquant.search.solver import solve
from alphaquant.testing.allocators import example_problem, example_problems


def grid_of(problem: Problem, n_levels: int = 9) -> BlockGrid:
    return make_blocks(problem, problem.costs["fisher"], n_levels)


def everywhere(grid: BlockGrid, level: int) -> IntArray:
    return np.full(len(grid.blocks), level)


def taken(table: FloatArray | IntArray, choice: IntArray) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


@st.composite
def states(draw: st.DrawFn) -> tuple[Problem, IntArray]:
    """A problem and a level of 9 for each of its 4 blocks."""
    problem = example_problem(draw(st.integers(0, 10**6)))
    return problem, np.array(draw(st.tuples(*[st.integers(0, 8)] * 4)))


def hand_made(bits: list[int], unit: int = 0) -> Block:
    """A block of one unit with a level per entry."""
    n_levels = len(bits)
    choices = np.zeros((n_levels, 1), dtype=np.int64)
    return Block(
        0, "expert", np.array([unit]), choices, np.array(bits), np.arange(float(n_levels))
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 20))
def test_one_level_everywhere_is_the_additive_optimum_of_its_size(
    seed: int, n_levels: int
) -> None:
    problem = example_problem(seed)
    cost = problem.costs["fisher"]
    grid = make_blocks(problem, cost, n_levels)
    for level in range(n_levels):
        levels = everywhere(grid, level)
        best = solve(cost, problem.bits, problem.allowed, grid.bits(levels))
        found = taken(cost, grid.choice(levels))
        assert found == pytest.approx(best.cost, rel=1e-9)
        assert found <= best.lower_bound + 1e-9 * cost.sum()


@pytest.mark.parametrize("name", example_problems())
def test_the_ends_are_the_richest_useful_and_the_cheapest_choice(name: str) -> None:
    problem = example_problems()[name]
    cost = problem.costs["fisher"]
    grid = grid_of(problem)
    richest = grid.choice(everywhere(grid, 0))
    least_cost = np.where(problem.allowed, cost, np.inf).min(axis=1).sum()
    assert taken(cost, richest) == pytest.approx(least_cost, abs=0)
    cheapest = grid.choice(everywhere(grid, 8))
    assert taken(problem.bits, cheapest) == problem.least_bits.sum()


@pytest.mark.parametrize("name", example_problems())
def test_every_unit_is_in_exactly_one_block_of_its_layer_and_part(name: str) -> None:
    problem = example_problems()[name]
    blocks = grid_of(problem).blocks
    members = np.concatenate([block.units for block in blocks])
    assert sorted(members.tolist()) == list(range(len(problem.units)))
    for block in blocks:
        found = {(problem.units[u].layer, problem.units[u].kind) for u in block.units}
        assert found == {(block.layer, block.part)}
    assert len({(block.layer, block.part) for block in blocks}) == len(blocks)


@settings(max_examples=20, deadline=None)
@given(states())
def test_levels_are_counted_out_and_bits_fall_as_cost_rises(
    state: tuple[Problem, IntArray],
) -> None:
    problem, levels = state
    grid = grid_of(problem)
    for block in grid.blocks:
        assert (np.diff(block.bits) <= 0).all()
        assert (np.diff(block.cost) >= 0).all()
    choice = grid.choice(levels)
    for block, level in zip(grid.blocks, levels, strict=True):
        assert choice[block.units].tolist() == block.choices[level].tolist()
    assert grid.bits(levels) == taken(problem.bits, choice)
    cost = sum(block.cost[level] for block, level in zip(grid.blocks, levels, strict=True))
    assert cost == pytest.approx(taken(problem.costs["fisher"], choice))


def test_prices_rise_by_a_common_factor_around_all_hull_steps() -> None:
    prices = grid_of(example_problem(0)).prices
    factors = prices[1:] / prices[:-1]
    assert factors[0] > 1
    assert factors == pytest.approx(factors[0])


def test_the_next_level_skips_equal_bits_and_ends_at_the_ends() -> None:
    block = hand_made([90, 90, 70, 70, 70, 40])
    assert [next_level(block, k, 1) for k in range(6)] == [2, 2, 5, 5, 5, None]
    assert [next_level(block, k, -1) for k in range(6)] == [None, None, 1, 1, 1, 4]


def test_the_worked_example_of_unit_weights() -> None:
    grid = BlockGrid((hand_made([2, 1], 0), hand_made([2, 1], 1)), np.array([1.0, 4.0]))
    levels = np.array([0, 1])
    assert grid.unit_weights(levels, 1.0) == pytest.approx([2, 0.5])
    assert grid.unit_weights(levels, 0.5) == pytest.approx([2**0.5, 0.5**0.5])
    assert grid.unit_weights(levels, 0.0).tolist() == [1, 1]


@settings(max_examples=30, deadline=None)
@given(states())
def test_with_the_weights_of_levels_the_solver_chooses_these_levels(
    state: tuple[Problem, IntArray],
) -> None:
    problem, levels = state
    cost, grid = problem.costs["fisher"], grid_of(problem)
    weights = grid.unit_weights(levels, 1.0)
    assert np.log(weights).mean() == pytest.approx(0, abs=1e-9)
    found = solve(cost * weights[:, None], problem.bits, problem.allowed, grid.bits(levels))
    assert found.choice.tolist() == grid.choice(levels).tolist()


def test_units_of_one_option_make_blocks_that_stay() -> None:
    problem = example_problems()["one allowed format per unit"]
    grid = grid_of(problem, 4)
    only = problem.allowed.argmax(axis=1)
    for level in range(4):
        assert grid.choice(everywhere(grid, level)).tolist() == only.tolist()
    assert {next_level(b, k, step) for b in grid.blocks for k in (0, 3) for step in (1, -1)} == {
        None
    }
    assert np.isfinite(grid.unit_weights(np.array([0, 1, 2, 3]), 1.0)).all()
