"""The program of a search: which trials, in which order.

    uniform      the uniform formats that can win: a study never ends below uniform
    candidates   the checkpoints of --candidates as they are, of those that fit
    default      the theory's knobs at the budget
    allocators   those that were asked for, published and plain ones
    sizes        the default knobs at sizes over the whole menu: a front early
    probe        random assignments, measured on part of the text: do the costs rank as the truth?
    knobs        an Optuna sampler moves the allocator's knobs, or
    groups       an Optuna sampler chooses a format per group of units

All but the sampled ones are known before any is run, and are measured together
(`alphaquant.studies.rounds`), as are those of the probe.

Sampling ends where `alphaquant.studies.stopping` finds that more is not worth it. Each step is
deterministic given the trials before it and what was measured, so running the program again
repeats a search without running the model. What a step finds is its trials, in the loop, and what
it returns.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.progress import Stage, StageClock
from alphaquant.search.allocators import ALLOCATORS, available
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.evolution import EvolutionSettings, evolve
from alphaquant.search.groups import make_groups
from alphaquant.search.knobs import Knobs, knob_params
from alphaquant.search.problem import Problem
from alphaquant.search.sampler import PlannedTrial
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.gate.winner import best_of
from alphaquant.studies.loop import Proposal, TrialLoop
from alphaquant.studies.result import Probe, front_of
from alphaquant.studies.sizing import effort_of
from alphaquant.studies.stopping import outlook, stagnation
from alphaquant.studies.store.study import TrialRow
from alphaquant.studies.trials import (
    ALL_ALLOCATORS,
    EVOLUTION,
    Proposer,
    constraints_of,
    uniform_fits,
)
from alphaquant.studies.truth import ChoiceTruth

logger = logging.getLogger(__name__)

N_UNIFORM = 3
"""Uniform formats at most."""

FREE_EVERY = 4

_COVERED = ("uniform", "random", "blend")
"""Allocators that other steps stand for: uniform formats, the probe, the default knobs."""


@dataclass(frozen=True)
class Run:
    """What the steps of a program share; none of them changes it.

    Attributes:
        spec: what was asked.
        proposer: rules to assignments.
        loop: runs trials.
        truth: measures choices outside of trials.
        clock: told the step that runs.
    """

    spec: SearchSpec
    proposer: Proposer
    loop: TrialLoop
    truth: ChoiceTruth
    clock: StageClock

    @property
    def problem(self) -> Problem:
        """The allocation problem."""
        return self.proposer.problem

    def fixed(self, proposal: Proposal | None) -> None:
        """A trial whose assignment is known; nothing for None."""
        if proposal is not None:
            plan = PlannedTrial({}, {"origin": proposal.origin})
            self.loop.run(lambda trial: proposal, plan)

    def best(self) -> TrialRow:
        """The best trial within the budget, see `best_of`."""
        return best_of(self.within_budget())

    def within_budget(self) -> list[TrialRow]:
        """The trials so far of at most the budget's bits."""
        limit = self.proposer.limit_bits / self.proposer.space.inventory.n_weights
        return [row for row in self.loop.rows if row.bits_per_weight <= limit]


@dataclass(frozen=True)
class Findings:
    """What a program found besides its trials.

    Attributes:
        stopped: why there were no more trials, a sentence without an end.
        probe: how well the costs rank; None where no trial was left to run after it.
    """

    stopped: str
    probe: Probe | None = None


def run_program(run: Run) -> Findings:
    """All steps of a search."""
    measure_planned(run)
    run_uniform(run)
    run_candidates(run)
    if run.spec.proposals.allocator is not None:
        run_named_allocator(run)
        return Findings(run.loop.limit_reason or "--allocator has no further trials")
    run_default(run)
    run_allocators(run)
    run_sizes(run)
    probe = run_probe(run)
    stopped = run_groups(run) if run.spec.proposals.mode == "groups" else run_knobs(run)
    return Findings(stopped, probe)


def measure_planned(run: Run) -> None:
    """Measure all trials that are known before any is run together; they find it in the log.

    Not with a timeout: trials that start before it is over are known one by one only.
    """
    if run.spec.run.timeout is not None:
        return
    planned = [None if p is None else p.assignment for p in _planned(run)]
    open_ = planned[run.loop.n_stored : run.loop.most_trials]
    assignments = [assignment for assignment in open_ if assignment is not None]
    run.loop.objective.measure_together(
        assignments, tell=lambda done, total: run.clock(Stage.PLANNED, done, total)
    )


