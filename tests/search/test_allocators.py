"""The contract over every allocator, and what sets each apart."""

import numpy as np
import pytest

from alphaquant.errors import ConfigError
from alphaquant.search.allocators import ALLOCATORS, CostAllocator, available, nominal_error
from alphaquant.search.problem import COSTS, Problem
from alphaquant.search.solver import Solution
from alphaquant.testing.allocators import (
    changed,
    check_allocator,
    example_problem,
    example_problems,
)

PROBLEMS = example_problems()
ORDINARY = PROBLEMS["ordinary"]


def _allocate(name: str, problem: Problem, seed: int = 0) -> Solution:
    return ALLOCATORS[name].allocate(problem, problem.limit_bits(4.0), seed)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_keeps_the_contract(name: str) -> None:
    assert ALLOCATORS[name].name == name
    for problem in PROBLEMS.values():
        check_allocator(ALLOCATORS[name], problem)


def test_the_contract_refuses_an_allocator_that_is_not_repeatable() -> None:
    rng = np.random.default_rng(0)
    broken = CostAllocator("broken", lambda p, _: rng.random(p.bits.shape))
    with pytest.raises(AssertionError, match="broken: two calls with seed 0 differ"):
        check_allocator(broken, ORDINARY)


def test_the_contract_refuses_an_allocator_that_overspends() -> None:
    class Greedy:
        name, needs = "greedy", ()

        def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
            return ALLOCATORS["error"].allocate(problem, 2 * limit_bits, seed)

    with pytest.raises(AssertionError, match=r"greedy: \d+ bits, limit"):
        check_allocator(Greedy(), ORDINARY)


def test_only_random_depends_on_the_seed() -> None:
    problem = example_problem(5)
    for name in ALLOCATORS:
        first, second = (_allocate(name, problem, seed).choice for seed in (0, 1))
        assert np.array_equal(first, second) is (name != "random")


def test_random_fills_the_limit() -> None:
    problem = example_problem(5, n_layers=8)
    limit_bits = problem.limit_bits(4.0)
    assert 0.99 * limit_bits < _allocate("random", problem).bits <= limit_bits


def test_utilization_gives_more_used_experts_no_fewer_bits() -> None:
    problem = example_problem(2)
    w2 = [n for n, family in enumerate(problem.families) if family == "expert.w2"]
    bits = problem.bits[np.arange(len(problem.units)), _allocate("utilization", problem).choice]
    # The remainder of the limit may lift one unit out of order by one step.
    by_use = bits[w2][np.argsort(problem.n_tokens[w2])]
    assert (np.diff(by_use) < 0).sum() <= 1
    assert by_use[0] < by_use[-1]


def test_each_cost_is_least_under_its_own_allocator() -> None:
    problem = example_problem(4, n_layers=8)
    rows = np.arange(len(problem.units))
    costs = {
        name: problem.costs["error"][rows, _allocate(name, problem).choice].sum()
        for name in ALLOCATORS
    }
    assert min(costs, key=lambda name: float(costs[name])) == "error"
    assert costs["random"] > max(costs["utilization"], costs["fisher"], costs["uniform"])


def test_token_fisher_takes_its_own_table() -> None:
    problem = changed(ORDINARY, costs=dict(ORDINARY.costs) | {"token_fisher": np.zeros((18, 12))})
    least = int(problem.least_bits.sum())
    assert ALLOCATORS["token-fisher"].allocate(problem, 2 * least, 0).bits == least
    assert ALLOCATORS["fisher"].allocate(problem, 2 * least, 0).bits > least
    rows, choice = np.arange(18), _allocate("token-fisher", ORDINARY).choice
    own = [
        ORDINARY.costs["token_fisher"][rows, c].sum()
        for c in (choice, _allocate("error", ORDINARY).choice)
    ]
    assert own[0] < own[1]


