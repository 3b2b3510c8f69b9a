"""`search`: from a specification to a front of configurations.

Stages: load (model, texts), teacher (the original's predictions), hessians and bank (every matrix
in every format), costs, study, gate (held-out text), report. Banks, costs and teachers are kept in
the cache and found again by digest; trials are kept in the study. The same specification gives the
same trials, and running it again resumes where it stopped.

Everything that can be refused is refused before the output directory is made: names and ranges
first, then whose directory it is, then the model with its space, then the texts.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna

from alphaquant.errors import ModelError, StoreError
from alphaquant.quant.bank import Bank, Progress
from alphaquant.quant.provenance import device_facts, versions
from alphaquant.quant.swap import Swapper
from alphaquant.search.sampler import make_sampler, next_trial
from alphaquant.spaces.budget import Budget, parse_budget
from alphaquant.spaces.profiles import Profile, find_profile
from alphaquant.spaces.space import make_space
from alphaquant.studies.folder import RunFolder, check_folder, claim_folder, facts_digest
from alphaquant.studies.gate import judge, uniform_rivals
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.progress import StageClock, no_progress
from alphaquant.studies.report import write_configs, write_report
from alphaquant.studies.result import SearchResult, best_of
from alphaquant.studies.sources import find_device, load_source
from alphaquant.studies.spec import SearchSpec, menu_of
from alphaquant.studies.stages import (
    Costs,
    Inputs,
    bank_formats,
    load_inputs,
    measure_unit_costs,
    open_filled_bank,
    problem_of,
    store_teachers,
)
from alphaquant.studies.storage import (
    TrialRow,
    find_duplicate,
    finish_trial,
    finished_rows,
    make_row,
    open_study,
    sqlite_url,
)
from alphaquant.studies.trials import Proposal, TrialRules

logger = logging.getLogger(__name__)

OnTrial = Callable[[TrialRow], None]


@dataclass(frozen=True)
class _Request:
    """A specification whose names were all found."""

    budget: Budget
    profile: Profile
    menu: tuple[str, ...]
    device: str


@dataclass(frozen=True)
class TrialLoop:
    """Runs the trials that a study lacks.

    Attributes:
        spec: how many, how long, which sampler and seed.
        study: where they are kept.
        rules: which they are.
        costs: predict their KL.
        objective: measures their KL.
        evaluation: on this text.
        folder: keeps their assignments.
    """

    spec: SearchSpec
    study: optuna.Study
    rules: TrialRules
    costs: Costs
    objective: Objective
    evaluation: EvaluationSet
    folder: RunFolder

    def run(self, progress: Progress, on_trial: OnTrial) -> list[TrialRow]:
        """All complete trials, those of earlier runs first.

        Every trial is in the storage before the next one starts.

        Raises:
            ModelError: a KL is not finite.
            StoreError: the study's assignments are not in the folder.
        """
        rows = self._earlier_rows()
        planned = self.rules.planned()
        total = max(self.spec.trials, len(rows))
        started = time.monotonic()
        progress("study", len(rows), total)
        while len(rows) < total:
            if rows and self._is_late(time.monotonic() - started):
                logger.warning("timeout after %d of %d trials", len(rows), total)
                break
            pin = self.rules.pin(len(rows))
            trial = next_trial(self.study, planned, self.spec.sampler, self.spec.seed, pin)
            proposal = self.rules.propose(trial)
            row = self._evaluate(proposal, rows)
            self.folder.save_assignment(proposal.assignment)
            finish_trial(self.study, trial, row)
            rows.append(row)
            on_trial(row)
            progress("study", len(rows), total)
        return rows

    def _earlier_rows(self) -> list[TrialRow]:
        rows = finished_rows(self.study)
        missing = [row for row in rows if not self.folder.has_assignment(row.digest)]
        if missing:
            raise StoreError(
                f"study {self.spec.study!r} has {len(rows)} trials, and the assignments of "
                f"{len(missing)} are not in {self.folder.path}; give the --out that the study was "
                "made with, or another --study"
            )
        return rows

    def _is_late(self, seconds: float) -> bool:
        return self.spec.timeout is not None and seconds > self.spec.timeout

    def _evaluate(self, proposal: Proposal, rows: list[TrialRow]) -> TrialRow:
        """Measure a proposal, or take over the numbers of an equal one."""
        assignment, space, number = proposal.assignment, self.rules.space, len(rows)
        assert space.is_feasible(assignment), f"{proposal.origin} is over the budget"
        row = find_duplicate(rows, assignment.digest)
        if row is not None:
            row = replace(row, seconds=0.0, duplicate_of=row.number)
        else:
            found = self.objective.measure(assignment, self.evaluation)
            counts = assignment.count_bits(space.inventory)
            row = make_row(number, proposal.origin, assignment.digest, counts, found)
            row = replace(row, predicted_kl=self.costs.predict_kl(space, assignment))
        if not np.isfinite(row.kl):
            # Proposals depend on complete trials only, so the next one would be the same again.
            raise ModelError(
                f"the KL of {proposal.origin} at {row.bits_per_weight:.3f} bits is {row.kl}; use "
                "--dtype float32, or leave out the smallest formats with --formats"
            )
        return replace(row, number=number, origin=proposal.origin, gap=proposal.gap)


def search(
    spec: SearchSpec,
    *,
    progress: Progress = no_progress,
    on_trial: OnTrial = lambda row: None,
) -> SearchResult:
    """Search formats for a model under a budget and write the results to `spec.out`.

    Args:
        spec: what to search.
        progress: called with a stage's name, steps done, steps.
        on_trial: called after each trial.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    clock = StageClock(progress)
    request = _check(spec)
    clock("load", 0, 1)
    source = load_source(spec.model, request.device, spec.dtype)
    space = make_space(source.map.inventory, request.profile, request.menu, request.budget)
    inputs = load_inputs(spec, source)
    with _claimed(spec, inputs) as (folder, study):
        clock("load", 1, 1)
        evaluation, heldout = store_teachers(spec, inputs, clock)
        bank = open_filled_bank(spec, inputs, bank_formats(space), clock)
        costs = measure_unit_costs(spec, inputs, space, bank, clock)
        rules = TrialRules(space, problem_of(space, costs), spec.seed)
        objective = Objective(Swapper(source.map, bank.read))
        loop = TrialLoop(spec, study, rules, costs, objective, evaluation, folder)
        rows = loop.run(clock, on_trial)
    clock("gate", 0, 1)
    best = folder.load_assignment(best_of(rows).digest)
    rivals = uniform_rivals(space, bank_formats(space), rows)
    gate = judge(objective, heldout, space, best, rivals)
    clock("gate", 1, 1)
    facts = _provenance(spec, inputs, bank, request.device)
    n_evaluations = objective.n_evaluations
    result = SearchResult(spec, space, tuple(rows), gate, {}, n_evaluations, facts, folder)
    return _write(result, clock)


