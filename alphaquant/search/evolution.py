"""Evolution on true evaluations, as EvoPress does it: a baseline, and no allocator.

An allocator needs costs only; this needs a model that is evaluated again and again, so it takes a
function instead of tables. One parent; each generation has some offspring, which are mutated by
level switches and selected in rounds: all of them on a few windows, the best of those on more, the
last ones on all windows together with the parent, of whom the better is the next parent.

Where it follows EvoPress: one parent, few switches per mutation (the smaller of two draws from 1
to 3), distinct offspring, selection on growing data with the parent in the last round alone. For
layers of different sizes EvoPress raises some and then lowers drawn ones until the budget holds.
So it is here, but a raised unit is not lowered again, and nothing is lowered where the budget
holds anyway, which takes back the bits that earlier mutations left over.

Where it generalizes: levels are the stored bits of a unit's formats, see
`alphaquant.search.levels`; the start is the highest common level that fits (there a uniform
width) and drawn units a level higher, up to the budget; rounds use the first windows instead of
drawn ones, so that scores of different generations compare and none is measured twice.

Source: Sieberling et al., EvoPress, arXiv 2410.14649, algorithms 1 and 2; its
evo_quant_search.py, group rule "none".
Letters: U units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alphaquant.errors import ConfigError
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.levels import Levels, make_levels
from alphaquant.search.problem import Problem

Evaluate = Callable[[IntArray, int], float]
"""A choice, int64 [U], and n: its mean loss on the first n windows; less is better."""

_MAX_TRIES = 20
"""Mutations tried per offspring: in a small problem all neighbours may be in the generation."""


@dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of the search.

    Attributes:
        n_offspring: per generation.
        survivors: of each round, falling, the last is 1.
        windows: of each round, rising; the last are all that is compared on.
        max_switches: of one mutation.
    """

    n_offspring: int = 16
    survivors: tuple[int, ...] = (4, 2, 1)
    windows: tuple[int, ...] = (4, 16, 64)
    max_switches: int = 3

    def __post_init__(self) -> None:
        """Refuse rounds that do not narrow.

        Raises:
            ConfigError: see the attributes.
        """
        alive = (self.n_offspring, *self.survivors)
        seen = (0, *self.windows)
        is_possible = (
            len(alive) == len(seen)
            and alive[-1] == 1
            and len(alive) > 1
            and all(a >= b for a, b in zip(alive, alive[1:], strict=False))
            and all(a < b for a, b in zip(seen, seen[1:], strict=False))
            and self.max_switches > 0
        )
        if not is_possible:
            raise ConfigError(
                f"{self}: give as many rising window counts as falling survivor counts, the last "
                "survivor count 1, at least as many offspring as survivors, and max_switches >= 1"
            )

    @property
    def generation_cost(self) -> float:
        """Full evaluations of one generation: each counts by its share of all windows."""
        runs = zip((self.n_offspring, *self.survivors), self.windows, strict=False)
        return sum(n_choices * n_windows for n_choices, n_windows in runs) / self.windows[-1]


@dataclass(frozen=True, eq=False)
class Evolution:
    """What a search found.

    Attributes:
        choice: int64 [U], the best that was evaluated on all windows.
        loss: its loss on all windows.
        bits: its stored bits.
        n_evaluations: full evaluations that were spent.
        losses: float64 [generations + 1], the parent's loss at the start and after each.
    """

    choice: IntArray
    loss: float
    bits: int
    n_evaluations: float
    losses: FloatArray


class _Meter:
    """Evaluates choices, remembers them and counts the windows."""

    def __init__(self, evaluate: Evaluate, levels: Levels) -> None:
        self._evaluate, self._levels = evaluate, levels
        self._known: dict[tuple[bytes, int], float] = {}
        self.n_windows = 0

    def best(self, population: list[IntArray], n_windows: int, n_best: int) -> list[IntArray]:
        """The members of least loss, the first of equals."""
        losses = [self.loss(member, n_windows) for member in population]
        order = np.argsort(losses, kind="stable")[:n_best]
        return [population[i] for i in order]

    def loss(self, positions: IntArray, n_windows: int) -> float:
        """Loss of positions [U] on the first windows."""
        key = (positions.tobytes(), n_windows)
        if key not in self._known:
            self._known[key] = self._evaluate(self._levels.choice(positions), n_windows)
            self.n_windows += n_windows
        return self._known[key]


