"""`search`: from a specification to a front of configurations.

Stages: load (model, texts), teacher (the original's predictions), hessians and bank (every matrix
in every format), costs, study, gate (held-out text), report. Banks, costs and teachers are kept in
the cache and found again by digest; trials are kept in the study. The same specification gives the
same trials, and running it again resumes where it stopped.

Everything that can be refused is refused before the output directory is made: names and ranges
first, then whose directory it is, then the model with its space, then the texts.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import optuna
import torch

from alphaquant.commands.searching.claim import claimed
from alphaquant.commands.searching.fitting import fitted
from alphaquant.commands.searching.outcome import (
    decorated,
    provenance_of,
    write_found,
    write_result,
)
from alphaquant.commands.searching.recipes import run_recipes
from alphaquant.commands.searching.request import Request, check_places, found_request
from alphaquant.evaluators.base import Score
from alphaquant.files import in_use
from alphaquant.models.loading import load_skeleton, working_dtype
from alphaquant.models.mapping import map_model
from alphaquant.progress import Progress, Stage, StageClock, no_progress, of_total
from alphaquant.quant.foreign.candidates import Candidates, find_candidates
from alphaquant.quant.swap import Swapper
from alphaquant.reports.notes import TrialNotes, begin_study_note, study_note
from alphaquant.reports.tables import with_error
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.menus import parse_menu
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory
from alphaquant.specs.check import check_kind
from alphaquant.specs.flat import replaced
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import bank_formats, check_bank
from alphaquant.studies.gate.judge import GateResult, judge
from alphaquant.studies.inputs import (
    USERS,
    Source,
    cache_dir,
    load_source,
    model_location,
    model_notes,
)
from alphaquant.studies.loop import OnTrial, TrialLoop
from alphaquant.studies.objective import Objective, SearchObjective
from alphaquant.studies.planning.estimate import (
    Machine,
    Plan,
    check_room,
    fitting_plan,
    plan_stages,
)
from alphaquant.studies.planning.needs import Needs
from alphaquant.studies.planning.pilot import UNKNOWN
from alphaquant.studies.planning.shares import crew_of
from alphaquant.studies.preparing import Prepared, check_constraints, open_scorer, prepare
from alphaquant.studies.program import Run, run_program
from alphaquant.studies.result import SearchResult, front_of
from alphaquant.studies.shared.spread_rounds import SpreadRounds
from alphaquant.studies.shared.staffing import with_workers, worker_source
from alphaquant.studies.sizing import size_lines, sized
from alphaquant.studies.stages import LOAD_STEPS, load_inputs
from alphaquant.studies.store.folder import RunFolder, effort_in, locked_folder
from alphaquant.studies.trials import Proposer, constraints_of
from alphaquant.studies.truth import ChoiceTruth

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Told a line for people."""


