"""What a search found, as one object: made when it ends, written down by the reports."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from alphaquant.evaluators.base import Metric
from alphaquant.evaluators.scores import ScorePlan
from alphaquant.provenance import Provenance
from alphaquant.search.pareto import nondominated
from alphaquant.spaces.assignment import Assignment, BitCount, uniform_assignment
from alphaquant.spaces.space import SearchSpace
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.gate.judge import GateResult
from alphaquant.studies.gate.winner import best_of
from alphaquant.studies.recipes.comparing import RecipeFindings
from alphaquant.studies.store.folder import RunFolder
from alphaquant.studies.store.study import TrialRow
from alphaquant.studies.trials import ALLOCATOR, UNIFORM


@dataclass(frozen=True)
class Probe:
    """How well the costs rank random assignments.

    Attributes:
        n_assignments: how many were measured, on `n_windows` windows each.
        n_windows: windows of the evaluation text.
        spearman: rank correlation of predicted and measured KL, by cost table; NaN where one of
            the two is constant.
    """

    n_assignments: int
    n_windows: int
    spearman: Mapping[str, float]


@dataclass(frozen=True)
class StageGain:
    """What a stage of a search gained.

    Attributes:
        stage: its name.
        n_trials: how many it has, pruned ones and repetitions included.
        kl: the lowest KL within the budget after it, nats per token; None while there is none.
        ratio: `kl` to the lowest before it; None for the first and where that was 0.
    """

    stage: str
    n_trials: int
    kl: float | None
    ratio: float | None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        spec: what was asked.
        space: units, menu, budget.
        rows: all finished trials, pruned ones and those above the budget included.
        gate: the comparison on held-out text.
        seconds: wall time by stage, of this run.
        n_measured: assignments measured on the evaluation text, races included.
        n_passes: that work in full passes of the model over the text.
        probe: how well the costs rank; None where that was not measured.
        stopped: why there were no more trials, a sentence without an end.
        provenance: what the numbers depend on.
        folder: where everything is written.
        scores: what was measured besides bits and KL.
        original_perplexity: of the original on the held-out text; None where it is not known.
        recipes: how `best.json` is quantized best; None where that was not asked.
    """

    spec: SearchSpec
    space: SearchSpace
    rows: tuple[TrialRow, ...]
    gate: GateResult
    seconds: Mapping[str, float]
    n_measured: int
    n_passes: float
    probe: Probe | None
    stopped: str
    provenance: Provenance
    folder: RunFolder
    scores: ScorePlan = field(default_factory=ScorePlan)
    original_perplexity: float | None = None
    recipes: RecipeFindings | None = None

    @property
    def limit(self) -> float:
        """The budget in bits per quantizable weight."""
        return self.space.limit_bits / self.space.inventory.n_weights

    @property
    def front_trials(self) -> tuple[TrialRow, ...]:
        """The non-dominated complete trials over all objectives, of all sizes, by bits."""
        return front_of(self.rows, self.scores.objectives)

    @property
    def best(self) -> TrialRow:
        """The best trial on the evaluation text within the budget."""
        return best_of([row for row in self.rows if row.bits_per_weight <= self.limit])

    @property
    def published(self) -> Assignment:
        """The assignment of `best.json`."""
        return self.gate.published

    @property
    def counts(self) -> BitCount:
        """Bits and bytes of `best.json`."""
        return self.published.count_bits(self.space.inventory)

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the model with every quantizable matrix in bf16."""
        original = uniform_assignment(self.space.inventory, "bf16")
        return original.count_bits(self.space.inventory).checkpoint_bytes


def front_of(rows: Sequence[TrialRow], objectives: Sequence[Metric] = ()) -> tuple[TrialRow, ...]:
    """The complete rows that none beats over all objectives, by bits; of equal points the first.

    Args:
        rows: trials.
        objectives: those besides bits and KL.
    """
    complete = [row for row in rows if not row.is_pruned]
    signs = [1 if metric.direction == "minimize" else -1 for metric in objectives]
    points = [
        [r.bits_per_weight, r.kl]
        + [sign * r.score(m.name) for sign, m in zip(signs, objectives, strict=True)]
        for r in complete
    ]
    mask = nondominated(np.array(points))
    kept = [row for row, keep in zip(complete, mask, strict=True) if keep]
    return tuple(sorted(kept, key=lambda r: r.bits_per_weight))


def stage_gains(rows: Sequence[TrialRow], limit: float) -> tuple[StageGain, ...]:
    """What each stage gained, in the order in which they began.

    Uniform 0.4, then default knobs 0.2, then allocators 0.1: ratios None, 0.5, 0.5.

    Args:
        rows: trials in order.
        limit: bits per weight; only complete trials of at most these count.
    """
    stages: dict[str, list[TrialRow]] = {}
    for row in rows:
        stages.setdefault(_stage(row, stages), []).append(row)
    gains, lowest = [], math.inf
    for stage, inside in stages.items():
        before = lowest
        counted = [r.kl for r in inside if r.bits_per_weight <= limit and not r.is_pruned]
        lowest = min([before, *counted])
        kl = lowest if math.isfinite(lowest) else None
        ratio = lowest / before if math.isfinite(before) and before > 0 else None
        gains.append(StageGain(stage, len(inside), kl, ratio))
    return tuple(gains)


def _stage(row: TrialRow, earlier: Container[str]) -> str:
    """The stage of a trial; the first trial of knobs is that of the default ones."""
    if row.origin.startswith(UNIFORM):
        return "uniform"
    if row.origin.startswith(ALLOCATOR):
        return "allocators"
    if row.origin == "knobs":
        return "sampled knobs" if "default knobs" in earlier else "default knobs"
    return "sampled groups" if row.origin == "groups" else row.origin
