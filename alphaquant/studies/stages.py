"""The stages of a search before its study: load, teacher, bank, costs.

Each returns plain data for the next. What is expensive is kept in the cache and found again by
digest, so a stage that ran before costs a read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alphaquant.costs.fisher import (
    CostSettings,
    CostTable,
    UnitCosts,
    measure_costs,
    unit_costs,
)
from alphaquant.costs.spectra import UnitSpectra, measure_spectra, unit_spectra
from alphaquant.evaluators.scores import ScorePlan, Scorer, open_scores, plan_scores
from alphaquant.evaluators.teacher import TOP_K, store_teacher
from alphaquant.progress import Progress, StageClock, no_progress
from alphaquant.provenance import versions
from alphaquant.quant.bank import Bank, bank_key, fill_bank, open_bank
from alphaquant.search.arrays import FloatArray
from alphaquant.search.problem import COSTS, OPTIONAL_COSTS, Problem, make_problem
from alphaquant.search.side.constraints import SideConstraints, check_reachable
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import REFERENCE_FORMATS
from alphaquant.spaces.space import SearchSpace
from alphaquant.specs.quantizer import QuantSettings, settings_of
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import SOURCE_STEPS, Source, cache_dir, read_text
from alphaquant.studies.objective import EvaluationSet
from alphaquant.studies.store.scores import EvaluationLog
from alphaquant.texts.windows import TokenSet, check_disjoint, shuffled

LOAD_STEPS = SOURCE_STEPS + 4
"""Steps of loading: those of the model, three texts, the output directory with its study."""


@dataclass(frozen=True)
class Inputs:
    """A model with its three texts.

    Attributes:
        source: the model.
        calibration: for Hessians and costs.
        evaluation: what the search sees.
        heldout: for the gate.
        scores: what is measured on the evaluation text besides bits and KL.
    """

    source: Source
    calibration: TokenSet
    evaluation: TokenSet
    heldout: TokenSet
    scores: ScorePlan = field(default_factory=ScorePlan)

    def text_facts(self) -> dict[str, Mapping[str, Any]]:
        """Provenance of the texts, by role."""
        texts = (self.calibration, self.evaluation, self.heldout)
        return {text.role: text.provenance() for text in texts}

    def digests(self) -> dict[str, str]:
        """What trials depend on besides the specification: sha256 of weights and windows."""
        return {
            "weights": self.source.digest,
            "calibration_text": self.calibration.digest,
            "evaluation_text": self.evaluation.digest,
            "heldout_text": self.heldout.digest,
            **self.scores.facts(),
        }


@dataclass(frozen=True)
class Costs:
    """Costs of units in the formats of the bank.

    Attributes:
        table: per matrix, as measured.
        units: per unit of the space.
    """

    table: CostTable
    units: UnitCosts

    def predict_kl(self, space: SearchSpace, assignment: Assignment) -> float:
        """Sum of the Fisher costs of an assignment, nats per token."""
        column = {name: i for i, name in enumerate(self.table.formats)}
        chosen = [column[assignment.formats[u.matrices[0].name]] for u in space.units]
        return float(self.units.fisher[np.arange(len(chosen)), chosen].sum())


def load_inputs(spec: SearchSpec, source: Source, progress: Progress = no_progress) -> Inputs:
    """Find the scores that are asked for, read the three texts, check that they share nothing.

    Args:
        spec: what was asked.
        source: the model.
        progress: called with ("load", steps done, `LOAD_STEPS`) after each text.

    Raises:
        ConfigError: a score that does not exist.
        DataError: a text cannot be found, is too short or overlaps with another.
    """
    data, scores = spec.texts, plan_scores(spec.scores, source.tokenizer, spec.texts.bos)
    texts: list[TokenSet] = []
    for text, role, n_samples in (
        (data.calibration, "calibration", data.calibration_samples),
        (data.evaluation, "search", data.evaluation_samples),
        (data.heldout, "heldout", data.heldout_samples),
    ):
        texts.append(
            read_text(source, text, role, n_samples, data.seq_len, spec.proposals.seed, data.bos)
        )
        progress("load", SOURCE_STEPS + len(texts), LOAD_STEPS)
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            check_disjoint(a, b)
    calibration, evaluation, heldout = texts
    return Inputs(source, calibration, shuffled(evaluation), heldout, scores)


@dataclass(frozen=True)
class Teachers:
    """Predictions of the original; all come before the first swap, which overwrites it.

    Attributes:
        evaluation: what the search sees.
        heldout: for the gate.
    """

    evaluation: EvaluationSet
    heldout: EvaluationSet


def store_teachers(spec: SearchSpec, inputs: Inputs, clock: StageClock) -> Teachers:
    """Compute the original's predictions, or open those of an earlier run."""
    texts = (inputs.evaluation, inputs.heldout)
    total, done = sum(len(t.tokens) for t in texts), 0
    sets = []
    for tokens in texts:
        facts = (inputs.source.digest[:16], tokens.digest[:16], inputs.source.runs_as, str(TOP_K))
        path = cache_dir(spec.run.cache) / "teachers" / f"{'-'.join(facts)}.safetensors"
        clock("teacher", done, total)
        progress = clock.shifted(done, total)
        model = inputs.source.map.model
        teacher = store_teacher(path, model, tokens.tokens, top_k=TOP_K, progress=progress)
        sets.append(EvaluationSet(tokens, teacher))
        done += len(tokens.tokens)
    clock("teacher", total, total)
    return Teachers(*sets)


