"""The surrogate: one weight per group, fitted to evaluations that were paid for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.surrogate import fit_group_weights, group_costs
from alphaquant.testing.allocators import example_problem, take

PROBLEM = example_problem(0)
COST = PROBLEM.costs["fisher"]
N_GROUPS = int(PROBLEM.groups.max()) + 1
ONE_GROUP = take(PROBLEM, np.flatnonzero(PROBLEM.groups == 1)[:1], np.arange(2))


def draw_choices(seed: int, n_choices: int) -> IntArray:
    shape = (n_choices, len(PROBLEM.units))
    return np.random.default_rng(seed).integers(0, len(PROBLEM.formats), shape)


def draw_weights(seed: int) -> FloatArray:
    return np.random.default_rng(seed).lognormal(0, 0.7, N_GROUPS)


def test_group_costs_are_sums_over_the_units_of_a_group() -> None:
    choices = draw_choices(0, 3)
    found = group_costs(PROBLEM, COST, choices)
    assert found.shape == (3, N_GROUPS)
    for n, choice in enumerate(choices):
        for group in range(N_GROUPS):
            units = np.flatnonzero(PROBLEM.groups == group)
            assert found[n, group] == pytest.approx(sum(COST[u, choice[u]] for u in units))


def test_the_worked_example() -> None:
    choices = np.array([[0], [1]])
    cost, kl = np.array([[1.0, 2.0]]), np.array([2.0, 4.0])
    assert fit_group_weights(ONE_GROUP, cost, choices, kl) == pytest.approx([2.0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_weights_of_noiseless_data_are_found(seed: int) -> None:
    choices, weights = draw_choices(seed, 40), draw_weights(seed)
    kl = group_costs(PROBLEM, COST, choices) @ weights
    found = fit_group_weights(PROBLEM, COST, choices, kl, ridge=1e-9)
    assert found == pytest.approx(weights[PROBLEM.groups], rel=1e-4)


def test_with_the_usual_ridge_choices_are_predicted_better_than_by_equal_weights() -> None:
    choices, weights = draw_choices(1, 60), draw_weights(1)
    kl = group_costs(PROBLEM, COST, choices) @ weights
    fitted = fit_group_weights(PROBLEM, COST, choices[:40], kl[:40])

    def error(of_unit: FloatArray) -> float:
        predicted = group_costs(PROBLEM, COST * of_unit[:, None], choices[40:]).sum(axis=1)
        logs = np.log(predicted / kl[40:])
        return float((logs - logs.mean()).std())

    assert error(fitted) < 0.2 * error(np.ones(len(PROBLEM.units)))


@pytest.mark.parametrize(
    "kl",
    [
        pytest.param([], id="nothing was evaluated"),
        pytest.param([0.0, -1e-9], id="nothing above zero"),
    ],
)
def test_without_data_all_weights_are_one(kl: list[float]) -> None:
    choices = draw_choices(0, len(kl))
    assert (fit_group_weights(PROBLEM, COST, choices, np.array(kl)) == 1).all()


def test_a_model_without_cost_has_weights_of_one() -> None:
    choices = draw_choices(0, 3)
    assert (fit_group_weights(PROBLEM, 0 * COST, choices, np.ones(3)) == 1).all()


def test_evaluations_of_no_divergence_do_not_count() -> None:
    choices, weights = draw_choices(2, 12), draw_weights(2)
    kl = group_costs(PROBLEM, COST, choices) @ weights
    kl[10:] = [0.0, -1.0]
    found = fit_group_weights(PROBLEM, COST, choices, kl)
    assert found.tolist() == fit_group_weights(PROBLEM, COST, choices[:10], kl[:10]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(1e-6, 10))
def test_weights_are_finite_and_never_negative(seed: int, n_choices: int, ridge: float) -> None:
    choices = draw_choices(seed, n_choices)
    kl = np.random.default_rng(seed + 1).lognormal(0, 2, n_choices)
    found = fit_group_weights(PROBLEM, COST, choices, kl, ridge)
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_a_group_whose_cost_lowers_the_divergence_gets_no_weight() -> None:
    """The least squares alone would find -0.1."""
    choices, weights = draw_choices(3, 60), np.ones(N_GROUPS)
    weights[1] = -0.1
    kl = group_costs(PROBLEM, COST, choices) @ weights
    assert (kl > 0).sum() > 40
    found = fit_group_weights(PROBLEM, COST, choices, kl, ridge=1e-9)
    assert found[PROBLEM.groups == 1] == pytest.approx(0, abs=1e-3)
    assert (found >= 0).all()


def test_a_unit_of_measure_changes_the_level_and_nothing_else() -> None:
    choices, weights = draw_choices(4, 20), draw_weights(4)
    kl = group_costs(PROBLEM, COST, choices) @ weights
    found = fit_group_weights(PROBLEM, COST, choices, kl)
    assert fit_group_weights(PROBLEM, COST, choices, 100 * kl) == pytest.approx(100 * found)
    assert fit_group_weights(PROBLEM, 100 * COST, choices, kl) == pytest.approx(found / 100)


def test_the_ridge_pulls_to_the_common_level_and_unseen_groups_all_the_way() -> None:
    choices, weights = draw_choices(5, 20), draw_weights(5)
    cost = COST.copy()
    cost[PROBLEM.groups == 2] = 0.0  # whatever it takes, the group is never seen
    by_group = group_costs(PROBLEM, cost, choices)
    kl = by_group @ weights
    level = float(np.exp(np.median(np.log(kl / by_group.sum(axis=1)))))
    spreads = []
    for ridge in (1e-6, 1.0, 1e3, 1e9):
        found = fit_group_weights(PROBLEM, cost, choices, kl, ridge)
        assert found[PROBLEM.groups == 2] == pytest.approx(level)
        spreads.append(float(np.abs(found / level - 1).max()))
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 0.2
    assert spreads[-1] < 1e-6


def test_the_ridge_is_a_number_of_evaluations() -> None:
    choices, weights = draw_choices(6, 10), draw_weights(6)
    kl = group_costs(PROBLEM, COST, choices) @ weights
    once = fit_group_weights(PROBLEM, COST, choices, kl, ridge=1.0)
    four = fit_group_weights(PROBLEM, COST, np.tile(choices, (4, 1)), np.tile(kl, 4), ridge=4.0)
    assert four == pytest.approx(once, rel=1e-6)
