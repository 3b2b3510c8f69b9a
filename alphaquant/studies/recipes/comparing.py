"""The study of recipes: each option alone, then an Optuna sampler over all of them.

The assignment stays, so all trials have the same bytes, but for the routers of a rotated model,
which are in float32. What is minimized is the divergence on the evaluation text. The recipe that
is most surely better there is compared with the search's own on held-out text, and is better only
where the whole 95 % interval of the paired difference says so.

How much a choice matters is told twice: by what each option does alone, with its standard error,
and by PED-ANOVA over all trials.

Source:
    PED-ANOVA: Watanabe, Bansal, Hutter, IJCAI 2023, arXiv 2304.10255.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import optuna
import torch
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from alphaquant.errors import ModelError
from alphaquant.evaluators.base import paired_difference
from alphaquant.evaluators.divergence import Divergence
from alphaquant.progress import Stage, StageClock
from alphaquant.search.sampler import FINISHED, PlannedTrial, next_trial
from alphaquant.spaces.assignment import BitCount
from alphaquant.studies.gate.intervals import Difference, compare_kl
from alphaquant.studies.gate.winner import NOISE
from alphaquant.studies.objective import EvaluationSet, Measured
from alphaquant.studies.recipes.choices import (
    Choice,
    Option,
    Recipe,
    choices_of,
    planned_params,
    reached,
    recipe_of,
)
from alphaquant.studies.recipes.measuring import RecipeBench
from alphaquant.studies.store.study import (
    TrialRow,
    find_duplicate,
    finish_trial,
    finished_rows,
    make_row,
)

ORIGIN = "recipe"
PROBLEM = "problem"
"""User attribute of a trial whose recipe cannot quantize this model."""

STEPS = 100
"""Steps of a trial in the progress of the stage."""

_ROUNDED = 80
"""Of those, when all matrices are rounded."""

_GOOD = 0.5
"""Share of the trials that importances are about: what tells the better half from all."""


@dataclass(frozen=True)
class Effect:
    """What one option does by itself.

    Attributes:
        choice: its name.
        option: another than the search's own.
        kl: on the evaluation text, nats per token; None where it cannot quantize this model.
        difference: KL of the search's own recipe minus this, paired by window.
        stderr: of it.
    """

    choice: str
    option: Option
    kl: float | None = None
    difference: float | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Served:
    """A recipe on the held-out text.

    Attributes:
        recipe: which.
        text: provenance of its calibration windows.
        model_digest: of the weights that it quantizes.
        counts: bits and bytes of its checkpoint.
        kl: nats per token.
        kl_stderr: its standard error over windows.
        same_top: share of positions.
        perplexity: token perplexity.
    """

    recipe: Recipe
    text: Mapping[str, Any]
    model_digest: str
    counts: BitCount
    kl: float
    kl_stderr: float
    same_top: float
    perplexity: float


@dataclass(frozen=True)
class RecipeFindings:
    """What a study of recipes found.

    Attributes:
        rows: its trials.
        params: of every trial.
        problems: why recipes cannot quantize this model, by number of the trial.
        choices: what was chosen from.
        left_out: why this model cannot make other choices, by name.
        importances: of the choices, PED-ANOVA; empty where trials are too few or equal.
        best: number of the trial that is most surely the best on the evaluation text.
        own: the search's own recipe on the held-out text.
        served: that of the best trial; None where it is the search's own.
        difference: KL of the own recipe minus KL of the best; None where they are the same.
        stopped: why there were no more trials, a sentence without an end.
    """

    rows: tuple[TrialRow, ...]
    params: tuple[Mapping[str, Option], ...]
    problems: Mapping[int, str]
    choices: tuple[Choice, ...]
    left_out: Mapping[str, str]
    importances: Mapping[str, float]
    best: int
    own: Served
    served: Served | None
    difference: Difference | None
    stopped: str

    @property
    def is_better(self) -> bool:
        """Whether another recipe than the search's own is better beyond noise on held-out text."""
        return self.difference is not None and (self.difference.low or 0.0) > 0

    @property
    def effects(self) -> tuple[Effect, ...]:
        """What each option does alone, of those that were tried so."""
        own, found = self.params[0], list[Effect]()
        for row, params in zip(self.rows, self.params, strict=True):
            changed = [name for name in own if params[name] != own[name]]
            if len(changed) != 1 or row.duplicate_of is not None:
                continue
            name = changed[0]
            if row.is_pruned:
                found.append(Effect(name, params[name]))
                continue
            found.append(Effect(name, params[name], row.kl, *_paired(self.rows[0], row)))
        return tuple(found)


