"""The output directory and the study of a search: claimed for it, and found by what it asks."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import optuna

from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import gguf_facts
from alphaquant.studies.stages import Inputs
from alphaquant.studies.store.folder import RunFolder, claim_folder, default_storage, facts_digest
from alphaquant.studies.store.study import open_study


@contextmanager
def claimed(spec: SearchSpec, inputs: Inputs) -> Iterator[tuple[RunFolder, optuna.Study]]:
    """The output directory and the study, opened for this search.

    A study outside the directory comes first, so that a wrong one leaves no directory.
    """
    facts = _facts(spec, inputs)
    with ExitStack() as stack:
        open_it = opened_study(spec, inputs)
        if spec.run.storage is None:
            yield _folder(spec, facts), stack.enter_context(open_it)
        else:
            study = stack.enter_context(open_it)
            yield _folder(spec, facts), study


def opened_study(
    spec: SearchSpec, inputs: Inputs, recipes_of: Assignment | None = None
) -> AbstractContextManager[optuna.Study]:
    """The study of what is asked, made where there is none; closed on leaving.

    Args:
        spec: what was asked.
        inputs: the model and its texts.
        recipes_of: an assignment, for the study of its recipes; None for that of assignments.

    Raises:
        StoreError: a study of another search, or one that somebody uses.
    """
    url = spec.run.storage or default_storage(spec.run.out)
    facts = _facts(spec, inputs)
    if recipes_of is not None:
        name, own = f"{spec.run.study}-recipes-{recipes_of.digest[:8]}", recipes_of.digest
        return open_study(url, name, facts_digest(facts | {"recipes_of": own}))
    return open_study(url, spec.run.study, facts_digest(facts), inputs.scores.objectives)


def _folder(spec: SearchSpec, facts: Mapping[str, Any]) -> RunFolder:
    run = spec.run
    return claim_folder(
        run.out, facts, overwrite=run.overwrite, storage=run.storage, bucket=run.artifacts
    )


def _facts(spec: SearchSpec, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the trials."""
    return {**spec.facts(), **inputs.digests(), **gguf_facts(inputs.source.map.source)}
