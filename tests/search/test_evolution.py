"""Evolution: mutations, selection in rounds, what it spends and what it finds."""

import itertools

import numpy as np
import pytest

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.search.arrays import IntArray
from alphaquant.search.evolution import EvolutionSettings, evolve, switch_levels, top_up
from alphaquant.search.levels import make_levels
from alphaquant.search.problem import Problem
from alphaquant.testing.allocators import changed, example_problem, example_problems, take

SMALL = EvolutionSettings(8, (3, 1), (2, 8))
PROBLEM = example_problem(0)
LIMIT = PROBLEM.limit_bits(3.5)


class Truth:
    """The sum of a cost table, with an error that falls with windows; remembers its calls."""

    def __init__(self, problem: Problem, noise: float = 0.0) -> None:
        self.cost, self.bits = problem.costs["error"], problem.bits
        self.noise = noise
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def exact(self, choice: IntArray) -> float:
        return float(self.cost[np.arange(len(choice)), choice].sum())

    def __call__(self, choice: IntArray, n_windows: int) -> float:
        self.calls.append((tuple(choice.tolist()), n_windows))
        rng = np.random.default_rng([n_windows, *choice.tolist()])
        return self.exact(choice) * (1 + self.noise * rng.normal() / np.sqrt(n_windows))


def test_it_finds_a_better_choice_than_it_starts_from() -> None:
    truth = Truth(PROBLEM, noise=0.02)
    found = evolve(PROBLEM, LIMIT, 0, truth, 200, SMALL)
    assert found.losses[-1] == found.loss < 0.5 * found.losses[0]
    assert (np.diff(found.losses) <= 0).all()
    rows = np.arange(len(PROBLEM.units))
    assert found.bits == PROBLEM.bits[rows, found.choice].sum() <= LIMIT


def test_it_finds_the_optimum_of_a_small_problem() -> None:
    problem = take(example_problem(4), np.arange(1, 5), np.array([0, 3, 6, 10]))
    limit_bits, truth = problem.limit_bits(3.5), Truth(problem)
    rows = np.arange(4)
    best = min(
        truth.exact(choice)
        for choice in map(np.array, itertools.product(range(4), repeat=4))
        if problem.bits[rows, choice].sum() <= limit_bits
    )
    found = evolve(problem, limit_bits, 0, truth, 300, SMALL)
    assert found.loss == pytest.approx(best)


def test_equal_seeds_give_equal_searches_and_others_differ() -> None:
    first, again, other = (
        evolve(PROBLEM, LIMIT, seed, Truth(PROBLEM), 20, SMALL) for seed in (0, 0, 1)
    )
    assert (first.choice == again.choice).all()
    assert first.losses.tolist() == again.losses.tolist() != other.losses.tolist()


def test_every_choice_is_within_the_limit_and_none_is_measured_twice() -> None:
    truth = Truth(PROBLEM)
    evolve(PROBLEM, LIMIT, 0, truth, 60, SMALL)
    rows = np.arange(len(PROBLEM.units))
    assert len(set(truth.calls)) == len(truth.calls) > 100
    assert all(PROBLEM.bits[rows, list(choice)].sum() <= LIMIT for choice, _ in truth.calls)


def test_rounds_narrow_on_growing_windows() -> None:
    settings = EvolutionSettings(8, (4, 2, 1), (1, 4, 16))
    truth = Truth(PROBLEM)
    # The parent on 16 windows; 8 on 1, the best 4 on 4, the best 2 on 16: 1 + 56 / 16 = 4.5.
    found = evolve(PROBLEM, LIMIT, 0, truth, 4.5, settings)
    assert settings.generation_cost == 3.5
    assert [n for _, n in truth.calls] == [16] + [1] * 8 + [4] * 4 + [16] * 2
    assert (found.n_evaluations, len(found.losses)) == (4.5, 2)
    first_round = [choice for choice, n in truth.calls if n == 1]
    best = sorted(first_round, key=lambda choice: truth.exact(np.array(choice)))[:4]
    assert [choice for choice, n in truth.calls if n == 4] == best


@pytest.mark.parametrize(("n_evaluations", "n_generations"), [(1, 0), (4.4, 0), (4.5, 1), (8, 2)])
def test_it_never_spends_more_than_it_may(n_evaluations: float, n_generations: int) -> None:
    settings = EvolutionSettings(8, (4, 2, 1), (1, 4, 16))
    found = evolve(PROBLEM, LIMIT, 0, Truth(PROBLEM), n_evaluations, settings)
    assert len(found.losses) == n_generations + 1
    assert found.n_evaluations <= n_evaluations


def test_the_parent_stays_where_its_offspring_are_worse() -> None:
    start = evolve(PROBLEM, LIMIT, 0, Truth(PROBLEM), 1, SMALL).choice
    found = evolve(PROBLEM, LIMIT, 0, lambda choice, n: float((choice != start).sum()), 20, SMALL)
    assert (found.choice == start).all()
    assert found.losses.tolist() == [0.0] * len(found.losses)
    assert len(found.losses) > 3


def test_it_starts_at_the_highest_common_level() -> None:
    # Gate and up of 256 columns, so that a format takes equal bits per weight in all units.
    problem = take(PROBLEM, np.array([1, 3, 5]), np.arange(12))
    int4 = PROBLEM.formats.index("int4-g128-asym")
    truth = Truth(problem)
    evolve(problem, int(problem.bits[:, int4].sum()), 0, truth, 1, SMALL)
    assert truth.calls == [((int4,) * 3, 8)]