@dataclass
class RecipeStudy:
    """A study of recipes; trials of an earlier run are handed back.

    Attributes:
        study: where trials are kept.
        bench: measures recipes.
        own: what the search measured of its own recipe on a text.
        sampler: one of `SAMPLERS`.
        seed: of proposals and of rotations.
        n_trials: at most.
        is_late: whether no further trial may start.
        clock: told how far the stage is.
    """

    study: optuna.Study
    bench: RecipeBench
    own: Callable[[EvaluationSet], Divergence]
    sampler: str
    seed: int
    n_trials: int
    is_late: Callable[[], bool]
    clock: StageClock
    _rows: list[TrialRow] = field(default_factory=list)

    def run(self, evaluation: EvaluationSet, heldout: EvaluationSet) -> RecipeFindings:
        """All trials, and the comparison on held-out text.

        Args:
            evaluation: the text that trials are measured on.
            heldout: the text that decides.

        Raises:
            StoreError: the study is not one of recipes of this assignment.
        """
        self._tell(0)
        own = self.bench.own
        inventory = self.bench.source(own.rotate).map.inventory
        every = choices_of(own, inventory)
        within = reached(every, self.n_trials)
        choices, left_out = self.bench.usable(within, self.seed)
        few = f"{self.n_trials} trials do not come to it"
        left_out |= {choice.name: few for choice in every if choice not in within}
        stored, planned = finished_rows(self.study), planned_params(choices)
        stopped = f"all {self.n_trials} trials of --recipes are done"
        while len(self._rows) < self.n_trials:
            number = len(self._rows)
            if number < len(stored):
                self._rows.append(stored[number])
            elif number > 0 and self.is_late():
                stopped = "the time is over"
                break
            else:
                fixed = planned[number] if number < len(planned) else {}
                self._rows.append(self._trial(fixed, choices, evaluation))
            self._tell(0)
        trials = self._trials()
        best = surest(self._rows)
        found = RecipeFindings(
            rows=tuple(self._rows),
            params=tuple(planned[0] | trial.params for trial in trials),
            problems={
                n: t.user_attrs[PROBLEM] for n, t in enumerate(trials) if PROBLEM in t.user_attrs
            },
            choices=tuple(choices),
            left_out=left_out,
            importances=importances_of(self.study),
            best=best.number,
            own=self._served(own, self.own(heldout), heldout),
            served=None,
            difference=None,
            stopped=stopped,
        )
        recipe = recipe_of(own, found.params[best.number], self.seed)
        if recipe != own:
            found = self._compared(found, recipe, heldout)
        self.clock(Stage.RECIPES, self._n_steps, self._n_steps)
        return found

    def _compared(
        self, found: RecipeFindings, recipe: Recipe, heldout: EvaluationSet
    ) -> RecipeFindings:
        """The best recipe beside the search's own on held-out text."""
        measured = self.bench.divergence(recipe, heldout, self._steps)
        own = self.own(heldout)
        return replace(
            found,
            served=self._served(recipe, measured, heldout),
            difference=compare_kl(measured.kl, own.kl, heldout.tokens.domains),
        )

    def _trial(
        self, fixed: Mapping[str, Option], choices: Sequence[Choice], on: EvaluationSet
    ) -> TrialRow:
        """Measure the next recipe, or take over the numbers of an equal one."""
        plan, number = PlannedTrial(fixed, {"origin": ORIGIN}), len(self._rows)
        trial = next_trial(self.study, plan, self.sampler, self.seed)
        params: dict[str, Any] = {
            c.name: trial.suggest_categorical(c.name, c.options) for c in choices
        }
        recipe = recipe_of(self.bench.own, params, self.seed)
        digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()
        row = find_duplicate(self._rows, digest)
        if row is not None:
            row = replace(row, number=number, seconds=0.0, duplicate_of=row.number)
        else:
            row = self._measured(trial, recipe, digest, on)
        finish_trial(self.study, trial, row)
        return row

    def _measured(
        self, trial: optuna.Trial, recipe: Recipe, digest: str, on: EvaluationSet
    ) -> TrialRow:
        """The row of a recipe; one that cannot quantize this model has no numbers."""
        number = len(self._rows)
        try:
            if recipe == self.bench.own:
                found = self.own(on)
            else:
                found = self.bench.divergence(recipe, on, self._steps)
            if not math.isfinite(float(found.kl.mean())):
                raise ModelError("its divergence is not a number")
        except ModelError as error:
            trial.set_user_attr(PROBLEM, str(error))
            return _without_numbers(number, digest, self.bench.counts(recipe))
        measured = Measured(tuple(found.scores(on.tokens.digest)), found.kl)
        return make_row(number, ORIGIN, digest, self.bench.counts(recipe), measured)

    def _steps(self, stage: str, done: int, total: int) -> None:
        """How far a trial is: by layers that are rounded."""
        if stage == Stage.BANK and total:
            self._tell(_ROUNDED * done // total)

    def _tell(self, part: int) -> None:
        self.clock(Stage.RECIPES, STEPS * len(self._rows) + part, self._n_steps)

    @property
    def _n_steps(self) -> int:
        """Those of all trials, and of the comparison on held-out text."""
        return STEPS * (self.n_trials + 1)

    def _served(self, recipe: Recipe, found: Divergence, on: EvaluationSet) -> Served:
        kl, same_top, perplexity = found.scores(on.tokens.digest)
        assert kl.stderr is not None, "KL is a mean over windows"
        return Served(
            *(recipe, self.bench.text(recipe).provenance()),
            *(self.bench.source(recipe.rotate).digest, self.bench.counts(recipe)),
            *(kl.value, kl.stderr, same_top.value, perplexity.value),
        )

    def _trials(self) -> list[FrozenTrial]:
        """Trials of the study, by their rows."""
        found = self.study.get_trials(deepcopy=False, states=FINISHED)
        return sorted(found, key=lambda t: t.number)[: len(self._rows)]


def surest(rows: Sequence[TrialRow]) -> TrialRow:
    """The recipe that is most surely better than the search's own, which is the first.

    That is the one with the largest gain less `NOISE` standard errors, paired by window; the
    search's own where no such bound is above 0. The lowest KL may be the luck of one window.

    Worked example: gains 0.10 +- 0.09 and 0.034 +- 0.016: bounds -0.08 and 0.002, the second.
    """

    def bound(row: TrialRow) -> float:
        """What the gain is at least."""
        gain, stderr = (0.0, 0.0) if row is rows[0] else _paired(rows[0], row)
        return gain - NOISE * stderr

    return max((row for row in rows if not row.is_pruned), key=bound)


def importances_of(study: optuna.Study) -> dict[str, float]:
    """How much each choice matters over all complete trials, the shares sum to 1.

    Empty where fewer than four are complete or all are equal.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({trial.values[1] for trial in complete}) < 4:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PedAnova", UserWarning)  # less is better here
        return dict(
            get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=_GOOD),
                target=lambda trial: trial.values[1],
            )
        )


def _paired(own: TrialRow, row: TrialRow) -> tuple[float, float]:
    """KL of the own recipe minus that of another, with its standard error."""
    first, second = torch.tensor(own.kl_per_window), torch.tensor(row.kl_per_window)
    return paired_difference(first, second)


def _without_numbers(number: int, digest: str, counts: BitCount) -> TrialRow:
    """The row of a recipe that cannot be measured."""
    nothing = (math.inf, 0.0, (), 0.0, math.inf)
    return TrialRow(
        *(number, ORIGIN, digest, counts.bits_per_weight, counts.checkpoint_bytes, *nothing),
        predicted_kl=0.0,
        gap=None,
        seconds=0.0,
        is_pruned=True,
    )
