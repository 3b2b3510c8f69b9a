"""The contract over every allocator, and what sets each apart."""

import numpy as np
import pytest

from alphaquant.search.allocators import ALLOCATORS, CostAllocator, nominal_error
from alphaquant.search.problem import Problem
from alphaquant.search.solver import Solution
from alphaquant.testing.allocators import check_allocator, example_problem, example_problems

PROBLEMS = list(example_problems())


def _allocate(name: str, problem: Problem, seed: int = 0) -> Solution:
    return ALLOCATORS[name].allocate(problem, problem.limit_bits(4.0), seed)


@pytest.mark.parametrize(
    "problem", PROBLEMS, ids=["ordinary", "one unit", "one format", "no cost"]
)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_keeps_the_contract(name: str, problem: Problem) -> None:
    assert ALLOCATORS[name].name == name
    check_allocator(ALLOCATORS[name], problem)


def test_the_contract_refuses_an_allocator_that_is_not_repeatable() -> None:
    rng = np.random.default_rng(0)
    broken = CostAllocator("broken", lambda p, _: rng.random(p.bits.shape))
    with pytest.raises(AssertionError, match="broken: two calls with seed 0 differ"):
        check_allocator(broken, PROBLEMS[0])


def test_the_contract_refuses_an_allocator_that_overspends() -> None:
    class Greedy:
        name = "greedy"

        def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
            return ALLOCATORS["error"].allocate(problem, 2 * limit_bits, seed)

    with pytest.raises(AssertionError, match=r"greedy: \d+ bits, limit"):
        check_allocator(Greedy(), PROBLEMS[0])


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
    assert max(costs, key=lambda name: float(costs[name])) == "random"


def test_nominal_error_is_a_quarter_per_bit() -> None:
    problem = example_problem(0)
    n_bits = problem.bits[0, 0] / problem.n_weights[0]
    assert nominal_error(problem)[0, 0] == pytest.approx(0.25**n_bits)
