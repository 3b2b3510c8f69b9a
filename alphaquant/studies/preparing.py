"""Everything that a search's trials need: the stages before its study, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from alphaquant.costs.spectra import UnitSpectra, stored_spectra, unit_spectra
from alphaquant.evaluators.scores import Scorer, open_scores
from alphaquant.progress import Stage, StageClock
from alphaquant.quant.bank import Bank
from alphaquant.search.arrays import BoolArray, FloatArray
from alphaquant.search.problem import COSTS, OPTIONAL_COSTS, Problem, make_problem
from alphaquant.search.side.constraints import SideConstraints, check_reachable
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.space import SearchSpace
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import Costs, fill_and_measure, needed
from alphaquant.studies.inputs import cache_dir
from alphaquant.studies.objective import EvaluationSet
from alphaquant.studies.stages import Inputs, Teachers, store_teachers
from alphaquant.studies.store.scores import EvaluationLog


def measure_unit_spectra(
    spec: SearchSpec, inputs: Inputs, space: SearchSpace, clock: StageClock
) -> UnitSpectra | None:
    """Spectra of every unit's weights; None where no allocator that is asked for uses them."""
    if not needed(spec) & {"alpha", "alpha_plain", "variance"}:
        return None
    source, n_layers = inputs.source, len(inputs.source.map.layers)
    folder, seed = cache_dir(spec.run.cache) / "spectra", spec.proposals.seed
    clock(Stage.SPECTRA, 0, n_layers)
    found = stored_spectra(folder, source.digest, source.map, seed=seed, progress=clock)
    clock(Stage.SPECTRA, n_layers, n_layers)
    return unit_spectra(found, space.units)


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
    tables = {name: getattr(found, name) for name in (*COSTS, *OPTIONAL_COSTS)}
    measured = {name: table[:, columns] for name, table in tables.items() if table is not None}
    is_known = ~np.isnan(measured["fisher"])
    known = {name: np.nan_to_num(table) for name, table in measured.items()}
    return _problem(space, known, found.n_tokens, features, is_known)


def _problem(
    space: SearchSpace,
    costs: Mapping[str, FloatArray],
    n_tokens: FloatArray,
    features: Mapping[str, FloatArray],
    is_known: BoolArray | None = None,
) -> Problem:
    """The allocation problem of a space with any costs, float64 [U, F], where they are known."""
    formats = [parse_format(name) for name in space.menu]
    allowed = np.array([[name in space.allowed(u) for name in space.menu] for u in space.units])
    return make_problem(
        space.units,
        space.menu,
        np.array([[u.storage_bits(f) for f in formats] for u in space.units], dtype=np.int64),
        allowed if is_known is None else allowed & is_known,
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
        bank: every matrix in every format, or in those that can win.
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
    """Teachers, spectra where they are needed, bank, costs and problem, in this order."""
    teachers = store_teachers(spec, inputs, clock)
    spectra = measure_unit_spectra(spec, inputs, space, clock)
    bank, costs = fill_and_measure(spec, inputs, space, clock)
    problem = problem_of(space, costs, spectra)
    return Prepared(spec, inputs, space, teachers, bank, costs, problem)


def open_scorer(prepared: Prepared, clock: StageClock) -> Scorer:
    """What measures the scores that are asked for; the original's weights must be in place."""
    source, table, plan = prepared.inputs.source, prepared.costs.table, prepared.inputs.scores
    if not plan.measured:
        return Scorer(plan)
    tokens = prepared.teachers.evaluation.tokens.tokens
    clock(Stage.SCORES, 0, len(tokens))
    shares = dict(zip(table.matrices, table.active_share.tolist(), strict=True))
    scorer = open_scores(plan, source.map, tokens, shares, clock)
    clock(Stage.SCORES, len(tokens), len(tokens))
    return scorer
