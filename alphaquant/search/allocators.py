"""Allocators: rules that turn a problem into an assignment within a limit, by name.

Most give every (unit, format) a cost and leave the rest to the solver; the others move units along
their levels. Either way they are feasible and total by construction. They are a study's first
trials and its baselines. The contract is `alphaquant.testing.allocators`. Published ones are in
`alphaquant.search.published`; a search that needs true evaluations is no allocator, see
`alphaquant.search.evolution`.

Letters: U units, F formats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from alphaquant.search.arrays import FloatArray
from alphaquant.search.knobs import Knobs, apply_knobs
from alphaquant.search.levels import make_levels
from alphaquant.search.problem import Problem
from alphaquant.search.published import PUBLISHED
from alphaquant.search.solver import Solution, solve


class Allocator(Protocol):
    """One format per unit, within the limit; equal arguments give equal choices."""

    @property
    def name(self) -> str:
        """How command lines, studies and reports call it."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Optional cost tables and features of the problem that it uses."""
        ...

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """Choose a format for every unit.

        Args:
            problem: units, formats and measured costs.
            limit_bits: total bits that the choice may take.
            seed: of rules that draw; the others ignore it.

        Returns:
            The choice; cost, bound and gap are in the allocator's own cost, 0 for rules that
            have none.

        Raises:
            BudgetError: the limit is below the cheapest choice.
            ConfigError: the problem lacks one of `needs`.
        """
        ...


@dataclass(frozen=True)
class CostAllocator:
    """An allocator that minimizes the sum of a cost.

    Attributes:
        name: see `Allocator`.
        make_cost: problem and seed -> cost, float64 [U, F].
        needs: see `Allocator`.
    """

    name: str
    make_cost: Callable[[Problem, int], FloatArray]
    needs: tuple[str, ...] = ()

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """See `Allocator.allocate`."""
        cost = self.make_cost(problem, seed)
        return solve(cost, problem.bits, problem.allowed, limit_bits)


@dataclass(frozen=True)
class UniformAllocator:
    """One format for every unit: of those within the limit the one that stores the most bits.

    Of equal ones the least Fisher cost decides. A unit that may not take the format takes its
    highest level of no more bits, or its lowest. Where no format fits, every unit takes its
    lowest. The rule has no cost, so the solution's cost and gap are 0.
    """

    name: str = "uniform"
    needs: tuple[str, ...] = ()

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """See `Allocator.allocate`."""
        problem.check_limit(limit_bits)
        rows = np.arange(len(problem.units))
        levels = make_levels(problem, rows)
        best = levels.choice(np.zeros(len(rows), dtype=np.int64))
        best_rank = (-1, 0.0)
        for column in range(len(problem.formats)):
            others = levels.choice(levels.at_most(problem.bits[:, column]))
            choice = np.where(problem.allowed[:, column], column, others)
            n_bits = int(problem.bits[rows, choice].sum())
            rank = (n_bits, -float(problem.costs["fisher"][rows, choice].sum()))
            if n_bits <= limit_bits and rank > best_rank:
                best, best_rank = choice, rank
        return Solution(best, 0.0, int(problem.bits[rows, best].sum()), 0.0, 0.0)


def available(problem: Problem) -> tuple[str, ...]:
    """Names of the allocators whose inputs a problem has, in the order of the table."""
    return tuple(
        name for name, a in ALLOCATORS.items() if all(problem.has(need) for need in a.needs)
    )


def nominal_error(problem: Problem) -> FloatArray:
    """float64 [U, F], 4^-b for b stored bits per weight: each bit halves the rounding step."""
    return np.asarray(4.0 ** -(problem.bits / problem.n_weights[:, None]), dtype=np.float64)


def _fisher_cost(problem: Problem, seed: int) -> FloatArray:
    """The Fisher cost, shrunk and cleaned."""
    return apply_knobs(problem, Knobs(bits=1.0, error_weight=0.0, token_weight=0.0))


def _blend_cost(problem: Problem, seed: int) -> FloatArray:
    """The theory's setting of all knobs."""
    return apply_knobs(problem, Knobs(bits=1.0))


def _error_cost(problem: Problem, seed: int) -> FloatArray:
    """The route-weighted output error as measured, layers compared without a scale."""
    return problem.costs["error"]


def _token_fisher_cost(problem: Problem, seed: int) -> FloatArray:
    """The Fisher cost with a gradient per token, as measured."""
    return problem.cost("token_fisher")


def _utilization_cost(problem: Problem, seed: int) -> FloatArray:
    """Tokens times weights times nominal error: more bits where more tokens go."""
    used = problem.n_tokens * problem.n_weights
    return np.asarray(used[:, None] * nominal_error(problem), dtype=np.float64)


def _random_cost(problem: Problem, seed: int) -> FloatArray:
    """Log-normal importance of each unit times nominal error; fills the limit like the others."""
    importance = np.random.default_rng(seed).lognormal(sigma=2.0, size=len(problem.units))
    scale = (importance * problem.n_weights)[:, None]
    return np.asarray(scale * nominal_error(problem), dtype=np.float64)


ALLOCATORS: Mapping[str, Allocator] = MappingProxyType(
    {
        allocator.name: allocator
        for allocator in (
            CostAllocator("blend", _blend_cost),
            CostAllocator("fisher", _fisher_cost),
            CostAllocator("token-fisher", _token_fisher_cost, ("token_fisher",)),
            CostAllocator("error", _error_cost),
            CostAllocator("utilization", _utilization_cost),
            CostAllocator("random", _random_cost),
            UniformAllocator(),
            *PUBLISHED,
        )
    }
)
"""Every allocator by name; a new one adds one line."""