def _check(spec: SearchSpec) -> _Request:
    """Find every name in a specification, before anything is loaded.

    Raises:
        AlphaQuantError: a name or number that does not exist, or an `out` that is taken.
    """
    budget, profile = parse_budget(spec.budget), find_profile(spec.profile)
    menu = menu_of(spec.formats, profile)
    make_sampler(spec.sampler, spec.seed, 0)
    device = find_device(spec.device)
    check_folder(spec.out, spec.facts(), overwrite=spec.overwrite)
    return _Request(budget, profile, menu, device)


@contextmanager
def _claimed(spec: SearchSpec, inputs: Inputs) -> Iterator[tuple[RunFolder, optuna.Study]]:
    """The output directory and the study, opened for this search.

    A study outside the directory comes first, so that a wrong one leaves no directory.
    """
    facts = {**spec.facts(), **inputs.digests()}
    with ExitStack() as stack:
        url = spec.storage or sqlite_url(spec.out / "study.db")
        open_it = open_study(url, spec.study, facts_digest(facts))
        if spec.storage is None:
            folder = claim_folder(spec.out, facts, overwrite=spec.overwrite)
            yield folder, stack.enter_context(open_it)
        else:
            study = stack.enter_context(open_it)
            yield claim_folder(spec.out, facts, overwrite=spec.overwrite), study


def _provenance(spec: SearchSpec, inputs: Inputs, bank: Bank, device: str) -> dict[str, Any]:
    tokens_per_expert: dict[str, list[int]] = {}
    for layer in range(inputs.source.map.inventory.n_layers):
        tokens_per_expert |= bank.utilization(layer)
    return {
        **inputs.facts(),
        **device_facts(device),
        "versions": versions(),
        "seed": spec.seed,
        "bank": bank.path.name,
        "bank_bytes": bank.n_bytes(),
        "calibration_tokens_per_expert": tokens_per_expert,
    }


def _write(result: SearchResult, clock: StageClock) -> SearchResult:
    """Write all files; the seconds in them include writing the configurations."""
    clock("report", 0, 1)
    write_configs(result)
    clock("report", 1, 1)
    clock.stop()
    result = replace(result, seconds=dict(clock.seconds))
    write_report(result)
    return result
