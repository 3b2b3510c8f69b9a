"""Tiny random allocations with side constraints, and their optimum by trying every choice.

It counts bits, formats and means on its own, so that the solver is not compared with itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.problem import Problem, make_problem
from alphaquant.search.side.constraints import SideConstraints
from alphaquant.spaces.units import Matrix, Unit


@dataclass(frozen=True, eq=False)
class TinyCase:
    """One allocation that at least one choice solves.

    Attributes:
        problem: 2 to 7 units in up to 3 layers, up to 4 formats.
        cost: float64 [U, F].
        active_share: float64 [U], 1 outside routed experts.
        limit_bits: the budget.
        constraints: none, one, two or three; often tight.
    """

    problem: Problem
    cost: FloatArray
    active_share: FloatArray
    limit_bits: int
    constraints: SideConstraints

    def keeps(self, choice: IntArray) -> bool:
        """Whether a choice [U] keeps the budget and all side constraints."""
        facts, asked = measure(self, choice), self.constraints
        return (
            bool(self.problem.allowed[np.arange(len(choice)), choice].all())
            and facts.n_bits <= self.limit_bits
            and facts.max_formats <= (asked.max_formats_per_layer or facts.max_formats)
            and facts.layer_minimum >= (asked.layer_minimum_bits or 0.0) * (1 - 1e-12)
            and facts.active_bits <= (asked.active_bits or np.inf) * (1 + 1e-12)
        )

    def optimum(self) -> float:
        """The least cost of all choices that keep everything; infinite where none does."""
        rows = np.arange(len(self.cost))
        costs = (float(self.cost[rows, c].sum()) for c in _choices(self.problem) if self.keeps(c))
        return min(costs, default=np.inf)


@dataclass(frozen=True)
class Facts:
    """What side constraints count, of one choice."""

    n_bits: int
    max_formats: int
    layer_minimum: float
    active_bits: float


def measure(case: TinyCase, choice: IntArray) -> Facts:
    """Count a choice [U] out."""
    units = case.problem.units
    bits = case.problem.bits[np.arange(len(units)), choice].tolist()
    formats: dict[int, set[int]] = {}
    stored: dict[int, int] = {}
    weights: dict[int, int] = {}
    for unit, n_bits, column in zip(units, bits, choice.tolist(), strict=True):
        stored[unit.layer] = stored.get(unit.layer, 0) + n_bits
        weights[unit.layer] = weights.get(unit.layer, 0) + unit.n_weights
        if unit.kind == "expert":
            formats.setdefault(unit.layer, set()).add(column)
    return Facts(
        sum(bits),
        max((len(columns) for columns in formats.values()), default=0),
        min(stored[layer] / weights[layer] for layer in stored),
        sum(b * share for b, share in zip(bits, case.active_share.tolist(), strict=True)),
    )


def tiny_case(seed: int) -> TinyCase:
    """A case whose constraints are those of a random choice, so that it has a solution."""
    rng = np.random.default_rng(seed)
    n_units, n_formats = int(rng.integers(2, 8)), int(rng.integers(1, 5))
    shape, n_layers = (n_units, n_formats), int(rng.integers(1, 4))
    kinds = rng.choice(["expert", "expert", "attention"], n_units).tolist()
    layers = np.sort(rng.integers(0, n_layers, n_units)).tolist()
    rows = (8 * rng.integers(1, 4, n_units)).tolist()
    units = [
        Unit(f"unit{i}", (Matrix(f"unit{i}", rows[i], 8, kinds[i], layers[i]),))
        for i in range(n_units)
    ]
    allowed = rng.random(shape) < 0.85
    allowed[np.arange(n_units), rng.integers(0, n_formats, n_units)] = True
    cost = rng.choice([rng.random(shape) * 10, rng.integers(0, 6, shape).astype(np.float64)])
    problem = make_problem(
        units,
        [f"format{f}" for f in range(n_formats)],
        rng.integers(16, 80, shape) * np.array(rows)[:, None],
        allowed,
        {"fisher": cost, "error": cost},
        np.ones(n_units),
        n_layers,
    )
    is_expert = np.array([kind == "expert" for kind in kinds])
    share = np.where(is_expert, rng.random(n_units), 1.0)
    return _constrained(TinyCase(problem, cost, share, 1, SideConstraints()), rng)


def _constrained(case: TinyCase, rng: np.random.Generator) -> TinyCase:
    """The case with the budget and some of the constraints that a random choice just keeps."""
    choice = np.array([rng.choice(np.flatnonzero(row)) for row in case.problem.allowed])
    facts, given = measure(case, choice), rng.random(3) < 0.6
    constraints = SideConstraints(
        max(1, facts.max_formats) if given[0] else None,
        facts.layer_minimum if given[1] else None,
        int(np.ceil(facts.active_bits)) if given[2] else None,
    )
    limit_bits = facts.n_bits + int(rng.integers(0, 30))
    return replace(case, limit_bits=limit_bits, constraints=constraints)


def _choices(problem: Problem) -> Iterator[IntArray]:
    options = [np.flatnonzero(row) for row in problem.allowed]
    return (np.array(choice, dtype=np.int64) for choice in product(*options))
