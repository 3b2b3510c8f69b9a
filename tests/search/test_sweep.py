"""The sweep over all sizes: every state a front point, greedy, lazy, and near the optimum."""

import numpy as np
import pytest

from alphaquant.search.arrays import IntArray
from alphaquant.search.blocks import BlockGrid, make_blocks
from alphaquant.search.polish import PolishSettings, polish
from alphaquant.search.solver import solve
from alphaquant.search.sweep import SweepPoint, SweepSettings, sweep
from alphaquant.testing.truths import TinyTruth, tiny_truth

EXACT = SweepSettings(first_windows=8, most_windows=8)


def grid_of(case: TinyTruth, n_levels: int = 12) -> BlockGrid:
    return make_blocks(case.problem, case.problem.costs["fisher"], n_levels)


def both_ways(case: TinyTruth) -> list[SweepPoint]:
    grid = grid_of(case)
    return [p for direction in (1, -1) for p in sweep(grid, case.truth, direction, EXACT)]


def test_the_truth_is_the_additive_cost_where_moves_do_not_meet() -> None:
    case = tiny_truth(0)
    apart = np.zeros((6, 4, 32))
    for unit in range(6):
        apart[unit, :, 4 * unit : 4 * unit + 4] = case.truth.moves[unit, :, :4]
    additive_cost = 0.5 * np.square(apart).mean(axis=2)
    case.truth.moves = apart
    found = case.truth.every(case.choices).mean(axis=1)
    assert found == pytest.approx(additive_cost[np.arange(6), case.choices].sum(axis=1))
    assert case.problem.costs["fisher"] == pytest.approx(
        0.5 * np.square(tiny_truth(0).truth.moves).mean(axis=2)
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_is_the_least_of_all_that_fit(seed: int) -> None:
    case = tiny_truth(seed, n_units=4, n_formats=3)
    assert len({tuple(choice) for choice in case.choices.tolist()}) == 3**4
    bits = [_bits(case, choice) for choice in case.choices]
    assert min(bits) < case.limit_bits < max(bits)
    kl = [
        float(case.truth.measure(choice, 8).mean())
        for choice, n_bits in zip(case.choices, bits, strict=True)
        if n_bits <= case.limit_bits
    ]
    assert case.optimum() == pytest.approx(min(kl), rel=1e-12)
    assert case.truth.n_measured == 8 * len(kl)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_sweep_goes_from_one_end_to_the_other_in_steps_of_one_block(direction: int) -> None:
    case = tiny_truth(0)
    grid = grid_of(case)
    points = list(sweep(grid, case.truth, direction, EXACT))
    first, last = (0, 11) if direction == 1 else (11, 0)
    assert (points[0].levels == first).all()
    ends = [block.bits[last] for block in grid.blocks]
    assert points[-1].bits == sum(ends)
    for before, after in zip(points, points[1:], strict=False):
        assert (before.levels != after.levels).sum() == 1
        assert (after.bits - before.bits) * direction < 0


def test_states_carry_their_own_bits_and_divergence() -> None:
    case = tiny_truth(1)
    grid = grid_of(case)
    rows = np.arange(len(case.problem.units))
    for point in sweep(grid, case.truth, 1, EXACT):
        choice = grid.choice(point.levels)
        assert point.bits == case.problem.bits[rows, choice].sum() == grid.bits(point.levels)
        assert point.kl.tolist() == case.truth.measure(choice, 8).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_without_interactions_each_step_is_the_least_harm_per_bit(seed: int) -> None:
    """Rates then depend on the block alone, so lazy greedy is exact greedy."""
    case = tiny_truth(seed, correlation=0.0)
    apart = np.zeros((6, 4, 32))
    for unit in range(6):  # own coordinates: nothing adds up but squares
        apart[unit, :, unit] = case.truth.moves[unit, :, 0]
    case.truth.moves = apart
    grid = grid_of(case)
    points = list(sweep(grid, case.truth, 1, EXACT))
    for before, after in zip(points, points[1:], strict=False):
        taken = _rate(case, grid, before, int((before.levels != after.levels).argmax()))
        rates = [_rate(case, grid, before, b) for b in range(len(grid.blocks))]
        assert taken == pytest.approx(min(rates), rel=1e-9)


def _rate(case: TinyTruth, grid: BlockGrid, at: SweepPoint, block: int) -> float:
    level, bits = int(at.levels[block]), grid.blocks[block].bits
    following = [k for k in range(level + 1, len(bits)) if bits[k] != bits[level]]
    if not following:
        return float("inf")
    levels = at.levels.copy()
    levels[block] = following[0]
    harm = case.truth.measure(grid.choice(levels), 8).mean() - at.kl.mean()
    return float(harm) / abs(int(bits[following[0]] - bits[level]))


def test_a_race_ends_as_soon_as_two_blocks_are_told_apart() -> None:
    """Equal windows leave no doubt, so the first round is enough."""
    case = tiny_truth(3)
    case.truth.moves = np.tile(case.truth.moves[:, :, :4], 8)  # every window the same
    whole, part = SweepSettings(8, 8), SweepSettings(2, 8)
    asked = []
    for settings in (whole, part):
        case.truth.n_measured = 0
        points = list(sweep(grid_of(case), case.truth, 1, settings))
        asked.append(case.truth.n_measured - 8 * len(points))
    assert asked[1] < 0.5 * asked[0]


def test_the_sweep_with_polish_is_within_2_percent_of_the_optimum_in_95_of_100_cases() -> None:
    ratios = []
    for seed in range(100):
        case = tiny_truth(seed)
        found = search(case)
        assert _bits(case, found) <= case.limit_bits
        ratios.append(float(case.truth.measure(found, 8).mean()) / case.optimum())
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratio <= 1.02 for ratio in ratios) >= 95


def test_additive_costs_alone_do_not_reach_that() -> None:
    """The cases are hard enough for the test above to mean something."""
    n_near = 0
    for seed in range(100):
        case = tiny_truth(seed)
        kl = float(case.truth.measure(additive(case), 8).mean())
        n_near += kl <= 1.02 * case.optimum()
    assert n_near < 80


def additive(case: TinyTruth) -> IntArray:
    problem = case.problem
    return solve(problem.costs["fisher"], problem.bits, problem.allowed, case.limit_bits).choice


def search(case: TinyTruth) -> IntArray:
    """What a study does: states of the sweep, the additive optimum, exchanges around the best."""
    grid = grid_of(case)
    choices = [grid.choice(p.levels) for p in both_ways(case) if p.bits <= case.limit_bits]
    choices.append(additive(case))
    best = min(choices, key=lambda c: float(case.truth.measure(c, 8).mean()))
    settings = PolishSettings(n_evaluations=200, first_windows=8, separation=0.0)
    cost = case.problem.costs["fisher"]
    return polish(case.problem, lambda: cost, case.truth, best, case.limit_bits, settings).choice


def _bits(case: TinyTruth, choice: IntArray) -> int:
    return int(case.problem.bits[np.arange(len(choice)), choice].sum())