def evolve(
    problem: Problem,
    limit_bits: int,
    seed: int,
    evaluate: Evaluate,
    n_evaluations: float,
    settings: EvolutionSettings = EvolutionSettings(),
) -> Evolution:
    """Search choices by their true loss.

    There are as many whole generations as fit into `n_evaluations` after the first parent's one.

    Args:
        problem: units, allowed formats, bits; Fisher costs decide between formats of equal bits.
        limit_bits: total bits that a choice may take.
        seed: of the mutations.
        evaluate: the true loss; called with equal arguments once at most.
        n_evaluations: full evaluations to spend at most, at least 1; one on n of N windows counts
            n/N.
        settings: sizes.

    Raises:
        BudgetError: the limit is below the cheapest choice.
        ConfigError: no evaluation at all is given.
    """
    problem.check_limit(limit_bits)
    if n_evaluations < 1:
        raise ConfigError(f"{n_evaluations} evaluations; give at least 1, for the first choice")
    rng = np.random.default_rng(seed)
    levels = make_levels(problem, np.arange(len(problem.units)))
    meter, all_windows = _Meter(evaluate, levels), settings.windows[-1]
    parent = levels.fill(np.zeros(len(problem.units)), limit_bits)
    parent = top_up(levels, parent, limit_bits, rng)
    losses = [meter.loss(parent, all_windows)]
    for _ in range(int((n_evaluations - 1) / settings.generation_cost)):
        population = _offspring(levels, parent, limit_bits, settings, rng)
        if not population:
            break
        for n_survivors, n_windows in zip(settings.survivors, settings.windows, strict=True):
            rivals = [parent, *population] if n_windows == all_windows else population
            population = meter.best(rivals, n_windows, n_survivors)
        parent = population[0]
        losses.append(meter.loss(parent, all_windows))
    return Evolution(
        levels.choice(parent),
        losses[-1],
        levels.total_bits(parent),
        meter.n_windows / all_windows,
        np.array(losses),
    )


def top_up(
    levels: Levels, positions: IntArray, limit_bits: int, rng: np.random.Generator
) -> IntArray:
    """Lift drawn units by a level as long as one fits: budgets lie between uniform formats.

    Args:
        levels: of all units.
        positions: int64 [U], within the limit.
        limit_bits: total that the result may take.
        rng: of the units that are drawn.

    Returns:
        int64 [U], from which no unit can rise within the limit.
    """
    filled, rows = positions.copy(), np.arange(len(positions))
    while True:
        spare = limit_bits - levels.total_bits(filled)
        above = np.minimum(filled + 1, levels.n_levels - 1)
        extra = levels.bits[rows, above] - levels.bits[rows, filled]
        can_rise = np.flatnonzero((filled + 1 < levels.n_levels) & (extra <= spare))
        if not can_rise.size:
            return filled
        filled[rng.choice(can_rise)] += 1


def switch_levels(
    levels: Levels,
    positions: IntArray,
    limit_bits: int,
    n_switches: int,
    rng: np.random.Generator,
) -> IntArray | None:
    """A mutation: per switch one unit up a level, and others down until the limit holds.

    A unit that went up in this mutation does not go down again.

    Args:
        levels: of all units.
        positions: int64 [U], within the limit.
        limit_bits: total that the result may take.
        n_switches: how often.
        rng: of the units that are drawn.

    Returns:
        int64 [U], new positions; None if nothing can go up, or not enough can go down.
    """
    mutated = positions.copy()
    is_raised = np.zeros(len(positions), dtype=np.bool_)
    for _ in range(n_switches):
        can_rise = np.flatnonzero(mutated + 1 < levels.n_levels)
        if not can_rise.size:
            return None
        raised = rng.choice(can_rise)
        mutated[raised] += 1
        is_raised[raised] = True
        while levels.total_bits(mutated) > limit_bits:
            can_fall = np.flatnonzero((mutated > 0) & ~is_raised)
            if not can_fall.size:
                return None
            mutated[rng.choice(can_fall)] -= 1
    return mutated


def _offspring(
    levels: Levels,
    parent: IntArray,
    limit_bits: int,
    settings: EvolutionSettings,
    rng: np.random.Generator,
) -> list[IntArray]:
    """Distinct mutations of the parent; fewer than asked for where the problem has not as many."""
    found: dict[bytes, IntArray] = {}
    for _ in range(settings.n_offspring * _MAX_TRIES):
        if len(found) == settings.n_offspring:
            break
        n_switches = int(rng.integers(1, settings.max_switches + 1, 2).min())
        mutated = switch_levels(levels, parent, limit_bits, n_switches, rng)
        if mutated is not None and not np.array_equal(mutated, parent):
            found[mutated.tobytes()] = mutated
    return list(found.values())
