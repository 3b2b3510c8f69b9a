"""`search`: from a specification to a front of configurations.

Stages: load (model, texts), teacher (the original's predictions), hessians and bank (every matrix in every format), costs, study,
gate (held-out text), report. Banks, costs and teachers are kept in the cache and found again by digest; trials are kept in the
study. The same specification gives the same trials, and running it again resumes where it stopped.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from alphaquant.errors import ModelError
from alphaquant.evaluators.data import TokenSet, check_disjoint
from alphaquant.evaluators.divergence import store_teacher
from alphaquant.evaluators.sensitivity import CostSettings, CostTable, measure_costs, unit_costs
from alphaquant.quant.bank import Bank, Progress, bank_key, fill_bank, open_bank
from alphaquant.quant.provenance import device_facts, versions
from alphaquant.quant.swap import Swapper
from alphaquant.search.pareto import nondominated
from alphaquant.search.problem import Problem, make_problem
from alphaquant.search.sampler import next_trial
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.studies.folder import RunFolder, open_folder
from alphaquant.studies.gate import GateResult, judge
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.progress import StageClock
from alphaquant.studies.sources import Source, cache_dir, find_device, load_source, read_text
from alphaquant.studies.spec import REFERENCE_FORMATS, SearchSpec, menu_of
from alphaquant.studies.storage import TrialRow, find_duplicate, finish_trial, finished_rows, make_row, open_study
from alphaquant.studies.trials import Proposal, TrialRules

logger = logging.getLogger(__name__)

OnTrial = Callable[[TrialRow], None]
MAX_FAILURES = 3


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        spec: what was asked.
        space: units, menu, budget.
        rows: all complete trials.
        front: the non-dominated ones over (bits, KL), by bits; no trial over the budget exists.
        best: the trial of lowest KL on the evaluation text.
        gate: the comparison on held-out text.
        published: the assignment of `best.json`.
        seconds: wall time by stage, of this run.
        n_evaluations: how often the model ran over a text in this run.
        facts: provenance.
        folder: where everything is written.
    """

    spec: SearchSpec
    space: SearchSpace
    rows: tuple[TrialRow, ...]
    front: tuple[TrialRow, ...]
    best: TrialRow
    gate: GateResult
    published: Assignment
    seconds: dict[str, float]
    n_evaluations: int
    facts: dict[str, Any]
    folder: RunFolder


@dataclass(frozen=True)
class _Loaded:
    """A model with its three texts."""

    source: Source
    calibration: TokenSet
    evaluation: TokenSet
    heldout: TokenSet

    def facts(self) -> dict[str, Any]:
        texts = (self.calibration, self.evaluation, self.heldout)
        return {**self.source.facts(), "data": {t.role: t.provenance() for t in texts}}