def _planned(run: Run) -> Iterator[Proposal | None]:
    """What the steps before the probe propose, in their order; None for what is measured first."""
    yield from _uniform(run)
    yield from _candidates(run)
    named = run.spec.proposals.allocator
    if named is not None:
        yield None if named == EVOLUTION else run.proposer.allocator(named)
        return
    yield run.proposer.of_knobs(Knobs(run.proposer.bits_high))
    for name in _allocators(run):
        if name == EVOLUTION:
            yield None
        elif (proposal := run.proposer.allocator(name)) is not None:
            yield proposal
    yield from _sizes(run)


def run_uniform(run: Run) -> None:
    """The uniform formats that can win: of those that fit, the ones of least predicted cost."""
    for proposal in _uniform(run):
        run.fixed(proposal)


def _uniform(run: Run) -> Iterator[Proposal]:
    space, predicted = run.proposer.space, run.proposer.base_cost.sum(axis=0)
    fitting = [
        column
        for column, name in enumerate(space.menu)
        if uniform_fits(space, name) and run.proposer.keeps_uniform(name)
    ]
    for column in sorted(sorted(fitting, key=lambda column: predicted[column])[:N_UNIFORM]):
        proposal = run.proposer.uniform(space.menu[column])
        if proposal is not None:
            yield proposal


def run_candidates(run: Run) -> None:
    """Every candidate as it is that fits: a study never ends below them."""
    for proposal in _candidates(run):
        run.fixed(proposal)


def _candidates(run: Run) -> Iterator[Proposal]:
    for directory in run.spec.limits.candidate_names:
        proposal = run.proposer.candidate(directory)
        if proposal is not None:
            yield proposal


def run_default(run: Run) -> None:
    """The default knobs at the budget; an enqueued trial, so that samplers learn from it."""
    _enqueue_knobs(run, run.proposer.bits_high)


def run_allocators(run: Run) -> None:
    """The allocators of `--allocators`; `all` is those that no other step covers."""
    for name in _allocators(run):
        if run.loop.is_over:
            return
        proposal = _evolve(run) if name == EVOLUTION else run.proposer.allocator(name)
        if proposal is None:
            kept = constraints_of(run.spec.limits).text
            logger.warning("allocator %s is left out: its choice does not keep %s", name, kept)
        run.fixed(proposal)


def _allocators(run: Run) -> tuple[str, ...]:
    names = run.spec.proposals.allocator_names
    if names == (ALL_ALLOCATORS,):
        return tuple(n for n in available(run.problem) if n not in _COVERED)
    return names


def run_named_allocator(run: Run) -> None:
    """The one allocator that was asked for.

    Raises:
        ConfigError: its choice does not keep the side constraints.
    """
    name = run.spec.proposals.allocator
    assert name is not None, "this step is that of --allocator"
    proposal = _evolve(run) if name == EVOLUTION else run.proposer.allocator(name)
    if proposal is None:
        raise ConfigError(
            f"allocator {name} knows the budget only, and its choice does not keep "
            f"{constraints_of(run.spec.limits).text}; leave --allocator or the side constraints "
            "out"
        )
    run.fixed(proposal)


def run_sizes(run: Run) -> None:
    """The default knobs at sizes from the smallest to the largest of the menu."""
    for proposal in _sizes(run):
        run.fixed(proposal)


def _sizes(run: Run) -> Iterator[Proposal]:
    for limit_bits in _front_limits(run):
        proposal = _at_or_none(run, run.proposer.base_cost, limit_bits, "size")
        if proposal is not None:
            yield proposal