def bank_formats(space: SearchSpace) -> tuple[str, ...]:
    """What the bank holds: the menu and the formats to compare with, by nominal bits."""
    names = {*space.menu, *REFERENCE_FORMATS}
    return tuple(sorted(names, key=lambda n: (parse_format(n).nominal_bits, n)))


def open_filled_bank(
    spec: SearchSpec, inputs: Inputs, names: tuple[str, ...], clock: StageClock
) -> Bank:
    """The bank of a search with every format in it.

    Raises:
        StoreError: a file of it is damaged.
    """
    n_layers = len(inputs.source.map.layers)
    clock("bank", 0, n_layers)
    bank = fill_source_bank(
        inputs.source,
        inputs.calibration,
        names,
        settings_of(spec.quantizer),
        spec.run.cache,
        clock,
    )
    clock("bank", n_layers, n_layers)
    return bank


def fill_source_bank(
    source: Source,
    calibration: TokenSet,
    names: Sequence[str],
    settings: QuantSettings,
    cache: Path | None,
    progress: Progress,
) -> Bank:
    """The bank of a model, a calibration text and settings, with these formats in it.

    Args:
        source: the model.
        calibration: the text.
        names: formats.
        settings: of the quantizer.
        cache: where banks are kept; None for the default place.
        progress: called with a stage's name, steps done, steps.

    Raises:
        StoreError: a file of it is damaged.
    """
    facts = {
        **source.facts(),
        "calibration": calibration.provenance(),
        "settings": asdict(settings),
        "versions": versions(),
    }
    key = bank_key(source.digest, calibration.digest, settings)
    bank = open_bank(cache_dir(cache) / "banks", key, source.map.inventory, facts)
    fill_bank(bank, source.map, calibration.tokens, names, settings, progress=progress)
    bank.verify(names)
    return bank


def measure_unit_costs(
    spec: SearchSpec, inputs: Inputs, space: SearchSpace, bank: Bank, clock: StageClock
) -> Costs:
    """Costs of every unit in every format of the bank."""
    source, n_layers = inputs.source, len(inputs.source.map.layers)
    clock("costs", 0, n_layers)
    table = measure_costs(
        source.map,
        bank,
        inputs.calibration.tokens,
        bank_formats(space),
        CostSettings(spec.proposals.seed),
        progress=clock,
    )
    clock("costs", n_layers, n_layers)
    return Costs(table, unit_costs(table, space.units))


