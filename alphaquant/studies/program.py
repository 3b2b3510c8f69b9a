"""The program of a search: which trials, in which order.

    uniform      every uniform format of the menu that fits: a study never ends below uniform
    default      the theory's knobs at the budget
    allocators   published and plain ones, where their inputs were measured
    levels       the default knobs at sizes over the whole menu: a front early
    probe        random assignments, measured on part of the text: do the costs rank as the truth?
    sweep        lazy greedy steps between blocks on the true divergence, for all sizes; by default
                 only where the probe finds that the costs are not to be trusted
    surrogate    the costs, corrected per group by all that was measured so far
    relinearize  costs measured anew at the best assignment so far
    polish       exchanges of two units around the best, proposed by a surrogate
    knobs        an Optuna sampler moves the allocator's knobs
    groups       an Optuna sampler chooses a format per group of units

A mode is a list of these. Each one is deterministic given the trials before it and what was
measured, so running the program again repeats a search without running the model.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from scipy.stats import spearmanr

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.evaluators.anchor import AnchorCosts
from alphaquant.search.allocators import ALLOCATORS, available
from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.search.blocks import BlockGrid, make_blocks
from alphaquant.search.evolution import EvolutionSettings, evolve
from alphaquant.search.groups import make_groups
from alphaquant.search.knobs import Knobs, knob_params
from alphaquant.search.polish import PolishSettings, polish
from alphaquant.search.problem import Problem
from alphaquant.search.sampler import PlannedTrial
from alphaquant.search.surrogate import fit_group_weights
from alphaquant.search.sweep import SweepPoint, SweepSettings, sweep
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.loop import Proposal, TrialLoop
from alphaquant.studies.progress import StageClock
from alphaquant.studies.result import Probe
from alphaquant.studies.spec import SearchSpec
from alphaquant.studies.storage import TrialRow
from alphaquant.studies.trials import EVOLUTION, Proposer, uniform_fits
from alphaquant.studies.truth import ChoiceTruth
from alphaquant.studies.winner import best_of

logger = logging.getLogger(__name__)

N_FRONT_LEVELS = 8
N_PROBES = 30
PROBE_WINDOWS = 16
N_SWEEP_LEVELS = 12
SWEEP_BELOW = 0.9
"""Rank correlation of costs and truth below which a search sweeps by itself."""
UPWARD_BELOW = 2.5
"""Bits per weight of the budget up to which it also sweeps upward."""
N_RELINEARIZATIONS = 2
FREE_EVERY = 4

MeasureAnchor = Callable[[Assignment], AnchorCosts]
"""What it costs to change any unit of a quantized anchor."""


@dataclass
class Run:
    """What the steps of a program share.

    Attributes:
        spec: what was asked.
        proposer: rules to assignments.
        loop: runs trials.
        truth: measures choices outside of trials.
        anchor_costs: costs at a quantized anchor.
        clock: told the step that runs.
        weights: float64 [U], what a sweep found costs to be worth; 1 without one.
        sweep: states of the sweep, both directions, by bits.
        probe: the rank correlation of the costs.
    """

    spec: SearchSpec
    proposer: Proposer
    loop: TrialLoop
    truth: ChoiceTruth
    anchor_costs: MeasureAnchor
    clock: StageClock
    weights: FloatArray = field(default_factory=lambda: np.ones(0))
    sweep: tuple[SweepPoint, ...] = ()
    probe: Probe | None = None

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
        limit = self.proposer.limit_bits / self.proposer.space.inventory.n_weights
        return best_of([r for r in self.loop.rows if r.bits_per_weight <= limit])

    def best_choice(self) -> IntArray:
        """The best trial's choice; of those in formats of the menu."""
        choice = self.proposer.choice(self.loop.assignment(self.best()))
        assert choice is not None, "trials take formats of the menu"
        return choice

    def surrogate(self) -> FloatArray:
        """The base cost corrected by all trials so far, float64 [U, F]."""
        pairs = [(self.proposer.choice(self.loop.assignment(r)), r) for r in self.loop.rows]
        known = [(c, r.kl) for c, r in pairs if c is not None and not r.is_pruned]
        cost = self.proposer.base_cost
        choices = np.stack([c for c, _ in known])
        kl = np.array([value for _, value in known])
        return cost * fit_group_weights(self.problem, cost, choices, kl)[:, None]


