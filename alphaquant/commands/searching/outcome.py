"""What comes of a search: its provenance, its files, and how the study shows them."""

import logging
from dataclasses import replace
from pathlib import Path

from alphaquant.commands.searching.claim import opened_study
from alphaquant.commands.searching.mixes import write_mixes
from alphaquant.costs.fisher import rare_matrices
from alphaquant.models.mapping import device_of
from alphaquant.progress import Stage, StageClock
from alphaquant.provenance import Provenance, device_facts, versions
from alphaquant.quant.place import place_of
from alphaquant.reports.cautions import RARE_TOKENS
from alphaquant.reports.decoration import decorate
from alphaquant.reports.report import write_configs, write_report
from alphaquant.studies.preparing import Prepared
from alphaquant.studies.result import SearchResult
from alphaquant.studies.stages import Inputs

logger = logging.getLogger(__name__)


def provenance_of(prepared: Prepared, device: str) -> Provenance:
    """Where the numbers of a search come from, for its files.

    Args:
        prepared: what was made before the trials.
        device: of the search, as torch names it.
    """
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


def write_found(result: SearchResult, clock: StageClock) -> None:
    """Write the configurations and the report before the recipes of `best.json` are studied."""
    write_configs(result)
    write_report(replace(result, seconds=dict(clock.seconds)))


def write_result(result: SearchResult, clock: StageClock, base: Path | None) -> SearchResult:
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


def decorated(result: SearchResult, inputs: Inputs) -> SearchResult:
    """Show the result in the study too; its files are written, and nothing here may lose them.

    A failure is told on the terminal and kept in front.json.
    """
    try:
        with opened_study(result.spec, inputs) as study:
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