def _quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def search(spec: SearchSpec, *, progress: Progress = _quiet, on_trial: OnTrial = lambda row: None) -> SearchResult:
    """Search formats for a model under a budget and write the results to `spec.out`.

    Args:
        spec: what to search.
        progress: called with a stage's name, steps done, steps.
        on_trial: called after each trial.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    from alphaquant.studies.report import write_report

    budget, profile = parse_budget(spec.budget), find_profile(spec.profile)
    menu = menu_of(spec.formats, profile)
    folder = open_folder(spec.out, spec.digest, spec.facts(), overwrite=spec.overwrite)
    clock = StageClock(progress)
    device = find_device(spec.device)
    clock("load", 0, 1)
    loaded = _load(spec, device)
    space = make_space(loaded.source.map.inventory, profile, menu, budget)
    study = open_study(spec.storage_url, spec.study, spec.digest)
    clock("load", 1, 1)
    evaluation, heldout = _teachers(spec, loaded, clock)
    names = bank_formats(space)
    bank = _bank(spec, loaded, names, clock)
    costs = CostSettings(spec.seed, spec.n_draws)
    table = measure_costs(loaded.source.map, bank, loaded.calibration.tokens, names, costs, progress=clock)
    rules = TrialRules(space, _problem(space, table), spec.seed)
    objective = Objective(Swapper(loaded.source.map, bank.read))
    rows = _run_trials(spec, study, rules, objective, evaluation, table, folder, clock, on_trial)
    best = min(rows, key=lambda r: (r.kl, r.bits_per_weight, r.number))
    clock("gate", 0, 1)
    gate = judge(objective, heldout, space, folder, best, rows, names)
    clock("gate", 1, 1)
    clock.stop()
    facts = {
        **loaded.facts(),
        **device_facts(device),
        "versions": versions(),
        "seed": spec.seed,
        "bank": bank.path.name,
        "bank_bytes": bank.n_bytes(),
        "calibration_tokens_per_expert": {k: v for i in range(space.inventory.n_layers) for k, v in bank.utilization(i).items()},
    }
    result = SearchResult(
        spec, space, tuple(rows), front_of(rows), best, gate, folder.load_assignment(gate.winner_digest), clock.seconds,
        objective.n_evaluations, facts, folder,
    )
    write_report(result)
    return result


def front_of(rows: list[TrialRow]) -> tuple[TrialRow, ...]:
    """The exact non-dominated set over (bits, KL), by bits; of equal points the first."""
    mask = nondominated(np.array([[r.bits_per_weight, r.kl] for r in rows]))
    return tuple(sorted((r for r, keep in zip(rows, mask, strict=True) if keep), key=lambda r: r.bits_per_weight))


def bank_formats(space: SearchSpace) -> tuple[str, ...]:
    """The menu and the reference formats, by nominal bits."""
    names = {*space.menu, *REFERENCE_FORMATS}
    return tuple(sorted(names, key=lambda n: (parse_format(n).nominal_bits, n)))


def predict_kl(table: CostTable, space: SearchSpace, assignment: Assignment) -> float:
    """Sum of the Fisher costs of an assignment, nats per token."""
    costs = unit_costs(table, space.units)
    column = {name: i for i, name in enumerate(table.formats)}
    chosen = [column[assignment.formats[u.matrices[0].name]] for u in space.units]
    return float(costs.fisher[np.arange(len(chosen)), chosen].sum())


def _load(spec: SearchSpec, device: str) -> _Loaded:
    data = spec.data
    source = load_source(spec.model, device, spec.dtype)
    texts = [
        read_text(source, text, role, n, data.seq_len, spec.seed)
        for text, role, n in (
            (data.calibration, "calibration", data.n_calibration),
            (data.evaluation, "search", data.n_evaluation),
            (data.heldout, "heldout", data.n_heldout),
        )
    ]
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            check_disjoint(a, b)
    return _Loaded(source, *texts)


def _teachers(spec: SearchSpec, loaded: _Loaded, clock: StageClock) -> tuple[EvaluationSet, EvaluationSet]:
    """Teachers of the evaluation and the held-out text; both before the first swap."""
    sets = []
    for tokens in (loaded.evaluation, loaded.heldout):
        name = f"{loaded.source.digest[:16]}-{tokens.digest[:16]}-{spec.dtype}.safetensors"
        path = cache_dir(spec.cache) / "teachers" / name
        clock("teacher", 0, len(tokens.tokens))
        teacher = store_teacher(path, loaded.source.map.model, tokens.tokens, progress=clock)
        sets.append(EvaluationSet(tokens, teacher))
    return sets[0], sets[1]


def _bank(spec: SearchSpec, loaded: _Loaded, names: tuple[str, ...], clock: StageClock) -> Bank:
    key = bank_key(loaded.source.digest, loaded.calibration.digest, spec.quant)
    facts = {**loaded.source.facts(), "calibration": loaded.calibration.provenance(), "settings": asdict(spec.quant)}
    bank = open_bank(cache_dir(spec.cache) / "banks", key, loaded.source.map.inventory, {**facts, "versions": versions()})
    clock("bank", 0, len(loaded.source.map.layers))
    fill_bank(bank, loaded.source.map, loaded.calibration.tokens, names, spec.quant, progress=clock)
    bank.verify(names)
    return bank


def _problem(space: SearchSpace, table: CostTable) -> Problem:
    costs = unit_costs(table, space.units)
    columns = [table.formats.index(name) for name in space.menu]
    formats = [parse_format(name) for name in space.menu]
    return make_problem(
        space.units,
        space.menu,
        np.array([[u.storage_bits(f) for f in formats] for u in space.units], dtype=np.int64),
        np.array([[name in space.allowed(u) for name in space.menu] for u in space.units]),
        {"fisher": costs.fisher[:, columns], "error": costs.error[:, columns]},
        costs.n_tokens,
        space.inventory.n_layers,
    )


def _run_trials(
    spec: SearchSpec,
    study: optuna.Study,
    rules: TrialRules,
    objective: Objective,
    evaluation: EvaluationSet,
    table: CostTable,
    folder: RunFolder,
    clock: StageClock,
    on_trial: OnTrial,
) -> list[TrialRow]:
    """Run what the study lacks; every finished trial is in the storage before the next one starts."""
    planned = rules.planned(bank_formats(rules.space))
    rows = finished_rows(study)
    started = time.monotonic()
    failures = 0
    while len(rows) < spec.trials:
        clock("study", len(rows), spec.trials)
        if rows and spec.timeout is not None and time.monotonic() - started > spec.timeout:
            logger.warning("stopped after %d of %d trials: timeout of %g s", len(rows), spec.trials, spec.timeout)
            break
        trial = next_trial(study, planned, spec.sampler, spec.seed, rules.pin(len(rows)))
        proposal = rules.propose(trial)
        row = _evaluate(proposal, trial.number, rows, rules.space, objective, evaluation, table)
        folder.save_assignment(proposal.assignment)
        if not np.isfinite(row.kl):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            failures += 1
            if failures >= MAX_FAILURES:
                raise ModelError(
                    f"{failures} trials gave a KL that is not finite, last {proposal.origin}; use --dtype float32, or leave out the "
                    "smallest formats with --formats"
                )
            continue
        finish_trial(study, trial, row)
        rows.append(row)
        on_trial(row)
    clock("study", len(rows), max(spec.trials, len(rows)))
    return rows


def _evaluate(
    proposal: Proposal,
    number: int,
    rows: list[TrialRow],
    space: SearchSpace,
    objective: Objective,
    evaluation: EvaluationSet,
    table: CostTable,
) -> TrialRow:
    """Measure a proposal, or take over the numbers of an equal one."""
    assignment = proposal.assignment
    assert space.is_feasible(assignment), f"{proposal.origin} is over the budget"
    same = find_duplicate(rows, assignment.digest)
    if same is not None:
        taken = {**asdict(same), "number": number, "origin": proposal.origin, "gap": proposal.gap}
        return TrialRow(**{**taken, "seconds": 0.0, "duplicate_of": same.number})
    measured = objective.measure(assignment, evaluation)
    counts = assignment.count_bits(space.inventory)
    predicted = predict_kl(table, space, assignment)
    return make_row(number, proposal.origin, assignment.digest, counts, measured, predicted, proposal.gap)