Step = Callable[[Run], None]


def run_uniform(run: Run) -> None:
    """Every uniform format of the menu that fits the budget."""
    space = run.proposer.space
    for name in space.menu:
        if uniform_fits(space, name):
            run.fixed(run.proposer.uniform(name))


def run_default(run: Run) -> None:
    """The default knobs at the budget; an enqueued trial, so that samplers learn from it."""
    _enqueue_knobs(run, run.proposer.bits_high)


def run_allocators(run: Run) -> None:
    """Every allocator whose inputs were measured, but for those that other steps cover."""
    for name in available(run.problem):
        if name in ("uniform", "random", "blend"):
            continue
        proposal = run.proposer.allocator(name)
        if proposal is None:
            kept = run.spec.constraints.text
            logger.warning("allocator %s is left out: its choice does not keep %s", name, kept)
        run.fixed(proposal)


def run_named_allocator(run: Run) -> None:
    """The one allocator that was asked for.

    Raises:
        ConfigError: its choice does not keep the side constraints.
    """
    name = run.spec.allocator
    assert name is not None, "this program is that of --allocator"
    proposal = _evolve(run) if name == EVOLUTION else run.proposer.allocator(name)
    if proposal is None:
        raise ConfigError(
            f"allocator {name} knows the budget only, and its choice does not keep "
            f"{run.spec.constraints.text}; leave --allocator or the side constraints out"
        )
    run.fixed(proposal)


def run_levels(run: Run) -> None:
    """The default knobs at sizes from the smallest to the largest of the menu."""
    for limit_bits in _front_limits(run):
        run.fixed(_at_or_none(run, run.proposer.base_cost, limit_bits, "level"))


