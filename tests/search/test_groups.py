"""Groups of one format: how they are formed, and how a suggestion becomes a choice that fits."""

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.search.arrays import IntArray
from alphaquant.search.groups import (
    GROUPINGS,
    Groups,
    check_grouping,
    fit_groups,
    make_groups,
    suggest_groups,
)
from alphaquant.search.problem import Problem
from alphaquant.search.sampler import PlannedTrial, next_trial
from alphaquant.search.solver import solve
from alphaquant.testing.allocators import changed, example_problem, example_problems

PROBLEM = example_problem(0)


def columns_of(groups: Groups, levels: dict[str, int]) -> IntArray:
    """The column of each group, int64 [G]."""
    return np.array([o[levels[n]] for n, o in zip(groups.names, groups.options, strict=True)])


def draw_levels(groups: Groups, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    sizes = zip(groups.names, groups.options, strict=True)
    return {name: int(rng.integers(len(options))) for name, options in sizes}


def taken_bits(problem: Problem, choice: IntArray) -> int:
    return int(problem.bits[np.arange(len(choice)), choice].sum())


def limit_at(groups: Groups, share: float) -> int:
    """A limit between the cheapest (0) and the dearest (1) format of every group."""
    ends = [row[o[[0, -1]]] for row, o in zip(groups.bits, groups.options, strict=True)]
    least, most = np.sum(ends, axis=0).tolist()
    return int(least + share * (most - least))


def check_fitted(problem: Problem, groups: Groups, levels: dict[str, int], limit: int) -> IntArray:
    """The column of each group: one format each, within the limit, no group above its level."""
    choice = fit_groups(groups, problem.costs["fisher"], levels, limit)
    assert taken_bits(problem, choice) <= limit
    found = []
    for group, wanted in enumerate(columns_of(groups, levels).tolist()):
        (column,) = set(choice[groups.members == group].tolist())
        assert groups.allowed[group, column]
        assert groups.bits[group, column] <= groups.bits[group, wanted]
        found.append(column)
    return np.array(found)


def test_by_layer_a_group_is_a_family_of_a_layer() -> None:
    groups = make_groups(PROBLEM, "layer")
    assert set(groups.names) == {
        f"layer {layer} {family}" for layer in (0, 1) for family in set(PROBLEM.families)
    }
    assert groups.members.tolist() == PROBLEM.groups.tolist()


def test_by_utilization_experts_are_ranked_among_their_family_and_layer() -> None:
    """Of 30, 10, 40 and 20 tokens the second expert is the least used, in every layer."""
    tokens = {None: 5.0, 0: 30.0, 1: 10.0, 2: 40.0, 3: 20.0}
    of_unit = [unit.matrices[0].expert for unit in PROBLEM.units]
    layer_scale = np.where(PROBLEM.layers == 1, 100.0, 1.0)
    n_tokens = np.array([tokens[expert] for expert in of_unit]) * layer_scale
    groups = make_groups(changed(PROBLEM, n_tokens=n_tokens), "utilization")
    places = {None: "", 0: "3 of 4", 1: "1 of 4", 2: "4 of 4", 3: "2 of 4"}
    assert [groups.names[group] for group in groups.members] == [
        family + (f", use {places[expert]}" if places[expert] else "")
        for family, expert in zip(PROBLEM.families, of_unit, strict=True)
    ]


@pytest.mark.parametrize(("n_experts", "sizes"), [(2, [1, 1]), (6, [2, 1, 2, 1]), (8, [2] * 4)])
def test_buckets_of_experts_are_as_even_as_their_number_allows(
    n_experts: int, sizes: list[int]
) -> None:
    problem = example_problem(0, n_layers=1, n_experts=n_experts)
    groups = make_groups(problem, "utilization")
    down = sorted(name for name in groups.names if name.startswith("expert.w2"))
    assert [int((groups.members == groups.names.index(n)).sum()) for n in down] == sizes


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", ["ordinary", "no experts", "one unit", "one format"])
def test_groups_add_up_their_members(name: str, grouping: str) -> None:
    problem = example_problems()[name]
    groups = make_groups(problem, grouping)
    cost = groups.merge(problem.costs["fisher"])
    for group in range(len(groups.names)):
        rows = groups.members == group
        assert rows.any()
        assert groups.bits[group].tolist() == problem.bits[rows].sum(axis=0).tolist()
        assert cost[group] == pytest.approx(problem.costs["fisher"][rows].sum(axis=0))
        assert (np.diff(groups.bits[group, groups.options[group]]) >= 0).all()


def test_a_group_takes_only_formats_that_all_its_members_may_take() -> None:
    allowed = PROBLEM.allowed.copy()
    of_group = np.flatnonzero(PROBLEM.groups == 1)
    allowed[of_group[0], 3] = allowed[of_group[1], 6] = False
    groups = make_groups(changed(PROBLEM, allowed=allowed), "layer")
    assert sorted(groups.options[1].tolist()) == sorted({*range(12)} - {3, 6})
    assert sorted(groups.options[0].tolist()) == list(range(12))


def test_a_group_without_a_common_format_is_refused_with_its_name() -> None:
    problem = example_problems()["one allowed format per unit"]
    with pytest.raises(ConfigError, match=r"the units of layer 0 expert\.w13 have no format in"):
        make_groups(problem, "layer")


def test_an_unknown_grouping_is_refused_with_those_that_exist() -> None:
    for refuse in (check_grouping, lambda name: make_groups(PROBLEM, name)):
        with pytest.raises(ConfigError, match="unknown grouping 'rows'; use one of layer, util"):
            refuse("rows")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(GROUPINGS)))
