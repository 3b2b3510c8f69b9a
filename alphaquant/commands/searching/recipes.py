"""The study of recipes behind a search: how `best.json` is quantized."""

import time
from collections.abc import Callable

from alphaquant.commands.searching.claim import opened_study
from alphaquant.errors import ModelError
from alphaquant.evaluators.divergence import Divergence
from alphaquant.models.mapping import device_of
from alphaquant.progress import StageClock
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.quantizer import settings_of
from alphaquant.studies.inputs import Source
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.preparing import Prepared
from alphaquant.studies.recipes.choices import Recipe
from alphaquant.studies.recipes.comparing import RecipeFindings, RecipeStudy
from alphaquant.studies.recipes.measuring import RecipeBench
from alphaquant.studies.shared.spread_rounds import SpreadRounds

Load = Callable[[int | None], Source]
"""Loads the model that is asked for, rotated with a seed or as it is."""


def run_recipes(
    prepared: Prepared, assignment: Assignment, load: Load, until: float, clock: StageClock
) -> RecipeFindings:
    """The study of recipes of an assignment.

    Args:
        prepared: what was made before the trials.
        assignment: of `best.json`.
        load: gives the model with the original's weights.
        until: seconds of `time.monotonic` after which no trial starts.
        clock: told how far the stage is.
    """
    spec, inputs = prepared.spec, prepared.inputs
    source, seed = inputs.source, spec.proposals.seed
    own = Recipe(settings_of(spec.quantizer), inputs.calibration.name, spec.checkpoint.rotate)

    def open_source(rotate: int | None) -> Source:
        """See `OpenSource`."""
        if rotate == own.rotate:  # trials of other scores leave their own weights
            return load(rotate) if inputs.scores.measured else source
        if device_of(source.map.model).type != "cpu":
            raise ModelError("a rotated copy would need the memory of a second model on the GPU")
        return load(rotate)

    def measured(on: EvaluationSet) -> Divergence:
        """The search's own recipe, which its bank and log have."""
        workers = source.workers
        spread = None if workers is None else SpreadRounds(workers, prepared.bank.path)
        objective = Objective(Swapper(source.map, prepared.bank.layer), spread=spread)
        return objective.divergences([assignment], on, prepared.log_of(on))[0]

    bench = RecipeBench(
        *(own, assignment, prepared.space.budget, inputs.calibration),
        *(open_source, spec.run.cache, spec.run.out, clock),
    )
    with opened_study(spec, inputs, assignment) as study:
        found = RecipeStudy(
            *(study, bench, measured, spec.proposals.sampler, seed, spec.run.recipes),
            *(lambda: time.monotonic() > until, clock),
        ).run(prepared.teachers.evaluation, prepared.teachers.heldout)
    bench.close()  # not where it is stopped: layers that are rounded are not rounded again
    return found
