"""What a search leaves behind: front.json, best.json and configs, trials.csv, report.md and .html.

All are written from one `SearchResult`, so their numbers agree. Only what passed the held-out gate
has a configuration.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from alphaquant.errors import AlphaQuantError
from alphaquant.evaluators.base import Metric
from alphaquant.reports import sections
from alphaquant.reports.bits import bit_lines
from alphaquant.reports.cautions import source_cautions
from alphaquant.reports.front import FrontRow, config_name, front_rows, origin_of
from alphaquant.reports.html import report_html
from alphaquant.reports.recipes import (
    RECIPE_FILE,
    RECIPES_HEAD,
    recipe_summary,
    recipes_json,
    recipes_text,
    to_use,
    verdict_text,
)
from alphaquant.reports.shell import evaluate_command, use_command
from alphaquant.reports.tables import aligned, columns, narrowed, with_error, wrapped
from alphaquant.reports.verdict import headline, sentence, why_text, winner_text
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.config import config_from_assignment, dump_config, load_config
from alphaquant.studies.gate.judge import HeldoutRow
from alphaquant.studies.result import SearchResult, stage_gains
from alphaquant.studies.store.study import OBJECTIVES, TrialRow, find_duplicate

FRONT_VERSION = 2


def write_configs(result: SearchResult) -> None:
    """Write best.json and one configuration per published point; older points are removed."""
    folder = result.folder
    for row in result.gate.points:
        folder.write_text(config_name(row), config_text(result, row))
        if result.gate.is_best(row):
            folder.write_text("best.json", config_text(result, row))
    _write_recipe(result)
    wanted = {folder.path / config_name(row) for row in result.gate.points}
    for pattern in ("trial-*.json", "uniform-*.json"):
        for path in set((folder.path / "configs").glob(pattern)) - wanted:
            path.unlink()


def write_report(result: SearchResult) -> None:
    """Write front.json, trials.csv, report.md and report.html."""
    result.folder.write_json("front.json", front_json(result))
    result.folder.write_text("trials.csv", trials_frame(result).to_csv(index=False))
    result.folder.write_text("report.md", report_text(result))
    result.folder.write_text("report.html", report_html(result))


def _write_recipe(result: SearchResult) -> None:
    """Write recipe.json where another recipe is better; one of another best.json goes."""
    found, path = result.recipes, result.folder.path / RECIPE_FILE
    if found is not None and found.is_better and found.served is not None:
        row, rotate = result.gate.published_row, found.served.recipe.rotate
        summary = recipe_summary(found, _summary(result, row))
        config = config_from_assignment(
            result.published, result.space.inventory, summary, rotate=rotate
        )
        result.folder.write_text(RECIPE_FILE, dump_config(config))
    elif found is not None or not _is_of(path, result.published):
        path.unlink(missing_ok=True)


def _is_of(path: Path, assignment: Assignment) -> bool:
    """Whether a configuration of an earlier run is one of this assignment."""
    try:
        summary = load_config(path).summary or {}
    except (OSError, AlphaQuantError):
        return False
    return summary.get("assignment_digest") == assignment.digest


def config_text(result: SearchResult, row: HeldoutRow) -> str:
    """A configuration with the numbers of its trial, if it was one, and of the gate."""
    rotate, inventory = result.spec.checkpoint.rotate, result.space.inventory
    assignment, summary = assignment_of(result, row), _summary(result, row)
    return dump_config(config_from_assignment(assignment, inventory, summary, rotate=rotate))


def _summary(result: SearchResult, row: HeldoutRow) -> dict[str, Any]:
    """What a configuration says of its search."""
    data, assignment = result.provenance.data, assignment_of(result, row)
    trial = _trial(result, row)
    return {
        "budget": result.spec.limits.budget,
        **asdict(assignment.count_bits(result.space.inventory)),
        "profile": result.space.profile_name,
        "study": result.spec.run.study,
        "trial": None if trial is None else trial.number,
        "origin": origin_of(result, row),
        "scores": [] if trial is None else _scores(trial, result.scores.metrics),
        "heldout": [asdict(row)],
        **({"why": why_text(result)} if result.gate.is_best(row) else {}),
        "assignment_digest": assignment.digest,
        "model": result.provenance.model,
        "model_digest": result.provenance.model_digest,
        "calibration": data["calibration"],
        "evaluation": data["search"],
        "heldout_text": data["heldout"],
        "quantization": asdict(result.spec.quantizer),
        **_candidates(result),
        "versions": result.provenance.versions,
    }


def _candidates(result: SearchResult) -> dict[str, Any]:
    """Which checkpoints a search was among, and the bank that holds their matrices."""
    names = result.spec.limits.candidate_names
    if not names:
        return {}
    return {"candidates": {"directories": list(names), "bank": result.provenance.bank}}


def front_json(result: SearchResult) -> dict[str, Any]:
    """The published front with everything that the report says, for programs."""
    gate = result.gate
    best = {"winner": gate.winner, "searched": gate.best_name, "config": "best.json"}
    best["why"] = why_text(result)
    return {
        "version": FRONT_VERSION,
        "budget": result.spec.limits.budget,
        "limit_bits": result.space.limit_bits,
        "counting_rule": counting_rule(),
        "profile": result.space.profile_name,
        "menu": list(result.space.menu),
        "n_units": len(result.space.units),
        "best": {**best, **asdict(result.counts)},
        "headline": headline(result).text,
        "original": {"bf16_bytes": result.bf16_bytes, "perplexity": result.original_perplexity},
        "front": [_point(result, row) for row in gate.points],
        "withheld": [row.name for row in gate.withheld],
        "heldout": [asdict(row) for row in gate.rows],
        "stages": [asdict(gain) for gain in stage_gains(result.rows, result.limit)],
        "probe": _probe_json(result),
        "recipes": None if result.recipes is None else recipes_json(result.recipes),
        "objectives": [*OBJECTIVES, *(m.name for m in result.scores.objectives)],
        "n_trials": len(result.rows),
        "stopped": result.stopped,
        "n_measured": result.n_measured,
        "n_passes": round(result.n_passes, 3),
        "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
        "provenance": result.provenance.as_json(),
        "settings": result.spec.facts(),
    }


def trials_frame(result: SearchResult) -> pd.DataFrame:
    """One row per trial."""
    frame = pd.DataFrame([_flat(row) for row in result.rows])
    frame["duplicate_of"] = frame["duplicate_of"].astype("Int64")
    on_front = {row.number for row in result.front_trials}
    frame["on_front"] = [n in on_front for n in frame["number"]]
    published = {row.trial for row in result.gate.points}
    frame["is_published"] = [n in published for n in frame["number"]]
    return frame


def summary_text(result: SearchResult, width: int | None = None) -> str:
    """What the command prints: the front, the three bit counts, the winner, the next step.

    Args:
        result: what was found.
        width: characters of the screen; columns that do not fit are left out. None for all.
    """
    is_above = any(not row.is_within_budget for row in result.gate.points)
    marks = "* best, ^ above the budget" if is_above else "* best"
    n_withheld = len(result.gate.withheld)
    withheld = [f"withheld, not better beyond noise: {n_withheld}; see report.md"]
    best = result.folder.path / "best.json"

    def paragraph(text: str) -> list[str]:
        return textwrap.wrap(text, min(width or 80, 80), break_long_words=False)

    return "\n".join(
        [
            f"front of {result.provenance.model} at {result.spec.limits.budget} "
            f"(held-out text; {marks})",
            _summary_table(result, width),
            *(withheld if n_withheld else []),
            f"configurations: {result.folder.path / 'configs'}/",
            "",
            *(wrapped(line, width, len("whole checkpoint ")) for line in bit_lines(result.counts)),
            *paragraph(counting_rule()),
            "",
            *paragraph(headline(result).text),
            *paragraph(winner_text(result)),
            f"best: {best}",
            *paragraph(f"why: {why_text(result)}"),
            *(paragraph(verdict_text(result.recipes)) if result.recipes else []),
            f"next: {use_command(result.spec, to_use(result))}",
        ]
    )


def _summary_table(result: SearchResult, width: int | None) -> str:
    head = ("trial", "bits", "MB", "KL +- stderr", "uniform", "its KL", "same top", "from")
    rows = [_summary_row(row) for row in front_rows(result)]
    kept = narrowed(head, rows, width, ("from", "same top", "MB", "its KL", "uniform"))
    return aligned(kept, columns(head, rows, kept), left=("uniform", "from"))


def trial_line(row: TrialRow) -> str:
    """One line about a finished trial: number, origin, bits, KL, seconds."""
    same = "" if row.duplicate_of is None else f" = trial {row.duplicate_of}"
    early = f" after {len(row.kl_per_window)} windows" if row.is_pruned else ""
    return (
        f"trial {row.number}: {row.origin}{same}, {row.bits_per_weight:.3f} bits, "
        f"KL {with_error(row.kl, row.kl_stderr)}{early}, {row.seconds:.1f} s"
    )


def trial_note(row: TrialRow) -> str:
    """A trial in 21 characters, for beside a progress bar."""
    return f"{row.kl:.6f} at {row.bits_per_weight:.2f} bits"


def report_text(result: SearchResult) -> str:
    """report.md."""
    said = headline(result).text
    parts = [
        f"# {sections.model_name(result.provenance.model)} at {result.spec.limits.budget}",
        f"{sentence(said)}.",
        f"The result: {winner_text(result)}.",
        f"Why this one: {why_text(result)}.",
        *source_cautions(result.provenance),
        "## Size of best.json",
        "\n".join(f"    {line}" for line in bit_lines(result.counts)),
        counting_rule(),
        "## Published points (held-out text)",
        sections.published_table(result),
        sections.files_table(result),
        sections.FRONT_NOTE,
        "## Withheld points",
        sections.withheld_text(result),
        "## The best trial by domain",
        sections.domain_text(result),
        *_scores_section(result),
        "## Other uniform formats",
        sections.uniform_table(result),
        "## What each stage gained (evaluation text, within the budget)",
        sections.gains_table(result),
        "## Costs and truth",
        sections.costs_text(result),
        *_recipes_section(result),
        "## The search",
        sections.search_text(result),
        "## Seconds per stage (this run; what the cache or the study held is not repeated)",
        sections.seconds_table(result),
        "## Calibration coverage",
        sections.coverage_text(result),
        "## Next",
        "\n".join(f"    {command}" for command in _next_commands(result, to_use(result))),
    ]
    return "\n\n".join(parts) + "\n"


def _next_commands(result: SearchResult, config: Path) -> list[str]:
    """How to make files of the winner, and to measure ours; engines measure theirs."""
    evaluate = evaluate_command(result.spec.checkpoint.model)
    return [
        use_command(result.spec, config),
        *([] if result.space.profile.export else [evaluate]),
    ]


def _recipes_section(result: SearchResult) -> list[str]:
    found = result.recipes
    return [] if found is None else [RECIPES_HEAD, recipes_text(found)]


def _scores_section(result: SearchResult) -> list[str]:
    text = sections.scores_text(result)
    return ["## Other scores of published trials", text] if text else []


def assignment_of(result: SearchResult, row: HeldoutRow) -> Assignment:
    """The assignment of a published row."""
    if row.trial is None:
        return uniform_assignment(result.space.inventory, row.name)
    return result.folder.load_assignment(row.digest)


def _trial(result: SearchResult, row: HeldoutRow) -> TrialRow | None:
    """The complete trial of a row, which a uniform format need not have."""
    return find_duplicate([r for r in result.rows if not r.is_pruned], row.digest)


def _point(result: SearchResult, row: HeldoutRow) -> dict[str, Any]:
    trial = _trial(result, row)
    return {
        "name": row.name,
        "config": config_name(row),
        "origin": origin_of(result, row),
        "evaluation": None if trial is None else _public(trial),
        "heldout": asdict(row),
    }


def _probe_json(result: SearchResult) -> dict[str, Any] | None:
    """The probe; JSON has no NaN."""
    if result.probe is None:
        return None
    spearman = {k: None if math.isnan(v) else v for k, v in result.probe.spearman.items()}
    return {**asdict(result.probe), "spearman": spearman}


def _summary_row(row: FrontRow) -> list[str]:
    return [
        f"{row.mark}{'-' if row.trial is None else row.trial}",
        f"{row.bits_per_weight:.3f}",
        row.megabytes,
        row.kl_text,
        row.rival_name,
        row.rival_kl,
        f"{100 * row.same_top:.2f} %",
        row.origin,
    ]


def _scores(row: TrialRow, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    n_samples = len(row.kl_per_window)
    others = [
        {
            "metric": metric.name,
            "value": row.extra[metric.name],
            "stderr": row.extra_stderr.get(metric.name),
            "unit": metric.unit,
        }
        for metric in metrics
        if metric.name in row.extra
    ]
    return [
        {
            "metric": "kl",
            "value": row.kl,
            "stderr": row.kl_stderr,
            "unit": "nats/token",
            "n_samples": n_samples,
        },
        {"metric": "same_top", "value": row.same_top, "unit": "share of positions"},
        {"metric": "perplexity", "value": row.perplexity, "unit": "per token"},
        *others,
    ]


def _flat(row: TrialRow) -> dict[str, Any]:
    """A trial as columns; other scores are columns of their own."""
    own = {k: v for k, v in _public(row).items() if k not in ("extra", "extra_stderr")}
    errors = {f"{name}_stderr": value for name, value in row.extra_stderr.items()}
    return {**own, **row.extra, **errors}


def _public(row: TrialRow) -> dict[str, Any]:
    return {k: v for k, v in asdict(row).items() if k != "kl_per_window"}