def search(
    spec: SearchSpec,
    *,
    progress: Progress = no_progress,
    on_trial: OnTrial = lambda row: None,
    tell: Tell = lambda line: None,
) -> SearchResult:
    """Search formats for a model under a budget and write the results to `spec.run.out`.

    Args:
        spec: what to search.
        progress: called with a stage's name, steps done, steps.
        on_trial: called after each trial.
        tell: called with lines for people: the sizes that were chosen.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    check_kind(spec, SearchSpec, "run_search")
    spec, lines = fitted(spec, progress)
    for line in lines:
        tell(line)
    request = found_request(spec)
    check_places(spec)
    users = cache_dir(spec.run.cache) / USERS
    with locked_folder(spec.run.out) as lease, in_use(users, "the cache"):

        def held(stage: str, done: int, total: int) -> None:
            lease.check()
            progress(stage, done, total)

        return _search(spec, request, StageClock(held), on_trial, tell)


def plan_search(
    spec: SearchSpec, *, progress: Progress = no_progress, tell: Tell = lambda line: None
) -> Plan:
    """What a search will take on this machine, found without weights; nothing is written.

    But for a GGUF file, which is decoded into the cache first.

    Args:
        spec: what would be searched.
        progress: called with a stage's name, steps done, steps.
        tell: called with lines for people: what is in the memory of a GPU.

    Raises:
        AlphaQuantError: bad input, or what does not fit; see `alphaquant.studies.planning`.
    """
    check_kind(spec, SearchSpec, "plan_search")
    spec, lines = fitted(spec, progress)
    for line in lines:
        tell(line)
    request, asked, cache = found_request(spec), spec.checkpoint, cache_dir(spec.run.cache)
    location = model_location(asked.model, spec.run.cache, progress)
    model_map = map_model(load_skeleton(location), include=request.include)
    config: Any = model_map.model.config
    dtype = working_dtype(asked.model, config, request.device, asked.dtype)
    found = config.dtype if isinstance(dtype, str) else dtype
    space, _ = _space(spec, request, model_map.inventory)
    check_constraints(space, constraints_of(spec.limits))
    check_bank(spec, space)
    machine = Machine(torch.device(request.device), found or torch.float32, progress)
    plan = fitting_plan(spec, model_map, space, machine, has_copy=False)
    check_room(plan, cache)
    return plan


def _search(
    spec: SearchSpec, request: Request, clock: StageClock, on_trial: OnTrial, tell: Tell
) -> SearchResult:
    """The stages, in an output directory that no other process works on."""
    started = time.monotonic()
    clock(Stage.LOAD, 0, LOAD_STEPS)
    asked = spec.checkpoint
    original = None
    if asked.rotate is not None:
        original = _load(spec, request, of_total(clock, Stage.LOAD, 0))
    progress = of_total(clock, Stage.LOAD, LOAD_STEPS)
    source = _load(spec, request, progress, asked.rotate)
    for note in model_notes(source.map):
        logger.warning("%s", note)
    own = worker_source(
        *(source, asked.dtype, request.include, spec.run.cache),
        rotate=asked.rotate,
        scratch=spec.run.scratch,
    )
    with with_workers(source, spec.run.workers, spec.run.cluster, own, tell) as staffed:
        sources = (staffed, original)
        return _search_with(spec, request, sources, (clock, started), on_trial, tell)


def _search_with(
    spec: SearchSpec,
    request: Request,
    sources: tuple[Source, Source | None],
    clocks: tuple[StageClock, float],
    on_trial: OnTrial,
    tell: Tell,
) -> SearchResult:
    """The stages behind the model.

    Args:
        spec: what was asked.
        request: what was found of it before the model was loaded.
        sources: what is searched, and the original where that is rotated.
        clocks: that of the stages, and when the search began.
        on_trial: see `search`.
        tell: likewise.
    """
    (clock, started), (source, original) = clocks, sources
    space, candidates = _space(spec, request, source.map.inventory)
    check_constraints(space, constraints_of(spec.limits))
    check_bank(spec, space)
    spec = _sized(spec, source, space, clock)
    for line in size_lines(spec):
        tell(line)
    inputs = replace(load_inputs(spec, source, clock), candidates=candidates, original=original)
    with claimed(spec, inputs) as (folder, study):
        if space.idle_budget is not None:
            logger.warning("%s", space.idle_budget)
        begin_study_note(study, study_note(spec, space.menu))
        clock(Stage.LOAD, LOAD_STEPS, LOAD_STEPS)
        prepared = prepare(spec, inputs, space, clock)
        if prepared.teachers.rotated is not None:
            tell(_rotation_line(inputs.source, prepared.teachers.rotated))
        run = _make_run(prepared, folder, study, clock, on_trial)
        if spec.run.limit_seconds is not None:
            run.loop.deadline = started + spec.run.limit_seconds
        findings = run_program(run)
        run.loop.end()
    gate = _judge(run, prepared)
    objective = run.truth.objective
    result = SearchResult(
        spec=spec,
        space=space,
        rows=tuple(run.loop.rows),
        gate=gate,
        seconds={},
        n_measured=objective.n_evaluations,
        n_passes=objective.n_passes,
        probe=findings.probe,
        stopped=findings.stopped,
        provenance=provenance_of(prepared, request.device),
        folder=folder,
        scores=inputs.scores,
        original_perplexity=prepared.teachers.heldout.teacher.perplexity,
    )
    if spec.run.recipes:
        write_found(result, clock)  # it is there however long recipes take
        limit = spec.run.limit_seconds
        recipes = run_recipes(
            prepared,
            gate.published,
            lambda rotate: _load(spec, request, of_total(clock, Stage.LOAD, 0), rotate),
            math.inf if limit is None else started + limit,
            clock,
        )
        result = replace(result, recipes=recipes)
    return decorated(write_result(result, clock, inputs.source.map.source), inputs)


def _load(
    spec: SearchSpec,
    request: Request,
    progress: Progress,
    rotate: int | None = None,
) -> Source:
    """The model that is asked for, as it is or rotated."""
    return load_source(
        *(spec.checkpoint.model, request.device, spec.checkpoint.dtype),
        include=request.include,
        cache=spec.run.cache,
        rotate=rotate,
        progress=progress,
        scratch=spec.run.scratch,
    )


def _rotation_line(source: Source, rotated: Score) -> str:
    """What a rotation did, for people."""
    facts = source.facts()["rotation"]
    grown = "; tied embeddings are untied, the head counts on its own" * facts["is_untied"]
    return (
        f"residual stream rotated by {facts['matrix']}, seed {facts['seed']}: KL of the rotated "
        f"weights, not quantized, {with_error(rotated.value, rotated.stderr or 0.0)}{grown}"
    )


class _Space(NamedTuple):
    """A space, and the candidates that it is of, if any."""

    space: SearchSpace
    candidates: Candidates | None = None


def _space(spec: SearchSpec, request: Request, inventory: Inventory) -> _Space:
    """Units with the formats that they may take: those of the menu, or of the candidates.

    Raises:
        AlphaQuantError: nothing reaches the budget, or a candidate cannot be one.
    """
    names = spec.limits.candidate_names
    if not names:
        return _Space(make_space(inventory, request.profile, request.menu, request.budget))
    found = find_candidates(names, inventory)
    menu = parse_menu(",".join(found.menu))
    space = make_space(inventory, request.profile, menu, request.budget, found.held)
    return _Space(space, found)


def _sized(spec: SearchSpec, source: Source, space: SearchSpace, clock: StageClock) -> SearchSpec:
    """The specification without open sizes, checked against the room that there is.

    With a time limit the effort is that of a search that is taken up again, or else what fits.
    """
    parameter = next(source.map.model.parameters())
    if spec.run.time_limit is None:
        spec = sized(spec, source.map)
        needs = Needs(spec, source.map, space, parameter.itemsize)
        crew = crew_of(spec.run, parameter.device)
        plan = plan_stages(needs, UNKNOWN, has_copy=True, crew=crew)
    else:
        known = None if spec.run.overwrite else effort_in(spec.run.out)
        spec = spec if known is None else replaced(spec, effort=known)
        machine = Machine(parameter.device, parameter.dtype, clock)
        plan = fitting_plan(
            spec, source.map, space, machine, has_copy=True, is_known=known is not None
        )
    check_room(plan, cache_dir(spec.run.cache))
    return plan.spec


def _make_run(
    prepared: Prepared,
    folder: RunFolder,
    study: optuna.Study,
    clock: StageClock,
    on_trial: OnTrial,
) -> Run:
    """What the steps of a program share."""
    spec, space = prepared.spec, prepared.space
    source, texts = prepared.inputs.source, prepared.teachers
    scorer = open_scorer(prepared, clock)
    log = prepared.log_of(texts.evaluation)
    swapper = Swapper(source.map, prepared.bank.layer)
    objective = SearchObjective(swapper, texts.evaluation, log, spread=_spread(prepared))
    proposer = Proposer(
        space,
        prepared.problem,
        spec.proposals.seed,
        constraints_of(spec.limits),
        prepared.costs.lacking,
    )

    def predict(assignment: Assignment) -> float:
        return prepared.costs.predict_kl(space, assignment)

    notes = TrialNotes(spec, prepared.inputs.source.map.inventory, folder)
    return Run(
        spec=spec,
        proposer=proposer,
        loop=TrialLoop(spec, study, objective, predict, folder, clock, on_trial, notes, scorer),
        truth=ChoiceTruth(objective, proposer.spread),
        clock=clock,
    )


def _judge(run: Run, prepared: Prepared) -> GateResult:
    """The comparison with uniform formats on held-out text."""
    heldout = prepared.teachers.heldout
    front = front_of(run.loop.rows, prepared.inputs.scores.objectives)
    rows = {row.digest: row for row in (*front, run.best())}
    points = [(row, run.loop.assignment(row)) for row in rows.values()]
    objective = Objective(run.truth.objective.swapper, spread=_spread(prepared))
    names = [n for n in bank_formats(prepared.space) if run.proposer.keeps_uniform(n)]
    return judge(
        objective,
        heldout,
        prepared.space,
        points,
        names,
        prepared.log_of(heldout),
        objectives=prepared.inputs.scores.objectives,
        progress=run.clock,
    )


def _spread(prepared: Prepared) -> SpreadRounds | None:
    """What measures trials by workers; None where there are none."""
    workers = prepared.inputs.source.workers
    return None if workers is None else SpreadRounds(workers, prepared.bank.path)
