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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch

from alphaquant.commands.fitting import fitted
from alphaquant.commands.mixes import write_mixes
from alphaquant.costs.fisher import rare_matrices
from alphaquant.errors import ConfigError
from alphaquant.evaluators.base import Score
from alphaquant.evaluators.scores import check_scores
from alphaquant.files import in_use
from alphaquant.models.dtypes import named_dtype
from alphaquant.models.loading import load_skeleton, working_dtype
from alphaquant.models.mapping import device_of, map_model
from alphaquant.progress import Progress, Stage, StageClock, no_progress
from alphaquant.provenance import Provenance, device_facts, versions
from alphaquant.quant.foreign.candidates import Candidates, find_candidates
from alphaquant.quant.ggml.library import check_formats
from alphaquant.quant.place import place_of
from alphaquant.quant.swap import Swapper
from alphaquant.reports.cautions import RARE_TOKENS
from alphaquant.reports.decoration import decorate
from alphaquant.reports.notes import TrialNotes, begin_study_note, study_note
from alphaquant.reports.report import write_configs, write_report
from alphaquant.reports.tables import with_error
from alphaquant.search.groups import check_grouping
from alphaquant.search.sampler import make_sampler
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.budget import Budget, parse_budget
from alphaquant.spaces.menus import menu_of, parse_menu
from alphaquant.spaces.profiles import Profile, find_profile, included
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory
from alphaquant.specs.check import check_kind
from alphaquant.specs.flat import replaced
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import bank_formats, check_bank, needed
from alphaquant.studies.gate.judge import GateResult, judge
from alphaquant.studies.inputs import (
    USERS,
    Source,
    cache_dir,
    find_device,
    gguf_facts,
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
from alphaquant.studies.shared.staffing import check_workers, with_workers, worker_source
from alphaquant.studies.sizing import size_lines, sized
from alphaquant.studies.stages import LOAD_STEPS, Inputs, load_inputs
from alphaquant.studies.store.artifacts import check_artifacts
from alphaquant.studies.store.folder import (
    RunFolder,
    check_folder,
    check_place,
    claim_folder,
    default_storage,
    effort_in,
    facts_digest,
    locked_folder,
)
from alphaquant.studies.store.study import open_study
from alphaquant.studies.store.urls import check_storage
from alphaquant.studies.trials import Proposer, check_allocators, check_constrained, constraints_of
from alphaquant.studies.truth import ChoiceTruth
from alphaquant.texts.windows import check_sources

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Told a line for people."""


@dataclass(frozen=True)
class _Request:
    """A specification whose names were all found."""

    budget: Budget
    profile: Profile
    menu: tuple[str, ...]
    device: str
    include: tuple[str, ...]


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
    spec, lines = _fitted(spec, progress)
    for line in lines:
        tell(line)
    request = _check(spec)
    _check_places(spec)
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
    spec, lines = _fitted(spec, progress)
    for line in lines:
        tell(line)
    request, asked, cache = _check(spec), spec.checkpoint, cache_dir(spec.run.cache)
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


def _fitted(spec: SearchSpec, progress: Progress) -> tuple[SearchSpec, list[str]]:
    """The specification with a budget, and lines that say how it came about.

    Raises:
        ConfigError: a budget and the memory of a GPU.
    """
    if spec.limits.fit is not None and spec.limits.budget:
        raise ConfigError(
            f"--budget {spec.limits.budget} and --fit {spec.limits.fit}: the second finds a "
            "budget; leave one of the two out"
        )
    return fitted(spec, progress)


def _search(
    spec: SearchSpec, request: _Request, clock: StageClock, on_trial: OnTrial, tell: Tell
) -> SearchResult:
    """The stages, in an output directory that no other process works on."""
    started = time.monotonic()
    clock(Stage.LOAD, 0, LOAD_STEPS)
    steps = clock.counted(Stage.LOAD, LOAD_STEPS)
    asked = spec.checkpoint
    original = None
    if asked.rotate is not None:
        original = _load(spec, request, clock)
    source = _load(spec, request, clock, asked.rotate, steps)
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
    request: _Request,
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
    with _claimed(spec, inputs) as (folder, study):
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
        provenance=_provenance(prepared, request.device),
        folder=folder,
        scores=inputs.scores,
        original_perplexity=prepared.teachers.heldout.teacher.perplexity,
    )
    return _decorated(_write(result, clock, inputs.source.map.source), inputs)


def _load(
    spec: SearchSpec,
    request: _Request,
    clock: StageClock,
    rotate: int | None = None,
    on_step: Callable[[int], None] = lambda n_done: None,
) -> Source:
    """The model that is asked for, as it is or rotated."""
    return load_source(
        *(spec.checkpoint.model, request.device, spec.checkpoint.dtype, on_step),
        include=request.include,
        cache=spec.run.cache,
        rotate=rotate,
        progress=clock,
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


def _space(spec: SearchSpec, request: _Request, inventory: Inventory) -> _Space:
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


def _check(spec: SearchSpec) -> _Request:
    """Find every name in a specification, before anything is loaded.

    Raises:
        AlphaQuantError: a name or number that does not exist.
    """
    budget = parse_budget(spec.limits.budget)
    profile = find_profile(spec.limits.profile, spec.limits.kernels)
    menu = menu_of(spec.limits.formats, profile)
    check_formats(menu)
    make_sampler(spec.proposals.sampler, spec.proposals.seed, 0)
    check_grouping(spec.proposals.grouping)
    _check_rotation(spec)
    check_allocators(spec)
    check_constrained(spec)
    check_scores(spec.scores)
    check_sources(spec.texts.sources, spec.texts.bos)
    device = find_device(spec.checkpoint.device)
    check_workers(spec.run.workers, spec.run.cluster, device)
    if spec.checkpoint.dtype != "auto":
        named_dtype(spec.checkpoint.dtype)
    include = () if spec.limits.candidate_names else included(spec.limits.include, budget, profile)
    _check_allocators_of(spec, include)
    return _Request(budget, profile, menu, device, include)


def _check_rotation(spec: SearchSpec) -> None:
    """Refuse a rotation of what others quantized.

    Raises:
        ConfigError: candidates are of the model as it is.
    """
    if spec.checkpoint.rotate is not None and spec.limits.candidate_names:
        raise ConfigError(
            f"--rotate {spec.checkpoint.rotate} with --candidates: their matrices are of the "
            "model as it is, which a rotated one cannot take; leave one of the two out"
        )


def _check_allocators_of(spec: SearchSpec, include: Sequence[str]) -> None:
    """Refuse allocators that need what is measured of decoder layers alone.

    Raises:
        ConfigError: saying which.
    """
    if include and needed(spec):
        raise ConfigError(
            f"{', '.join(include)} searched with allocators that need "
            f"{', '.join(sorted(needed(spec)))}, which only matrices of decoder layers have; use "
            "--include none, or other --allocators"
        )


def _check_places(spec: SearchSpec) -> None:
    """Look where a search would write.

    Raises:
        AlphaQuantError: a place that cannot be written to, or an `out` that is taken.
    """
    if spec.run.storage is not None:
        check_storage(spec.run.storage)
    if spec.run.artifacts is not None:
        check_artifacts(spec.run.artifacts)
    check_place(spec.run.out, "--out")
    check_place(cache_dir(spec.run.cache), "--cache")
    if spec.run.scratch is not None:
        check_place(spec.run.scratch, "--scratch")
    facts = spec.facts()
    if spec.run.time_limit is not None:  # the effort is found when the model is known
        facts.pop("effort")
    check_folder(spec.run.out, facts, overwrite=spec.run.overwrite)


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


@contextmanager
def _claimed(spec: SearchSpec, inputs: Inputs) -> Iterator[tuple[RunFolder, optuna.Study]]:
    """The output directory and the study, opened for this search.

    A study outside the directory comes first, so that a wrong one leaves no directory.
    """
    facts = _facts(spec, inputs)
    with ExitStack() as stack:
        open_it = _study(spec, inputs)
        if spec.run.storage is None:
            yield _folder(spec, facts), stack.enter_context(open_it)
        else:
            study = stack.enter_context(open_it)
            yield _folder(spec, facts), study


def _folder(spec: SearchSpec, facts: Mapping[str, Any]) -> RunFolder:
    run = spec.run
    return claim_folder(
        run.out, facts, overwrite=run.overwrite, storage=run.storage, bucket=run.artifacts
    )


def _facts(spec: SearchSpec, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the trials."""
    return {**spec.facts(), **inputs.digests(), **gguf_facts(inputs.source.map.source)}


def _study(spec: SearchSpec, inputs: Inputs) -> AbstractContextManager[optuna.Study]:
    url = spec.run.storage or default_storage(spec.run.out)
    digest = facts_digest(_facts(spec, inputs))
    return open_study(url, spec.run.study, digest, inputs.scores.objectives)


def _provenance(prepared: Prepared, device: str) -> Provenance:
    spec, inputs, bank = prepared.spec, prepared.inputs, prepared.bank
    facts, rotated = inputs.source.facts(), prepared.teachers.rotated
    if rotated is not None:
        facts["rotation"] |= {"kl": rotated.value, "kl_stderr": rotated.stderr}
    tokens_per_expert: dict[str, list[int]] = {}
    for layer in range(inputs.source.map.inventory.n_layers):
        tokens_per_expert |= bank.utilization(layer)
    return Provenance(
        **facts,
        data=inputs.text_facts(),
        device=device_facts(device),
        rounded_on=place_of(device_of(inputs.source.map.model)).device.type,
        versions=versions(),
        seed=spec.proposals.seed,
        bank=bank.path.name,
        bank_bytes=bank.n_bytes(),
        calibration_tokens_per_expert=tokens_per_expert,
        rare_matrices=rare_matrices(prepared.costs.table, RARE_TOKENS),
        lacking_formats=tuple(sorted(prepared.costs.lacking)),
        scratch=None if inputs.source.scratch is None else inputs.source.scratch.report(),
    )


def _write(result: SearchResult, clock: StageClock, base: Path | None) -> SearchResult:
    """Write all files; the seconds in them include writing the configurations."""
    clock(Stage.REPORT, 0, 1)
    write_configs(result)
    if result.space.held is not None:
        write_mixes(result, base)
    clock(Stage.REPORT, 1, 1)
    clock.stop()
    result = replace(result, seconds=dict(clock.seconds))
    write_report(result)
    return result


def _decorated(result: SearchResult, inputs: Inputs) -> SearchResult:
    """Show the result in the study too; its files are written, and nothing here may lose them.

    A failure is told on the terminal and kept in front.json.
    """
    try:
        with _study(result.spec, inputs) as study:
            decorate(study, result)
    except Exception as error:  # of any kind: hours of search end here
        problem = " ".join(str(error).split()) or type(error).__name__
        logger.warning(
            "all results are in %s, but the study lacks its note and figures for the dashboard "
            "(%s); run the same command again to add them",
            result.folder.path,
            problem,
        )
        told = replace(result.provenance, dashboard_problem=problem)
        result = replace(result, provenance=told)
        write_report(result)
    return result