def test_a_suggestion_that_fits_is_taken_as_it_is(seed: int, grouping: str) -> None:
    groups = make_groups(PROBLEM, grouping)
    levels = draw_levels(groups, seed)
    wanted = columns_of(groups, levels)
    limit = int(groups.bits[np.arange(len(wanted)), wanted].sum())
    choice = fit_groups(groups, PROBLEM.costs["fisher"], levels, limit)
    assert choice.tolist() == wanted[groups.members].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(GROUPINGS)), st.floats(0, 1))
def test_one_that_does_not_fit_is_repaired_within_the_limit_and_its_levels(
    seed: int, grouping: str, share: float
) -> None:
    problem = example_problem(seed)
    allowed = np.random.default_rng(seed).random(problem.bits.shape) < 0.9
    allowed[:, [0, -1]] = True
    problem = changed(problem, allowed=allowed)
    groups = make_groups(problem, grouping)
    check_fitted(problem, groups, draw_levels(groups, seed), limit_at(groups, share))


def test_the_richest_suggestion_is_repaired_to_the_optimum_of_the_groups() -> None:
    groups = make_groups(PROBLEM, "layer")
    richest = {n: len(o) - 1 for n, o in zip(groups.names, groups.options, strict=True)}
    limit = limit_at(groups, 0.4)
    cost = groups.merge(PROBLEM.costs["fisher"])
    best = solve(cost, groups.bits, groups.allowed, limit)
    assert check_fitted(PROBLEM, groups, richest, limit).tolist() == best.choice.tolist()
    assert best.bits > limit_at(groups, 0.3)


def test_a_limit_below_one_cheapest_format_per_group_is_refused() -> None:
    groups = make_groups(PROBLEM, "layer")
    least = limit_at(groups, 0)
    levels = draw_levels(groups, 0)
    assert taken_bits(PROBLEM, fit_groups(groups, PROBLEM.costs["fisher"], levels, least)) == least
    with pytest.raises(
        BudgetError, match=rf"takes {least} bits at least, the limit is {least - 1}"
    ):
        fit_groups(groups, PROBLEM.costs["fisher"], levels, least - 1)


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_every_sampled_trial_is_feasible(sampler: str) -> None:
    groups = make_groups(PROBLEM, "utilization")
    limit = limit_at(groups, 0.3)
    study = optuna.create_study(directions=["minimize", "minimize"])
    n_repaired = 0
    for _ in range(45):
        trial = next_trial(study, PlannedTrial({}), sampler, 7)
        levels = suggest_groups(trial, groups)
        columns = check_fitted(PROBLEM, groups, levels, limit)
        n_repaired += columns.tolist() != columns_of(groups, levels).tolist()
        rows = np.arange(len(columns))
        cost = float(groups.merge(PROBLEM.costs["fisher"])[rows, columns].sum())
        study.tell(trial, [float(groups.bits[rows, columns].sum()), cost])
    assert n_repaired > 5


def test_a_suggestion_asks_for_the_place_among_the_formats_of_each_group() -> None:
    groups = make_groups(PROBLEM, "layer")
    levels = draw_levels(groups, 3)
    study = optuna.create_study()
    study.enqueue_trial(dict(levels))
    trial = study.ask()
    assert suggest_groups(trial, groups) == levels
    assert list(trial.params) == list(groups.names)
    for name, options in zip(groups.names, groups.options, strict=True):
        span = trial.distributions[name]
        assert span == optuna.distributions.IntDistribution(0, len(options) - 1)
