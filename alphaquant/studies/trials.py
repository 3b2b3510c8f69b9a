"""From a rule to the assignment of a trial: uniform formats, allocators, knobs, groups, choices.

All are feasible by construction: they come from the solver with the budget as its limit and the
side constraints kept, or they are uniform and fit.

Letters: U units, F formats.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import optuna

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.search.allocators import ALLOCATORS
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.groups import Groups, fit_groups, suggest_groups
from alphaquant.search.knobs import Knobs, apply_knobs, suggest_knobs
from alphaquant.search.problem import Problem
from alphaquant.search.side.constraints import SideConstraints, is_kept, solve_constrained
from alphaquant.search.solver import Solution, solve
from alphaquant.spaces.assignment import Assignment, assignment_from_units, uniform_assignment
from alphaquant.spaces.budget import parse_byte_budget
from alphaquant.spaces.formats import BF16, parse_format
from alphaquant.spaces.profiles import is_loadable
from alphaquant.spaces.space import SearchSpace
from alphaquant.specs.limits import LimitSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.loop import Proposal

UNIFORM = "uniform:"
"""Start of the origin of uniform trials."""

CANDIDATE = "candidate:"
"""Start of the origin of candidates as they are."""

ALLOCATOR = "allocator:"
"""Start of the origin of allocators' trials."""


@dataclass(frozen=True)
class Proposer:
    """Everything that turns rules into assignments.

    Attributes:
        space: units, menu, budget.
        problem: their costs.
        seed: of random allocators.
        constraints: what every assignment keeps besides the budget.
        lacking: formats in which not every unit was quantized.
    """

    space: SearchSpace
    problem: Problem
    seed: int
    constraints: SideConstraints = field(default_factory=SideConstraints)
    lacking: frozenset[str] = frozenset()

    @property
    def limit_bits(self) -> int:
        """Bits that the budget allows."""
        return self.space.limit_bits

    @property
    def is_constrained(self) -> bool:
        """Whether there is more to keep than the budget."""
        return self.constraints != SideConstraints()

    @property
    def bits_high(self) -> float:
        """Bits per weight of the budget, or of the dearest assignment where that is less."""
        return self._mean_of(min(self.limit_bits, self._dearest))

    @property
    def bits_low(self) -> float:
        """Bits per weight of the cheapest assignment."""
        return self._mean_of(int(self.problem.least_bits.sum()))

    @property
    def bits_most(self) -> float:
        """Bits per weight of the dearest assignment, whatever the budget."""
        return self._mean_of(self._dearest)

    @property
    def base_cost(self) -> FloatArray:
        """The cost of the default knobs, float64 [U, F]."""
        return apply_knobs(self.problem, Knobs(self.bits_high))

    def uniform(self, format_name: str) -> Proposal | None:
        """One format for everything; None where it does not keep the side constraints."""
        if not self.keeps_uniform(format_name):
            return None
        assignment = uniform_assignment(self.space.inventory, format_name)
        return Proposal(assignment, UNIFORM + format_name)

    def keeps_uniform(self, format_name: str) -> bool:
        """Whether one format for everything can be tried, whatever the budget.

        The bank has it, and it keeps the side constraints.
        """
        if format_name in self.lacking:
            return False
        if not self.is_constrained:
            return True
        fmt, n_units = parse_format(format_name), len(self.problem.units)
        bits = np.array([[unit.storage_bits(fmt)] for unit in self.problem.units])
        alone = replace(
            self.problem, formats=(format_name,), bits=bits, allowed=np.ones_like(bits, dtype=bool)
        )
        return is_kept(alone, np.zeros(n_units, dtype=np.int64), self.constraints)

    def candidate(self, directory: str) -> Proposal | None:
        """A candidate as it is, the original where it has nothing.

        None where that is over the budget, breaks a coupling or a side constraint.
        """
        held = self.space.held
        assert held is not None, "there are candidates"
        formats = {
            name: next((f for f, place in own.items() if place == directory), BF16.name)
            for name, own in held.items()
        }
        for unit in self.space.units:
            if len({formats[matrix.name] for matrix in unit.matrices}) > 1:
                return None
        assignment = Assignment(formats)
        choice = self.choice(assignment)
        if choice is None or not is_kept(self.problem, choice, self.constraints):
            return None
        is_within = assignment.storage_bits(self.space.inventory) <= self.limit_bits
        return Proposal(assignment, CANDIDATE + directory) if is_within else None

    def allocator(self, name: str) -> Proposal | None:
        """An allocator's choice; None where it does not keep the side constraints."""
        solution = ALLOCATORS[name].allocate(self.problem, self.limit_bits, self.seed)
        if not is_kept(self.problem, solution.choice, self.constraints):
            return None
        return Proposal(self.spread(solution.choice), ALLOCATOR + name, solution.gap)

    def knobs(self, trial: optuna.Trial) -> Proposal:
        """The assignment of suggested knobs."""
        return self.of_knobs(suggest_knobs(trial, self.bits_low, self.bits_high))

    def of_knobs(self, knobs: Knobs) -> Proposal:
        """The assignment of given knobs."""
        cost = apply_knobs(self.problem, knobs)
        limit_bits = min(self.limit_bits, self.problem.limit_bits(knobs.bits))
        solution = self.solve(cost, limit_bits)
        return Proposal(self.spread(solution.choice), "knobs", solution.gap, can_prune=True)

    def groups(self, trial: optuna.Trial, groups: Groups) -> Proposal:
        """The assignment of a suggested format per group."""
        levels = suggest_groups(trial, groups)
        choice = fit_groups(groups, self.base_cost, levels, self.limit_bits)
        return Proposal(self.spread(choice), "groups", can_prune=True)

    def at(self, cost: FloatArray, limit_bits: int, origin: str) -> Proposal:
        """The optimum of a cost within a limit.

        Raises:
            BudgetError: nothing keeps the limit and the side constraints.
        """
        solution = self.solve(cost, limit_bits)
        return Proposal(self.spread(solution.choice), origin, solution.gap)

    def solve(self, cost: FloatArray, limit_bits: int) -> Solution:
        """The optimum of a cost within a limit and the side constraints.

        Raises:
            BudgetError: nothing keeps them all.
        """
        if not self.is_constrained:
            return solve(cost, self.problem.bits, self.problem.allowed, limit_bits)
        share = self.problem.feature("active_share")
        given = (self.problem, cost, limit_bits, self.constraints, share)
        try:
            # Without the integer search, which may take seconds; the gap is in the trial.
            return solve_constrained(*given, max_nodes=0)
        except BudgetError:
            return solve_constrained(*given)

    def spread(self, choice: npt.NDArray[np.int64]) -> Assignment:
        """The assignment of a choice, int64 [U]."""
        names = self.problem.choice_names(choice)
        return assignment_from_units(self.space.inventory, self.space.units, names)

    def choice(self, assignment: Assignment) -> IntArray | None:
        """The choice of an assignment, None where it has formats outside the menu."""
        column = {name: i for i, name in enumerate(self.problem.formats)}
        names = [assignment.formats[unit.matrices[0].name] for unit in self.problem.units]
        if not all(name in column for name in names):
            return None
        return np.array([column[name] for name in names], dtype=np.int64)

    @property
    def _dearest(self) -> int:
        return int(self.problem.bits.max(1, where=self.problem.allowed, initial=0).sum())

    def _mean_of(self, n_bits: int) -> float:
        """The mean per weight that allows `n_bits`; the plain quotient may allow one bit less."""
        mean = n_bits / self.space.inventory.n_weights
        return mean if self.problem.limit_bits(mean) >= n_bits else math.nextafter(mean, math.inf)