def problem_of(space: SearchSpace, costs: Costs, spectra: UnitSpectra | None = None) -> Problem:
    """The allocation problem over the menu.

    Args:
        space: units and menu.
        costs: measured costs of every unit.
        spectra: of the weights, for the allocators that use them.
    """
    columns = [costs.table.formats.index(name) for name in space.menu]
    found = costs.units
    features = {"routing_weight": found.routing_weight, "active_share": found.active_share}
    if spectra is not None:
        features |= {"alpha": spectra.alpha_farms, "alpha_plain": spectra.alpha}
        features |= {"variance": spectra.variance}
    measured = {name: getattr(found, name)[:, columns] for name in (*COSTS, *OPTIONAL_COSTS)}
    return _problem(space, measured, found.n_tokens, features)


def _problem(
    space: SearchSpace,
    costs: Mapping[str, FloatArray],
    n_tokens: FloatArray,
    features: Mapping[str, FloatArray],
) -> Problem:
    """The allocation problem of a space with any costs, float64 [U, F]."""
    formats = [parse_format(name) for name in space.menu]
    return make_problem(
        space.units,
        space.menu,
        np.array([[u.storage_bits(f) for f in formats] for u in space.units], dtype=np.int64),
        np.array([[name in space.allowed(u) for name in space.menu] for u in space.units]),
        costs,
        n_tokens,
        space.inventory.n_layers,
        features,
    )


def check_constraints(space: SearchSpace, constraints: SideConstraints) -> None:
    """Refuse side constraints that are out of reach, before anything is measured.

    Raises:
        AlphaQuantError: see `alphaquant.search.side.constraints.check_reachable`.
    """
    n_units, n_formats = len(space.units), len(space.menu)
    no_costs = {name: np.zeros((n_units, n_formats)) for name in COSTS}
    problem = _problem(space, no_costs, np.ones(n_units), {})
    check_reachable(problem, space.limit_bits, constraints)


@dataclass(frozen=True)
class Prepared:
    """Everything that a search's trials need.

    Attributes:
        spec: what was asked.
        inputs: the model and its texts.
        space: units, menu, budget.
        teachers: predictions of the original.
        bank: every matrix in every format.
        costs: of every unit in every format.
        problem: the allocation problem.
    """

    spec: SearchSpec
    inputs: Inputs
    space: SearchSpace
    teachers: Teachers
    bank: Bank
    costs: Costs
    problem: Problem

    def log_of(self, on: EvaluationSet) -> EvaluationLog:
        """What was measured of this bank's assignments on a text, by this and other searches."""
        text, runs_as = on.tokens.digest[:16], self.inputs.source.runs_as
        path = self.bank.path / "evaluations" / f"{text}-{runs_as}.jsonl"
        return EvaluationLog(path, on.tokens.tokens.shape[1])


def prepare(spec: SearchSpec, inputs: Inputs, space: SearchSpace, clock: StageClock) -> Prepared:
    """Teachers, spectra, bank, costs and problem of a search, in this order."""
    teachers = store_teachers(spec, inputs, clock)
    clock("spectra", 0, len(inputs.source.map.layers))
    measured = measure_spectra(inputs.source.map, seed=spec.proposals.seed, progress=clock)
    spectra = unit_spectra(measured, space.units)
    bank = open_filled_bank(spec, inputs, bank_formats(space), clock)
    costs = measure_unit_costs(spec, inputs, space, bank, clock)
    problem = problem_of(space, costs, spectra)
    return Prepared(spec, inputs, space, teachers, bank, costs, problem)


def open_scorer(prepared: Prepared, clock: StageClock) -> Scorer:
    """What measures the scores that are asked for; the original's weights must be in place."""
    source, table, plan = prepared.inputs.source, prepared.costs.table, prepared.inputs.scores
    if not plan.measured:
        return Scorer(plan)
    tokens = prepared.teachers.evaluation.tokens.tokens
    clock("scores", 0, len(tokens))
    shares = dict(zip(table.matrices, table.active_share.tolist(), strict=True))
    scorer = open_scores(plan, source.map, tokens, shares, clock)
    clock("scores", len(tokens), len(tokens))
    return scorer
