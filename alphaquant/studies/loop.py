"""The loop of trials: one at a time, each stored before the next, repeated by nothing.

A search is a fixed program of trials (see `alphaquant.studies.program`). When it is resumed the
program runs again from its start, and trials that the study already has are handed back instead of
being measured, so there is no other state to restore.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import optuna

from alphaquant.errors import ModelError, StoreError
from alphaquant.evaluators.base import Subject
from alphaquant.evaluators.scores import Scorer
from alphaquant.progress import Progress, Stage
from alphaquant.search.sampler import PlannedTrial, next_trial
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.objective import Measured, SearchObjective
from alphaquant.studies.pruning import is_hopeless
from alphaquant.studies.stopping import MOST_TRIALS
from alphaquant.studies.store.folder import RunFolder
from alphaquant.studies.store.study import (
    TrialRow,
    find_duplicate,
    finish_trial,
    finished_rows,
    make_row,
)

logger = logging.getLogger(__name__)

N_LEAST_EXPECTED = 16
"""Trials that a search without a given number is first expected to have."""

OnTrial = Callable[[TrialRow], None]
Show = Callable[[optuna.Trial, Assignment, TrialRow], None]


def show_nothing(trial: optuna.Trial, assignment: Assignment, row: TrialRow) -> None:
    """Nobody looks at the study in a dashboard."""


@dataclass(frozen=True)
class Proposal:
    """A trial's assignment and where it comes from.

    Attributes:
        assignment: a format for every matrix.
        origin: see `TrialRow.origin`.
        gap: the solver's certified relative gap in its own cost, None where none was solved.
        can_prune: whether the trial may end early.
    """

    assignment: Assignment
    origin: str
    gap: float | None = None
    can_prune: bool = False


@dataclass
class TrialLoop:
    """Runs trials, or hands back those of earlier runs.

    Attributes:
        spec: how many, how long, which sampler and seed.
        study: where they are kept.
        objective: measures them.
        predict: predicts the KL of an assignment.
        folder: keeps their assignments.
        progress: called with ("study", trials done, trials).
        on_trial: called after each new trial.
        show: told of each measured trial before it is finished, while it can be written to.
        scorer: measures what is asked for besides bits and KL.
        deadline: seconds of `time.monotonic` after which no trial starts; None for none.
        rows: trials so far, in order.
    """

    spec: SearchSpec
    study: optuna.Study
    objective: SearchObjective
    predict: Callable[[Assignment], float]
    folder: RunFolder
    progress: Progress
    on_trial: OnTrial
    show: Show = show_nothing
    scorer: Scorer = field(default_factory=Scorer)
    deadline: float | None = None
    rows: list[TrialRow] = field(default_factory=list)
    _stored: list[TrialRow] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _is_stopped: bool = False

    def __post_init__(self) -> None:
        """Read the trials of earlier runs.

        Raises:
            StoreError: the study's assignments are not in the folder.
        """
        self._stored = finished_rows(self.study)
        missing = [row for row in self._stored if not self.folder.has_assignment(row.digest)]
        if missing:
            raise StoreError(
                f"study {self.spec.run.study!r} has {len(self._stored)} trials, and the "
                f"assignments of {len(missing)} are not in {self.folder.path}; give the --out "
                "that the study was made with, or another --study"
            )

    @property
    def most_trials(self) -> int:
        """Trials at most: as many as were asked for, else `MOST_TRIALS`."""
        return MOST_TRIALS if self.spec.run.trials is None else self.spec.run.trials

    @property
    def is_open(self) -> bool:
        """Whether a rule may end the search: no number of trials was given."""
        return self.spec.run.trials is None

    @property
    def n_stored(self) -> int:
        """Trials of earlier runs."""
        return len(self._stored)

    @property
    def is_all_new(self) -> bool:
        """Whether all trials of earlier runs were handed back."""
        return len(self.rows) >= len(self._stored)

    @property
    def is_over(self) -> bool:
        """Whether no further trial may run."""
        if not self.is_all_new:
            return False
        reason = self.limit_reason
        if reason is not None and self._is_late and not self._is_stopped:
            logger.warning("%s; trials so far: %d", reason, len(self.rows))
            self._is_stopped = True
        return reason is not None

    @property
    def limit_reason(self) -> str | None:
        """Which limit ends the search here, a sentence without an end; None where none does."""
        if len(self.rows) >= self.most_trials:
            asked = f"all {self.spec.run.trials} trials of --trials or --effort are done"
            return f"{MOST_TRIALS} are the most without --trials" if self.is_open else asked
        if self._is_past_deadline:
            return f"the time limit of {self.spec.run.time_limit} is over"
        return f"the timeout of {self.spec.run.timeout:g} s is over" if self._is_late else None

    @property
    def _is_late(self) -> bool:
        """Whether the time is over; the first trial always runs."""
        timeout = self.spec.run.timeout
        is_over = timeout is not None and self._seconds > timeout and len(self.rows) > 0
        return is_over or self._is_past_deadline

    @property
    def _is_past_deadline(self) -> bool:
        is_past = self.deadline is not None and time.monotonic() > self.deadline
        return is_past and len(self.rows) > 0

    @property
    def _n_expected(self) -> int:
        """Trials in all, for whoever waits; one more at a time while a rule may end them."""
        n_done = len(self.rows)
        n_new = max(N_LEAST_EXPECTED, n_done + 1) if self.is_open else self.most_trials
        return max(min(n_new, self.most_trials), len(self._stored), n_done)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def run(
        self, propose: Callable[[optuna.Trial], Proposal], fixed: PlannedTrial
    ) -> TrialRow | None:
        """The next trial; None when the search is over.

        Args:
            propose: suggests what `fixed` leaves open and makes the assignment; not called where
                the study has the trial.
            fixed: parameters and attributes that are known.
        """
        if self.is_over:
            return None
        if len(self.rows) < len(self._stored):
            row = self._stored[len(self.rows)]
            self._check_replay(row, fixed)
        else:
            row = self._measure(propose, fixed)
            self.on_trial(row)
        self.rows.append(row)
        self.progress(Stage.STUDY, len(self.rows), self._n_expected)
        return row

    def end(self) -> None:
        """Say that there are no further trials."""
        self.progress(Stage.STUDY, len(self.rows), len(self.rows))

    def assignment(self, row: TrialRow) -> Assignment:
        """The assignment of a trial."""
        return self.folder.load_assignment(row.digest)

    def _check_replay(self, row: TrialRow, fixed: PlannedTrial) -> None:
        origin = fixed.attrs.get("origin")
        if origin is not None and origin != row.origin:
            raise StoreError(
                f"trial {row.number} of study {self.spec.run.study!r} is {row.origin!r} where "
                f"this version has {origin!r}; give another --study and --out"
            )

    def _measure(
        self, propose: Callable[[optuna.Trial], Proposal], fixed: PlannedTrial
    ) -> TrialRow:
        trial = next_trial(
            self.study, fixed, self.spec.proposals.sampler, self.spec.proposals.seed
        )
        proposal = propose(trial)
        row = self._row(proposal)
        if not np.isfinite(row.kl):
            # Proposals depend on finished trials only, so the next one would be the same again.
            raise ModelError(
                f"the KL of {proposal.origin} at {row.bits_per_weight:.3f} bits is {row.kl}; use "
                "--dtype float32, or leave out the smallest formats with --formats"
            )
        self.folder.save_assignment(proposal.assignment)
        self.show(trial, proposal.assignment, row)
        finish_trial(self.study, trial, row, self.scorer.plan.objectives)
        return row

    def _row(self, proposal: Proposal) -> TrialRow:
        """Measure a proposal, or take over the numbers of an equal one."""
        assignment, number = proposal.assignment, len(self.rows)
        row = find_duplicate(self.rows, assignment.digest)
        if row is not None:
            row = replace(row, seconds=0.0, duplicate_of=row.number)
        else:
            counts = assignment.count_bits(self.objective.model_map.inventory)
            found = self._race(assignment, counts.bits_per_weight, proposal.can_prune)
            row = make_row(number, proposal.origin, assignment.digest, counts, found)
            is_pruned = len(found.kl) < self.objective.n_windows
            row = replace(row, predicted_kl=self.predict(assignment), is_pruned=is_pruned)
            row = row if is_pruned else self._with_scores(row, assignment)
        return replace(row, number=number, origin=proposal.origin, gap=proposal.gap)

    def _with_scores(self, row: TrialRow, assignment: Assignment) -> TrialRow:
        """A complete trial with everything else that is asked for."""
        if not self.scorer.evaluators:
            return row
        started, model_map = time.perf_counter(), self.objective.model_map
        self.objective.swapper.apply(assignment)
        found = self.scorer.measure(Subject(model_map.model, model_map.inventory, assignment))
        return replace(
            row,
            extra={s.metric: s.value for s in found},
            extra_stderr={s.metric: s.stderr for s in found if s.stderr is not None},
            seconds=row.seconds + time.perf_counter() - started,
        )

    def _race(self, assignment: Assignment, bits: float, can_prune: bool) -> Measured:
        """Measure batch by batch, up to where a trial of no more bits is better beyond doubt.

        With further objectives all is measured: what is worse in KL may be better in these.
        """
        rivals = [r for r in self.rows if not r.is_pruned and r.bits_per_weight <= bits]
        if not can_prune or not rivals or self.scorer.plan.objectives:
            return self.objective.measure(assignment)
        best = min(rivals, key=lambda r: r.kl)
        step, n_windows = self.objective.batch_size, self.objective.n_windows
        for n in range(step, n_windows, step):
            found = self.objective.measure(assignment, n, is_race=True)
            if is_hopeless(found.kl.tolist(), best.kl_per_window):
                return found
        return self.objective.measure(assignment)