def constraints_of(limits: LimitSpec) -> SideConstraints:
    """What every assignment keeps besides the budget.

    Raises:
        AlphaQuantError: a limit that no assignment could keep.
    """
    active_bits = None
    if limits.active_budget is not None:
        active_bits = 8 * parse_byte_budget(limits.active_budget, "active budget")
    return SideConstraints(limits.max_formats_per_layer, limits.layer_minimum_bits, active_bits)


def check_allocators(spec: SearchSpec) -> None:
    """Refuse allocators that do not exist, and those beside the one that runs alone.

    Raises:
        ConfigError: naming those that do.
    """
    given = spec.proposals
    names, known = given.allocator_names, [*ALLOCATORS, EVOLUTION]
    if given.allocator is not None and names:
        raise ConfigError(
            f"--allocator {given.allocator} runs alone and --allocators {given.allocators} are "
            "further trials of a search; give one of the two"
        )
    asked = names if given.allocator is None else (given.allocator,)
    for name in asked if names != (ALL_ALLOCATORS,) else ():
        if name not in known:
            raise ConfigError(f"unknown allocator {name!r}; use one of {', '.join(known)}")


def check_constrained(spec: SearchSpec) -> None:
    """Refuse side constraints where what proposes knows the budget only.

    Raises:
        AlphaQuantError: saying which can keep them, or a limit that no assignment could keep.
    """
    constraints, given = constraints_of(spec.limits), spec.proposals
    if constraints == SideConstraints():
        return
    for what, asked, known in (
        ("mode groups", given.allocator is None and given.mode == "groups", "mode knobs"),
        (
            "allocator evolution",
            EVOLUTION in (given.allocator, *given.allocator_names),
            "another allocator",
        ),
    ):
        if asked:
            raise ConfigError(
                f"{what} keeps the budget but not {constraints.text}; use {known}, or leave the "
                "side constraints out"
            )


EVOLUTION = "evolution"
"""The allocator that needs true evaluations; see `alphaquant.search.evolution`."""

ALL_ALLOCATORS = "all"
"""In `--allocators`: every one whose inputs were measured, but for those that are covered."""


def uniform_fits(space: SearchSpace, format_name: str) -> bool:
    """Whether one format for everything is within the budget and loads for every unit."""
    fmt = parse_format(format_name)
    within = space.inventory.storage_bits(fmt) <= space.limit_bits
    return within and is_uniform_loadable(space, format_name)


def is_uniform_loadable(space: SearchSpace, format_name: str) -> bool:
    """Whether one format for everything loads for every unit, whatever the budget."""
    fmt = parse_format(format_name)
    return all(is_loadable(unit, fmt, space.profile) for unit in space.units)