@pytest.mark.parametrize("percent", [30, 55, 80])
def test_the_start_leaves_no_bits_that_a_unit_could_take(percent: int) -> None:
    levels = make_levels(PROBLEM, np.arange(len(PROBLEM.units)))
    least = int(PROBLEM.least_bits.sum())
    limit_bits = least + (int(PROBLEM.bits.max(axis=1).sum()) - least) * percent // 100
    start = levels.fill(np.zeros(len(PROBLEM.units)), limit_bits)
    filled = top_up(levels, start, limit_bits, np.random.default_rng(0))
    assert (filled >= start).all() and (filled > start).any()
    for unit in np.flatnonzero(filled + 1 < levels.n_levels):
        higher = filled.copy()
        higher[unit] += 1
        assert levels.total_bits(filled) <= limit_bits < levels.total_bits(higher)


@pytest.mark.parametrize("problem", example_problems().values(), ids=example_problems())
def test_it_survives_what_allocators_survive(problem: Problem) -> None:
    least = int(problem.least_bits.sum())
    rows = np.arange(len(problem.units))
    for limit_bits in (least, 3 * least // 2, 10 * least):
        found = evolve(problem, limit_bits, 0, Truth(problem), 10, SMALL)
        assert problem.allowed[rows, found.choice].all()
        assert found.bits == problem.bits[rows, found.choice].sum() <= limit_bits
    with pytest.raises(BudgetError, match=f"take {least}"):
        evolve(problem, least - 1, 0, Truth(problem), 10, SMALL)


def test_a_switch_lifts_one_unit_and_lowers_others_only_as_far_as_needed() -> None:
    levels = make_levels(PROBLEM, np.arange(18))
    start = np.full(18, 5)
    limit_bits = levels.total_bits(start)
    rng = np.random.default_rng(0)
    for _ in range(200):
        mutated = switch_levels(levels, start, limit_bits, 1, rng)
        assert mutated is not None
        steps = mutated - start
        assert (steps > 0).sum() == 1
        assert steps.max() == 1
        assert levels.total_bits(mutated) <= limit_bits
        # Without the last lowering it would not have fit.
        lowered = np.flatnonzero(steps < 0)
        smallest = min(
            levels.bits[u, mutated[u] + 1] - levels.bits[u, mutated[u]] for u in lowered
        )
        largest = max(levels.bits[u, mutated[u] + 1] - levels.bits[u, mutated[u]] for u in lowered)
        assert smallest <= largest
        assert levels.total_bits(mutated) + largest > limit_bits


def test_a_switch_into_spare_bits_lowers_nothing() -> None:
    levels = make_levels(PROBLEM, np.arange(18))
    mutated = switch_levels(levels, np.full(18, 5), 10**9, 3, np.random.default_rng(0))
    assert mutated is not None
    assert (mutated - 5).sum() == 3
    assert (mutated >= 5).all()


def test_a_switch_that_is_not_possible_is_none() -> None:
    levels = make_levels(PROBLEM, np.arange(18))
    rng = np.random.default_rng(0)
    lowest = np.zeros(18, dtype=np.int64)
    assert switch_levels(levels, lowest, levels.total_bits(lowest), 1, rng) is None
    highest = levels.n_levels - 1
    assert switch_levels(levels, highest, 10**9, 1, rng) is None


def test_most_mutations_are_small() -> None:
    # So many units that distinct offspring are no matter of luck.
    problem = example_problem(0, n_layers=16)
    truth = Truth(problem)
    settings = EvolutionSettings(200, (1,), (1,))
    evolve(problem, problem.limit_bits(3.5), 0, truth, 201, settings)
    rows = np.arange(len(problem.units))
    start, *offspring = (problem.bits[rows, list(choice)] for choice, _ in truth.calls)
    n_raised = np.array([(bits > start).sum() for bits in offspring])
    assert len(n_raised) == 200
    # The smaller of two draws from 1 to 3 is 1, 2, 3 in 5, 3, 1 of 9 cases.
    assert 0.45 < (n_raised == 1).mean() < 0.7
    assert 0.02 < (n_raised == 3).mean() < 0.2


def test_of_formats_with_equal_bits_the_better_is_tried() -> None:
    formats = ("int3-g128-asym", "int4-g64", "mxfp4", "int8-g128")
    problem = example_problem(0, formats=formats)
    costs = {name: np.tile([4.0, 3.0, 2.0, 1.0], (18, 1)) for name in ("fisher", "error")}
    truth = Truth(changed(problem, costs=costs))
    evolve(changed(problem, costs=costs), problem.limit_bits(5.0), 0, truth, 20, SMALL)
    assert {f for choice, _ in truth.calls for f in choice} == {0, 2, 3}


@pytest.mark.parametrize(
    ("n_offspring", "survivors", "windows", "max_switches"),
    [
        pytest.param(8, (4, 1), (1, 2, 3), 3, id="as many counts"),
        pytest.param(8, (4, 2), (1, 2), 3, id="one survivor"),
        pytest.param(2, (4, 1), (1, 2), 3, id="more survivors than offspring"),
        pytest.param(8, (4, 1), (2, 2), 3, id="windows do not rise"),
        pytest.param(8, (4, 1), (0, 2), 3, id="no windows"),
        pytest.param(1, (), (), 3, id="no rounds"),
        pytest.param(8, (4, 1), (1, 2), 0, id="no switches"),
    ],
)
def test_rounds_that_do_not_narrow_are_refused(
    n_offspring: int, survivors: tuple[int, ...], windows: tuple[int, ...], max_switches: int
) -> None:
    with pytest.raises(ConfigError, match="the last survivor count 1"):
        EvolutionSettings(n_offspring, survivors, windows, max_switches)


def test_no_evaluation_is_refused() -> None:
    with pytest.raises(ConfigError, match="give at least 1"):
        evolve(PROBLEM, LIMIT, 0, Truth(PROBLEM), 0.5, SMALL)