def test_uniform_takes_the_most_bits_that_fit() -> None:
    int4 = ORDINARY.formats.index("int4-g128-asym")
    limit_bits = int(ORDINARY.bits[:, int4].sum())
    choice = ALLOCATORS["uniform"].allocate(ORDINARY, limit_bits, 0).choice
    assert (choice == int4).all()
    assert (ALLOCATORS["uniform"].allocate(ORDINARY, limit_bits - 1, 0).choice == int4 - 1).all()


@pytest.mark.parametrize("better", ["int4-g64", "mxfp4"])
def test_uniform_takes_the_better_of_equal_formats(better: str) -> None:
    formats = ("int3-g128-asym", "int4-g64", "mxfp4", "int8-g128")
    problem = example_problem(3, formats=formats)
    assert (problem.bits[:, 1] == problem.bits[:, 2]).all()
    factor = [1.0 if name == better else 2.0 for name in formats]
    problem = changed(problem, costs={name: np.ones((18, 4)) * factor for name in COSTS})
    chosen = ALLOCATORS["uniform"].allocate(problem, problem.limit_bits(4.5), 0).choice
    assert {formats[f] for f in chosen} == {better}


def test_uniform_takes_the_first_of_formats_that_nothing_sets_apart() -> None:
    formats = ("int3-g128-asym", "int4-g64", "mxfp4", "int8-g128")
    problem = example_problem(3, formats=formats)
    problem = changed(problem, costs={name: np.zeros((18, 4)) for name in COSTS})
    assert (ALLOCATORS["uniform"].allocate(problem, problem.limit_bits(4.5), 0).choice == 1).all()


def test_uniform_gives_units_that_may_not_take_the_format_what_is_below() -> None:
    int3, int4 = (ORDINARY.formats.index(f"int{b}-g128-asym") for b in (3, 4))
    allowed = ORDINARY.allowed.copy()
    allowed[3, int3 + 1 : int4 + 1] = False  # has int3-g128 below
    allowed[5] = np.arange(12) == int3  # nothing else
    limit_bits = int(ORDINARY.bits[:, int4].sum())
    solution = ALLOCATORS["uniform"].allocate(changed(ORDINARY, allowed=allowed), limit_bits, 0)
    expected = np.full(18, int4)
    expected[[3, 5]] = int3
    assert solution.choice.tolist() == expected.tolist()


def test_rules_without_a_cost_claim_none() -> None:
    for name in ("uniform", "alpha-hill"):
        solution = _allocate(name, ORDINARY)
        assert (solution.cost, solution.lower_bound, solution.gap) == (0, 0, 0)


def test_all_allocators_are_available_where_everything_was_measured() -> None:
    assert available(ORDINARY) == tuple(ALLOCATORS)
    expected = (
        "blend fisher token-fisher error utilization random uniform alpha-hill alphaq pmq gemq "
        "prismaquant"
    )
    assert sorted(ALLOCATORS) == sorted(expected.split())


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        ("token_fisher", {"token-fisher"}),
        ("gemq", {"gemq"}),
        ("alpha", {"alpha-hill", "alphaq"}),
        ("variance", {"alphaq"}),
        ("routing_weight", {"pmq"}),
        ("alpha_plain", set()),
        ("active_share", set()),
    ],
)
def test_allocators_whose_inputs_are_missing_are_not_available_and_say_so(
    missing: str, names: set[str]
) -> None:
    problem = changed(
        ORDINARY,
        costs={n: t for n, t in ORDINARY.costs.items() if n != missing},
        features={n: v for n, v in ORDINARY.features.items() if n != missing},
    )
    assert set(ALLOCATORS) - set(available(problem)) == names
    for name in ALLOCATORS:
        if name in names:
            with pytest.raises(ConfigError, match=f"{missing} was not measured, only fisher"):
                _allocate(name, problem)
        else:
            _allocate(name, problem)


def test_nominal_error_is_a_quarter_per_bit() -> None:
    problem = example_problem(0)
    n_bits = problem.bits[0, 0] / problem.n_weights[0]
    assert nominal_error(problem)[0, 0] == pytest.approx(0.25**n_bits)
