"""Allocators: rules that turn a problem into an assignment within a limit, by name.

Each gives every (unit, format) a cost and leaves the rest to the solver, so all of them are
feasible and total by construction. They are a study's first trials and its baselines; published
allocators join the table at the end. The contract is `alphaquant.testing.allocators`.

Letters: U units, F formats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from alphaquant.search.arrays import FloatArray
from alphaquant.search.knobs import Knobs, apply_knobs
from alphaquant.search.problem import Problem
from alphaquant.search.solver import Solution, solve


class Allocator(Protocol):
    """One format per unit, within the limit; equal arguments give equal choices."""

    @property
    def name(self) -> str:
        """How command lines, studies and reports call it."""
        ...

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """Choose a format for every unit.

        Args:
            problem: units, formats and measured costs.
            limit_bits: total bits that the choice may take.
            seed: of rules that draw; the others ignore it.

        Returns:
            The choice; cost, bound and gap are in the allocator's own cost.

        Raises:
            BudgetError: the limit is below the cheapest choice.
        """
        ...


@dataclass(frozen=True)
class CostAllocator:
    """An allocator that minimizes the sum of a cost.

    Attributes:
        name: see `Allocator`.
        make_cost: problem and seed -> cost, float64 [U, F].
    """

    name: str
    make_cost: Callable[[Problem, int], FloatArray]

    def allocate(self, problem: Problem, limit_bits: int, seed: int) -> Solution:
        """See `Allocator.allocate`."""
        cost = self.make_cost(problem, seed)
        return solve(cost, problem.bits, problem.allowed, limit_bits)


def nominal_error(problem: Problem) -> FloatArray:
    """float64 [U, F], 4^-b for b stored bits per weight: each bit halves the rounding step."""
    return np.asarray(4.0 ** -(problem.bits / problem.n_weights[:, None]), dtype=np.float64)


def _fisher_cost(problem: Problem, seed: int) -> FloatArray:
    """The Fisher cost, shrunk and cleaned."""
    return apply_knobs(problem, Knobs(bits=1.0, error_weight=0.0))


def _blend_cost(problem: Problem, seed: int) -> FloatArray:
    """The theory's setting of all knobs."""
    return apply_knobs(problem, Knobs(bits=1.0))


def _error_cost(problem: Problem, seed: int) -> FloatArray:
    """The route-weighted output error as measured, layers compared without a scale."""
    return problem.costs["error"]


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
            CostAllocator("error", _error_cost),
            CostAllocator("utilization", _utilization_cost),
            CostAllocator("random", _random_cost),
        )
    }
)
"""Every allocator by name; a new one adds one line."""