def run_probe(run: Run) -> Probe | None:
    """Random assignments at the budget: the rank correlation of costs and truth.

    Returns:
        None where no trial is left to run, and where the effort has none.
    """
    effort = effort_of(run.spec)
    n_probes = effort.n_probes
    if run.loop.is_over or not n_probes:
        return None
    run.clock(Stage.PROBE, 0, n_probes)
    choices, limit = [], run.proposer.limit_bits
    for i in range(n_probes):
        seed = int(np.random.SeedSequence((run.spec.proposals.seed, i)).generate_state(1)[0])
        choices.append(ALLOCATORS["random"].allocate(run.problem, limit, seed).choice)
    seq_len = run.spec.texts.seq_len
    assert seq_len is not None, "sizes are closed before a program runs"
    n_windows = min(-(-effort.probe_tokens // seq_len), run.truth.n_windows)
    run.truth.measure_together(
        choices,
        n_windows,
        lambda done, total: run.clock(Stage.PROBE, n_probes * done // total, n_probes),
    )
    measured = [float(run.truth.measure(choice, n_windows).mean()) for choice in choices]
    run.clock(Stage.PROBE, n_probes, n_probes)
    tables = {**run.problem.costs, "default": run.proposer.base_cost}
    rows = np.arange(len(run.problem.units))
    return Probe(
        n_probes,
        n_windows,
        {
            name: rank_correlation([float(t[rows, c].sum()) for c in choices], measured)
            for name, t in tables.items()
        },
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of as many numbers, NaN where one of the two is constant."""
    if min(len(set(first)), len(set(second))) < 2:
        return math.nan
    return float(spearmanr(first, second).statistic)


def _front_limits(run: Run) -> list[int]:
    """Total bits at sizes over the whole menu, the largest first, both ends left out."""
    low, most = run.proposer.bits_low, run.proposer.bits_most
    sizes = np.linspace(low, most, effort_of(run.spec).n_front_sizes + 2)[-2:0:-1]
    return [run.problem.limit_bits(float(bits)) for bits in sizes]


def _at_or_none(run: Run, cost: FloatArray, limit_bits: int, origin: str) -> Proposal | None:
    """The optimum within a limit; None where the side constraints leave nothing at this size."""
    try:
        return run.proposer.at(cost, limit_bits, origin)
    except BudgetError:
        if not run.proposer.is_constrained:
            raise
        return None


def run_knobs(run: Run) -> str:
    """Sampled knobs to the end; three of four at the full budget, the fourth fills the front.

    With side constraints all are at the full budget: smaller ones may leave nothing.

    Returns:
        Why it is the end.
    """
    pinned = {"bits": run.proposer.bits_high}
    sampled: list[TrialRow] = []
    while (reason := _end_of(run, sampled)) is None:
        is_free = len(run.loop.rows) % FREE_EVERY == 0 and not run.proposer.is_constrained
        params = {} if is_free else pinned
        row = run.loop.run(run.proposer.knobs, PlannedTrial(params, {"origin": "knobs"}))
        if row is not None and not is_free:
            sampled.append(row)
    return reason


def run_groups(run: Run) -> str:
    """Sampled formats per group to the end, from the optimum of the additive costs on.

    Returns:
        Why it is the end.
    """
    groups = make_groups(run.problem, run.spec.proposals.grouping)
    top = {n: len(o) - 1 for n, o in zip(groups.names, groups.options, strict=True)}
    params: Mapping[str, float] = dict(top)  # all open: the solver decides
    sampled: list[TrialRow] = []
    while (reason := _end_of(run, sampled)) is None:
        plan = PlannedTrial(params, {"origin": "groups"})
        row = run.loop.run(lambda trial: run.proposer.groups(trial, groups), plan)
        if row is not None and not params:
            sampled.append(row)
        params = {}
    return reason


def _end_of(run: Run, sampled: Sequence[TrialRow]) -> str | None:
    """Why no further trial is sampled; None where one is.

    Rules are asked where no number of trials was given, and not before every trial of earlier runs
    was handed back.
    """
    if run.loop.is_over:
        return run.loop.limit_reason
    if not run.loop.is_open or not run.loop.is_all_new:
        return None
    objectives = run.loop.scorer.plan.objectives
    if objectives:
        front = {row.number for row in front_of(run.loop.rows, objectives)}
        return stagnation([row.number in front for row in sampled])
    found = outlook(sampled, run.within_budget())
    return found.text if found is not None and found.is_over else None


def _enqueue_knobs(run: Run, bits: float) -> None:
    plan = PlannedTrial(knob_params(Knobs(bits)), {"origin": "knobs"})
    run.loop.run(run.proposer.knobs, plan)


def _evolve(run: Run) -> Proposal:
    n_windows, n_passes, n_measured = run.truth.n_windows, run.loop.most_trials, 0

    def measure(choice: IntArray, n: int) -> float:
        nonlocal n_measured
        run.clock(Stage.EVOLUTION, min(n_measured // n_windows, n_passes), n_passes)
        n_measured += n
        return float(run.truth.measure(choice, n).mean())

    rounds = tuple(max(1, n_windows // part) for part in (8, 2, 1))
    found = evolve(
        run.problem,
        run.proposer.limit_bits,
        run.spec.proposals.seed,
        measure,
        n_passes,
        EvolutionSettings(windows=rounds),
    )
    run.clock(Stage.EVOLUTION, n_passes, n_passes)
    return Proposal(run.proposer.spread(found.choice), "allocator:" + EVOLUTION)
