"""Which trials a study runs: what is planned first, and from parameters to an assignment.

Planned, in this order: every uniform format of the menu within the budget (so that the study never
ends below uniform), the default knobs, the allocators, the default knobs at several budgets (so
that there is a front early). Then the sampler proposes knobs; three of four proposals are pinned
to the full budget, the fourth may spend less and fills the front.

Every trial is feasible by construction: its assignment comes from the solver with the budget as
its limit, or is uniform and fits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import optuna

from alphaquant.search.allocators import ALLOCATORS
from alphaquant.search.knobs import Knobs, allocate, knob_params, suggest_knobs
from alphaquant.search.problem import Problem
from alphaquant.search.sampler import PlannedTrial
from alphaquant.spaces.assignment import Assignment, assignment_from_units, uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import is_loadable
from alphaquant.spaces.space import SearchSpace

PLANNED_ALLOCATORS = ("fisher", "error", "utilization")
N_FRONT_LEVELS = 6
FREE_EVERY = 4
UNIFORM = "uniform:"
"""Start of the origin of uniform trials."""


@dataclass(frozen=True)
class Proposal:
    """A trial's assignment and where it comes from.

    Attributes:
        assignment: a format for every matrix.
        origin: `uniform:int4-g64`, `allocator:error`, `knobs`.
        gap: the solver's certified relative gap in its own cost, None for uniform.
    """

    assignment: Assignment
    origin: str
    gap: float | None


@dataclass(frozen=True)
class TrialRules:
    """Everything that turns trials into assignments.

    Attributes:
        space: units, menu, budget.
        problem: their costs.
        seed: of random allocators.
    """

    space: SearchSpace
    problem: Problem
    seed: int

    @property
    def bits_high(self) -> float:
        """Bits per weight of the budget, or of the dearest assignment where that is less."""
        dearest = self.problem.bits.max(1, where=self.problem.allowed, initial=0).sum()
        return self._mean_of(min(self.space.limit_bits, int(dearest)))

    @property
    def bits_low(self) -> float:
        """Bits per weight of the cheapest assignment."""
        masked = np.where(self.problem.allowed, self.problem.bits, np.iinfo(np.int64).max)
        return self._mean_of(int(masked.min(1).sum()))

    def planned(self) -> list[PlannedTrial]:
        """The trials that run before anything is sampled."""
        fits = [name for name in self.space.menu if uniform_fits(self.space, name)]
        plan = [PlannedTrial({}, {"plan": "uniform", "format": name}) for name in fits]
        plan.append(PlannedTrial(knob_params(Knobs(self.bits_high)), {"plan": "knobs"}))
        for name in PLANNED_ALLOCATORS:
            plan.append(PlannedTrial({}, {"plan": "allocator", "allocator": name}))
        levels = np.linspace(self.bits_low, self.bits_high, N_FRONT_LEVELS + 2)[1:-1]
        for bits in levels[::-1]:
            plan.append(PlannedTrial(knob_params(Knobs(float(bits))), {"plan": "knobs"}))
        return plan

    def pin(self, n_complete: int) -> Mapping[str, float]:
        """Parameters fixed for a sampled trial."""
        return {} if n_complete % FREE_EVERY == 0 else {"bits": self.bits_high}

    def propose(self, trial: optuna.Trial) -> Proposal:
        """The assignment of a trial; suggests its knobs where it has any."""
        attrs = trial.user_attrs
        if attrs.get("plan") == "uniform":
            name = str(attrs["format"])
            return Proposal(uniform_assignment(self.space.inventory, name), UNIFORM + name, None)
        if attrs.get("plan") == "allocator":
            name = str(attrs["allocator"])
            solution = ALLOCATORS[name].allocate(self.problem, self.space.limit_bits, self.seed)
            return Proposal(self._spread(solution.choice), f"allocator:{name}", solution.gap)
        knobs = suggest_knobs(trial, self.bits_low, self.bits_high)
        solution = allocate(self.problem, knobs, self.space.limit_bits)
        return Proposal(self._spread(solution.choice), "knobs", solution.gap)

    def _mean_of(self, n_bits: int) -> float:
        """The mean per weight that allows `n_bits`; the plain quotient may allow one bit less."""
        mean = n_bits / self.space.inventory.n_weights
        return mean if self.problem.limit_bits(mean) >= n_bits else math.nextafter(mean, math.inf)

    def _spread(self, choice: npt.NDArray[np.int64]) -> Assignment:
        names = self.problem.choice_names(choice)
        return assignment_from_units(self.space.inventory, self.space.units, names)


def uniform_fits(space: SearchSpace, format_name: str) -> bool:
    """Whether one format for everything is within the budget and loads for every unit."""
    fmt = parse_format(format_name)
    within = space.inventory.storage_bits(fmt) <= space.limit_bits
    return within and all(is_loadable(unit, fmt, space.profile) for unit in space.units)


def uniform_bits(space: SearchSpace, format_name: str) -> float:
    """Stored bits per quantizable weight of one format for everything."""
    return space.inventory.storage_bits(parse_format(format_name)) / space.inventory.n_weights