def run_probe(run: Run) -> None:
    """Random assignments at the budget: the rank correlation of costs and truth."""
    if run.loop.is_over:
        return
    run.clock("probe", 0, N_PROBES)
    choices, limit = [], run.proposer.limit_bits
    for i in range(N_PROBES):
        seed = int(np.random.SeedSequence((run.spec.seed, i)).generate_state(1)[0])
        choices.append(ALLOCATORS["random"].allocate(run.problem, limit, seed).choice)
    measured = []
    n_windows = min(PROBE_WINDOWS, run.truth.n_windows)
    for done, choice in enumerate(choices):
        measured.append(float(run.truth.measure(choice, n_windows).mean()))
        run.clock("probe", done + 1, N_PROBES)
    tables = {**run.problem.costs, "default": run.proposer.base_cost}
    rows = np.arange(len(run.problem.units))
    run.probe = Probe(
        N_PROBES,
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


def run_sweep(run: Run) -> None:
    """A sweep in each direction; what it says at the budget and at the front's levels are trials.

    Upward only for budgets where many units are at their cheapest, which a greedy walk from the
    rich end reaches with the errors of all its steps.
    """
    if run.loop.is_over or not _wants_sweep(run):
        return
    proposer = run.proposer
    grid = make_blocks(run.problem, proposer.base_cost, N_SWEEP_LEVELS)
    directions = (1, -1) if proposer.bits_high <= UPWARD_BELOW else (1,)
    n_steps = len(directions) * len(grid.blocks) * (N_SWEEP_LEVELS - 1)
    run.clock("sweep", 0, n_steps)
    points: list[SweepPoint] = []
    for direction in directions:
        for point in sweep(grid, run.truth, direction, SweepSettings()):
            points.append(point)
            run.clock("sweep", min(len(points), n_steps), n_steps)
    run.sweep = tuple(sorted(points, key=lambda p: p.bits))
    run.clock("sweep", n_steps, n_steps)
    cost, limit = proposer.base_cost, proposer.limit_bits
    n_weights = float(run.problem.n_weights.sum())
    run.weights = sweep_weights(grid, run.sweep, limit, n_weights)
    run.fixed(proposer.at(cost * run.weights[:, None], limit, "sweep"))
    run.fixed(proposer.at(cost * np.sqrt(run.weights)[:, None], limit, "sweep"))
    for limit in _front_limits(run):
        weights = sweep_weights(grid, run.sweep, limit, n_weights)
        run.fixed(_at_or_none(run, cost * weights[:, None], limit, "sweep"))


def _front_limits(run: Run) -> list[int]:
    """Total bits at sizes over the whole menu, the largest first, both ends left out."""
    low, most = run.proposer.bits_low, run.proposer.bits_most
    sizes = np.linspace(low, most, N_FRONT_LEVELS + 2)[-2:0:-1]
    return [run.problem.limit_bits(float(bits)) for bits in sizes]


def _at_or_none(run: Run, cost: FloatArray, limit_bits: int, origin: str) -> Proposal | None:
    """The optimum within a limit; None where the side constraints leave nothing at this size."""
    try:
        return run.proposer.at(cost, limit_bits, origin)
    except BudgetError:
        if not run.proposer.is_constrained:
            raise
        return None


def _wants_sweep(run: Run) -> bool:
    """Whether to sweep: as asked, or where random assignments rank unlike their costs."""
    if run.spec.sweep != "auto":
        return run.spec.sweep == "always"
    return run.probe is not None and run.probe.spearman["default"] < SWEEP_BELOW


def sweep_weights(
    grid: BlockGrid, points: tuple[SweepPoint, ...], limit_bits: int, n_weights: float
) -> FloatArray:
    """What the sweep's best state near a size says costs are worth, float64 [U].

    Of the states next to the limit the one of least KL is taken; KL is compared at equal bits by a
    factor of 4 per bit per weight, what halving the rounding step is worth.

    Args:
        grid: blocks and prices of the sweep.
        points: its states, of both directions.
        limit_bits: the size.
        n_weights: weights of all units.
    """
    near = sorted(points, key=lambda p: abs(p.bits - limit_bits))[:4]

    def at_limit(point: SweepPoint) -> float:
        return float(point.kl.mean() * 4.0 ** ((point.bits - limit_bits) / n_weights))

    return grid.unit_weights(min(near, key=at_limit).levels, 1.0)


def run_surrogate(run: Run) -> None:
    """The optimum of the costs as all trials so far correct them."""
    if not run.loop.is_over:
        run.fixed(run.proposer.at(run.surrogate(), run.proposer.limit_bits, "surrogate"))


def run_relinearize(run: Run) -> None:
    """Costs measured anew at the best assignment; repeated while its optimum is better."""
    for round_ in range(N_RELINEARIZATIONS):
        if run.loop.is_over:
            return
        run.clock("relinearize", round_, N_RELINEARIZATIONS)
        before = run.best()
        cost = run.anchor_costs(run.loop.assignment(before)).change
        run.fixed(run.proposer.at(cost, run.proposer.limit_bits, "relinearize"))
        if run.best().digest == before.digest:
            break
    run.clock("relinearize", N_RELINEARIZATIONS, N_RELINEARIZATIONS)


def run_polish(run: Run) -> None:
    """Measured exchanges around the best assignment."""
    if run.loop.is_over or run.proposer.is_constrained:
        return
    settings = PolishSettings()
    run.clock("polish", 0, settings.n_evaluations)
    found = polish(
        run.problem,
        run.surrogate,
        _CountedTruth(run.truth, lambda n: run.clock("polish", n, settings.n_evaluations)),
        run.best_choice(),
        run.proposer.limit_bits,
        settings,
    )
    run.clock("polish", settings.n_evaluations, settings.n_evaluations)
    run.fixed(Proposal(run.proposer.spread(found.choice), "polish"))


@dataclass
class _CountedTruth:
    """The truth, told which candidate is measured.

    Attributes:
        truth: measures.
        tell: called with the candidates that were measured before, the start left out.
    """

    truth: ChoiceTruth
    tell: Callable[[int], None]
    _seen: set[bytes] = field(default_factory=set)

    @property
    def n_windows(self) -> int:
        """See `alphaquant.search.sweep.Truth`."""
        return self.truth.n_windows

    def measure(self, choice: IntArray, n_windows: int) -> FloatArray:
        """Measure, and tell where the choice is another one."""
        if choice.tobytes() not in self._seen:
            self.tell(max(0, len(self._seen) - 1))
            self._seen.add(choice.tobytes())
        return self.truth.measure(choice, n_windows)

    def accept(self, choice: IntArray) -> None:
        """See `alphaquant.search.sweep.Truth`."""
        self.truth.accept(choice)


def run_knobs(run: Run) -> None:
    """Sampled knobs to the end; three of four at the full budget, the fourth fills the front.

    With side constraints all are at the full budget: smaller ones may leave nothing.
    """
    pinned = {"bits": run.proposer.bits_high}
    weights = run.weights if run.weights.size else np.ones(len(run.problem.units))
    while not run.loop.is_over:
        is_free = len(run.loop.rows) % FREE_EVERY == 0 and not run.proposer.is_constrained
        params = {} if is_free else pinned
        plan = PlannedTrial(params, {"origin": "knobs"})
        run.loop.run(lambda trial: run.proposer.knobs(trial, weights), plan)


def run_groups(run: Run) -> None:
    """Sampled formats per group to the end, from the optimum of the additive costs on."""
    groups = make_groups(run.problem, run.spec.grouping)
    top = {n: len(o) - 1 for n, o in zip(groups.names, groups.options, strict=True)}
    params: Mapping[str, float] = dict(top)  # all open: the solver decides
    while not run.loop.is_over:
        plan = PlannedTrial(params, {"origin": "groups"})
        run.loop.run(lambda trial: run.proposer.groups(trial, groups), plan)
        params = {}


def _enqueue_knobs(run: Run, bits: float) -> None:
    ones = np.ones(len(run.problem.units))
    plan = PlannedTrial(knob_params(Knobs(bits)), {"origin": "knobs"})
    run.loop.run(lambda trial: run.proposer.knobs(trial, ones), plan)


def _evolve(run: Run) -> Proposal:
    n_windows, n_passes, n_measured = run.truth.n_windows, run.spec.trials, 0

    def measure(choice: IntArray, n: int) -> float:
        nonlocal n_measured
        run.clock("evolution", min(n_measured // n_windows, n_passes), n_passes)
        n_measured += n
        return float(run.truth.measure(choice, n).mean())

    rounds = tuple(max(1, n_windows // part) for part in (8, 2, 1))
    found = evolve(
        run.problem,
        run.proposer.limit_bits,
        run.spec.seed,
        measure,
        n_passes,
        EvolutionSettings(windows=rounds),
    )
    run.clock("evolution", n_passes, n_passes)
    return Proposal(run.proposer.spread(found.choice), "allocator:" + EVOLUTION)


PROGRAMS: Mapping[str, tuple[Step, ...]] = MappingProxyType(
    {
        "auto": (
            *(run_uniform, run_default, run_allocators, run_levels, run_probe),
            *(run_sweep, run_surrogate, run_relinearize, run_polish, run_knobs),
        ),
        "knobs": (run_uniform, run_default, run_allocators, run_levels, run_probe, run_knobs),
        "groups": (run_uniform, run_default, run_allocators, run_levels, run_probe, run_groups),
    }
)
"""The steps of every mode, by name."""

ALLOCATOR_PROGRAM: tuple[Step, ...] = (run_uniform, run_named_allocator)
"""The steps of `--allocator NAME`."""


def program_of(spec: SearchSpec) -> tuple[Step, ...]:
    """The steps of a search."""
    return PROGRAMS[spec.mode] if spec.allocator is None else ALLOCATOR_PROGRAM
