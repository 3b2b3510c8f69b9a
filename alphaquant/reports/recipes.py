"""What a study of recipes found: for people, for programs, and as a configuration."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alphaquant.reports.front import interval_text
from alphaquant.reports.tables import markdown, with_error
from alphaquant.studies.recipes.choices import Option
from alphaquant.studies.recipes.comparing import PROBLEM, RecipeFindings
from alphaquant.studies.result import SearchResult

RECIPES_HEAD = "## Recipes of best.json"

RECIPE_FILE = "recipe.json"
"""The configuration of `best.json` with another recipe, where that is better."""


def recipes_text(found: RecipeFindings) -> str:
    """The trials in words and tables, as Markdown."""
    n_done = sum(not row.is_pruned for row in found.rows)
    parts = [
        f"{len(found.rows)} trials, {n_done} of them measured; the formats are those of "
        f"best.json in all. Stopped because {found.stopped}.",
        verdict_text(found),
        _effects_table(found),
        "KL on the evaluation text of one option changed, the search's own recipe else; the "
        "difference is that of the own recipe minus this, paired by window, so more than 0 is a "
        "gain. Importance is PED-ANOVA over all trials: what tells the better half from all.",
    ]
    for name, why in found.left_out.items():
        parts.append(f"Left out: {name}, because {why}.")
    for number, why in found.problems.items():
        parts.append(f"Trial {number} ({_changes(found, number)}) has no numbers: {why}.")
    return "\n\n".join(part for part in parts if part)


def verdict_text(found: RecipeFindings) -> str:
    """Which recipe is the best, and whether it is published, in one sentence."""
    kl = f"held-out KL {with_error(found.own.kl, found.own.kl_stderr)}"
    if found.served is None or found.difference is None:
        return f"The search's own recipe stays: none is better beyond noise ({kl})."
    other = with_error(found.served.kl, found.served.kl_stderr)
    gain = f"{found.difference.mean:+.6f}, 95 % {interval_text(found.difference)}"
    changes = _changes(found, found.best)
    if found.is_better:
        return (
            f"{RECIPE_FILE} is best.json with {changes}: {kl} with the search's own recipe, "
            f"{other} with this one ({gain})."
        )
    return (
        f"The search's own recipe stays: {changes} is better on the evaluation text, and on "
        f"held-out text not better beyond noise ({kl}, {other} with it; {gain})."
    )


def to_use(result: SearchResult) -> Path:
    """The configuration to quantize with: best.json, or the same with a better recipe."""
    is_better = result.recipes is not None and result.recipes.is_better
    return result.folder.path / (RECIPE_FILE if is_better else "best.json")


def recipes_json(found: RecipeFindings) -> dict[str, Any]:
    """The same for programs."""
    trials = [
        {
            **{"number": row.number, "params": dict(params)},
            **{"kl": None if row.is_pruned else row.kl, "kl_stderr": row.kl_stderr},
            **{"duplicate_of": row.duplicate_of, PROBLEM: found.problems.get(row.number)},
        }
        for row, params in zip(found.rows, found.params, strict=True)
    ]
    return {
        "trials": trials,
        "choices": {choice.name: list(choice.options) for choice in found.choices},
        "left_out": dict(found.left_out),
        "effects": [asdict(effect) for effect in found.effects],
        "importances": dict(found.importances),
        "best": found.best,
        "own": asdict(found.own),
        "found": None if found.served is None else asdict(found.served),
        "difference": None if found.difference is None else asdict(found.difference),
        "config": RECIPE_FILE if found.is_better else None,
        "stopped": found.stopped,
    }


def recipe_summary(found: RecipeFindings, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of `recipe.json`.

    Args:
        found: with a recipe that is better than the search's own.
        summary: that of `best.json`.
    """
    served, row = found.served, found.rows[found.best]
    assert served is not None, "the search's own recipe has a file: best.json"
    numbers = ("kl", "kl_stderr", "same_top", "perplexity")
    heldout = {name: getattr(served, name) for name in numbers}
    return {
        **summary,
        **asdict(served.counts),
        "recipe": dict(found.params[found.best]),
        "scores": [
            {"metric": "kl", "value": row.kl, "stderr": row.kl_stderr, "unit": "nats/token"}
        ],
        "heldout": [{"name": "recipe", "digest": summary["assignment_digest"], **heldout}],
        "why": verdict_text(found),
        "model_digest": served.model_digest,
        "calibration": dict(served.text),
        "quantization": asdict(served.recipe.settings),
    }


def _effects_table(found: RecipeFindings) -> str:
    own, shown = found.params[0], set[str]()
    rows = []
    for effect in found.effects:
        name = effect.choice
        importance = found.importances.get(name)
        first = name not in shown
        shown.add(name)
        known = effect.kl is not None
        rows.append(
            [
                name if first else "",
                _option(own[name]) if first else "",
                _option(effect.option),
                f"{effect.kl:.6f}" if known else "-",
                f"{effect.difference:+.6f} +- {effect.stderr:.6f}" if known else "-",
                f"{importance:.2f}" if first and importance is not None else "",
            ]
        )
    head = ("choice", "own", "option", "KL", "own minus this", "importance")
    return markdown(head, rows) if rows else ""


def _changes(found: RecipeFindings, number: int) -> str:
    """What a trial has other than the search's own, in words."""
    own, params = found.params[0], found.params[number]
    changed = [f"{name} {_option(params[name])}" for name in own if params[name] != own[name]]
    return ", ".join(changed) or "nothing changed"


def _option(value: Option) -> str:
    """An option as people write it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
