"""The sentences and tables of `report.md`, each from one `SearchResult`."""

import math
import re
from collections.abc import Sequence

from alphaquant.studies.gate import SEARCH, Comparison, HeldoutRow
from alphaquant.studies.intervals import Difference
from alphaquant.studies.result import SearchResult, stage_gains
from alphaquant.studies.storage import TrialRow
from alphaquant.studies.tables import markdown, with_error
from alphaquant.studies.trials import UNIFORM
from alphaquant.studies.winner import best_reason

LEAST_SPEARMAN = 0.6
"""Below this the costs are said not to be trusted."""

RARE_TOKENS = 64
"""Calibration tokens below which a matrix's own costs count less than its group's by default."""

_RARE_SHARE = 0.25
_LEAST_WHOLE = 1e5
_N_NAMED = 8


def model_name(model: str) -> str:
    """A model's name without the folders of this machine: `org/name` of the hub, or the last part.

    Worked example: `/home/me/models/olmoe` and `../olmoe` are `olmoe`, `allenai/OLMoE` stays.
    """
    parts = [part for part in re.split(r"[/\\\\]", model) if part not in ("", ".", "..", "~")]
    is_hub_id = model == "/".join(parts) and len(parts) == 2
    return model if is_hub_id or not parts else parts[-1]


def config_name(row: HeldoutRow) -> str:
    """File of a published point: `configs/trial-012.json`, `configs/uniform-int4-g64.json`."""
    if row.trial is not None:
        return f"configs/trial-{row.trial:03d}.json"
    return f"configs/uniform-{row.name}.json"


def origin_of(result: SearchResult, row: HeldoutRow) -> str:
    """Where a published point comes from."""
    return UNIFORM + row.name if row.trial is None else result.rows[row.trial].origin


def winner_text(result: SearchResult) -> str:
    """One sentence: who won on held-out text, by how much."""
    gate = result.gate
    best, measured = gate.best, with_error(gate.best.kl, gate.best.kl_stderr)
    if gate.winner == SEARCH:
        if best.rival is None:
            return (
                f"held-out KL {measured}; no uniform format fits this budget, so there is nothing "
                "to beat"
            )
        return f"held-out KL {measured}: {_comparison_text(result, best, best.rival)}"
    uniform = gate.row(gate.winner)
    nothing = "so the search found nothing better within this budget"
    if best.replaced_by is None:
        return (
            f"best.json is uniform {uniform.name}, held-out KL {measured}: that is the best trial "
            f"itself, {nothing}"
        )
    return (
        f"best.json is uniform {uniform.name}: on held-out text the {measured} of the best trial "
        f"is not below its KL of {with_error(uniform.kl, uniform.kl_stderr)} beyond noise "
        f"({_difference_text(best.replaced_by.difference)}), {nothing}"
    )


def why_text(result: SearchResult) -> str:
    """One sentence: why `best.json` is the one."""
    gate = result.gate
    if gate.winner != SEARCH:
        return (
            f"no point within the budget is better than uniform {gate.winner} beyond noise on "
            "held-out text"
        )
    if gate.best_name != gate.first_name:
        return (
            f"the evaluation text chose {gate.first_name}; on held-out text {gate.best_name}, "
            "which is within the budget, is better beyond noise than that or than what would "
            "stand in its place"
        )
    return best_reason([row for row in result.rows if row.bits_per_weight <= result.limit])


def published_table(result: SearchResult) -> str:
    """Published points beside the uniform format of the same size."""
    head = ["", "bits/weight", "bytes", "KL", "uniform", "its KL", "difference", "95 % interval"]
    head += ["same top", "perplexity", "origin", "config"]
    rows = []
    for row in result.gate.points:
        counts = [f"{row.bits_per_weight:.4f}", str(row.checkpoint_bytes)]
        scores = [f"{100 * row.same_top:.2f} %", f"{row.perplexity:.3f}"]
        where = [origin_of(result, row), config_name(row)]
        kl = with_error(row.kl, row.kl_stderr)
        rows.append([_mark(result, row), *counts, kl, *_cells(row.rival), *scores, *where])
    return markdown(head, rows)


def withheld_text(result: SearchResult) -> str:
    """Points in whose place another row is published, and why."""
    rows = [
        [
            row.name,
            f"{row.bits_per_weight:.4f}",
            with_error(row.kl, row.kl_stderr),
            *_cells(row.replaced_by),
            row.reason.removeprefix("withheld: "),
        ]
        for row in result.gate.withheld
    ]
    if not rows:
        return (
            "None: every point is better beyond noise than every uniform format of the menu and "
            "every published row of at most its bits."
        )
    head = ["", "bits/weight", "KL", "published instead", "its KL", "difference", "95 % interval"]
    return markdown([*head, "why"], rows)


def uniform_table(result: SearchResult) -> str:
    """Everything that was only compared with."""
    rows = [
        [
            row.name,
            f"{row.bits_per_weight:.4f}",
            with_error(row.kl, row.kl_stderr),
            f"{100 * row.same_top:.2f} %",
            f"{row.perplexity:.3f}",
            "yes" if row.name in result.space.menu else "no",
        ]
        for row in result.gate.rows
        if not row.is_published and row.replaced_by is None
    ]
    return markdown(["uniform", "bits/weight", "KL", "same top", "perplexity", "in menu"], rows)


def domain_text(result: SearchResult) -> str:
    """KL of the best by domain, and the domain where it is worst beside its rival."""
    best, rows, ratios = result.gate.best, [], {}
    for name, score in best.domains.items():
        error = "" if score.kl_stderr is None else f" +- {score.kl_stderr:.6f}"
        cells = [name, str(score.n_windows), f"{score.kl:.6f}{error}"]
        if best.rival is not None:
            kl = result.gate.row(best.rival.name).domains[name].kl
            ratios[name] = score.kl / kl if kl > 0 else math.inf
            difference = best.rival.domains[name]
            cells += [f"{kl:.6f}", f"{difference.mean:.6f}", _interval(difference)]
        rows.append(cells)
    if best.rival is None:
        return markdown(["domain", "windows", "KL"], rows)
    head = ["domain", "windows", "KL", f"uniform {best.rival.name}", "difference", "95 % interval"]
    table = markdown(head, rows)
    worst = max(ratios, key=lambda name: ratios[name])
    if len(ratios) == 1 or math.isinf(ratios[worst]):
        return table
    return (
        f"{table}\n\nWorst domain beside uniform {best.rival.name}: {worst}, with "
        f"{ratios[worst]:.3f} x its KL."
    )


def scores_text(result: SearchResult) -> str:
    """What was asked for besides bits and KL, of the published trials; empty if nothing was."""
    metrics = result.scores.metrics
    if not metrics:
        return ""
    optimized = {metric.name for metric in result.scores.objectives}
    rows = []
    for point in result.gate.points:
        trial = None if point.trial is None else result.rows[point.trial]
        if trial is not None and not trial.is_pruned:
            cells = [_score_cell(trial, metric.name) for metric in metrics]
            rows.append([_mark(result, point), f"{point.bits_per_weight:.4f}", *cells])
    head = [f"{m.name}{' (objective)' if m.name in optimized else ''}, {m.unit}" for m in metrics]
    return markdown(["", "bits/weight", *head], rows)


def _score_cell(trial: TrialRow, metric: str) -> str:
    stderr = trial.extra_stderr.get(metric)
    number = trial.score(metric)
    value = f"{number:.6g}" if abs(number) < _LEAST_WHOLE else f"{number:.0f}"
    return value if stderr is None else f"{value} +- {stderr:.2g}"


def gains_table(result: SearchResult) -> str:
    """What each stage of the search gained."""
    rows = [
        [
            gain.stage,
            str(gain.n_trials),
            "none" if gain.kl is None else f"{gain.kl:.6f}",
            "" if gain.ratio is None else f"{gain.ratio:.3f}",
        ]
        for gain in stage_gains(result.rows, result.limit)
    ]
    return markdown(["stage", "trials", "lowest KL after it", "to before"], rows)


def stop_text(result: SearchResult) -> str:
    """After how many trials the search ended, and why."""
    return f"Stopped after {len(result.rows)} trials: {result.stopped}."


def search_text(result: SearchResult) -> str:
    """Why it ended, work, menu and the solver's certificate."""
    space, n_pruned = result.space, sum(row.is_pruned for row in result.rows)
    n_repeated = sum(row.duplicate_of is not None for row in result.rows)
    gaps = [row.gap for row in result.rows if row.gap is not None]
    gap = f"{max(gaps):.2e}" if gaps else "none was solved"
    return (
        f"{stop_text(result)}\n\n"
        f"{len(result.rows)} trials, of which {n_pruned} ended early and {n_repeated} repeat "
        f"another one; {result.n_measured} assignments measured in this run, races included, in "
        f"{result.n_passes:.1f} full passes over the evaluation text; {len(result.gate.rows)} on "
        f"held-out text. {len(space.units)} units, {len(space.menu)} formats "
        f"({', '.join(space.menu)}), profile {space.profile_name}. Largest certified gap of a "
        f"solver to the optimum of its own costs: {gap}."
    )


def costs_text(result: SearchResult) -> str:
    """How the costs rank random assignments."""
    probe = result.probe
    if probe is None:
        return "Not measured in this search."
    rows = [[k, _rho(v)] for k, v in sorted(probe.spearman.items(), key=lambda item: item[0])]
    text = (
        f"Spearman correlation of predicted and measured KL over {probe.n_assignments} random "
        f"assignments within the budget, {probe.n_windows} windows each:\n\n"
        + markdown(["costs", "rho"], rows)
    )
    default = probe.spearman.get("default", math.nan)
    if default >= LEAST_SPEARMAN:
        return text
    return (
        f"{text}\n\nThe default costs are not to be trusted on this model: rho is "
        f"{_rho(default)}, less than {LEAST_SPEARMAN}. What was measured on the text decides."
    )


def coverage_text(result: SearchResult) -> str:
    """Calibration tokens per expert, and which experts saw few."""
    counts = result.facts["calibration_tokens_per_expert"]
    if not counts:
        return "No routed experts; every matrix saw every token."
    rows = []
    for name, tokens in counts.items():
        few = _RARE_SHARE * sum(tokens) / len(tokens)
        rare = [str(expert) for expert, n in enumerate(tokens) if n < few]
        numbers = (sum(tokens), min(tokens), max(tokens))
        rows.append([name, *map(str, numbers), ", ".join(rare) or "none"])
    rare_head = f"under {_RARE_SHARE:.0%} of the uniform share"
    table = markdown(["experts", "routed tokens", "fewest", "most", rare_head], rows)
    return f"{table}\n\n{_rare_text(result.facts['rare_matrices'])}"


def _rare_text(names: Sequence[str]) -> str:
    """Which matrices have costs that rest on few tokens."""
    if not names:
        return f"Every matrix was reached by {RARE_TOKENS} tokens or more."
    named = ", ".join(names[:_N_NAMED]) + (", ..." if len(names) > _N_NAMED else "")
    return (
        f"{len(names)} matrices were reached by fewer than {RARE_TOKENS} tokens, so their costs "
        f"are mostly their group's: {named}. More calibration windows, or text of another domain, "
        "reach them."
    )


def _mark(result: SearchResult, row: HeldoutRow) -> str:
    """The name of a published point, and what is special about it."""
    notes = ["best.json"] if row.digest == result.published.digest else []
    if not row.is_within_budget:
        notes.append("above the budget")
    return f"{row.name} ({', '.join(notes)})" if notes else row.name


def _cells(rival: Comparison | None) -> list[str]:
    """Name, KL, difference and interval of a comparison."""
    if rival is None:
        return ["none", "", "", ""]
    difference = rival.difference
    error = "" if difference.stderr is None else f" +- {difference.stderr:.6f}"
    mean = f"{difference.mean:.6f}{error}"
    return [rival.name, f"{rival.kl:.6f}", mean, _interval(difference)]


def _comparison_text(result: SearchResult, best: HeldoutRow, rival: Comparison) -> str:
    ratio = f"{best.kl / rival.kl:.3f} x " if rival.kl > 0 else "beside "
    outside = "" if rival.name in result.space.menu else ", which is not in --formats"
    return (
        f"{ratio}uniform {rival.name} ({rival.kl:.6f} at {rival.bits_per_weight:.3f} bits"
        f"{outside}), {_difference_text(rival.difference)}"
    )


def _difference_text(difference: Difference) -> str:
    error = "" if difference.stderr is None else f" +- {difference.stderr:.6f}"
    return f"paired difference {difference.mean:.6f}{error}, 95 % interval {_interval(difference)}"


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return "of one window"
    return f"{difference.low:.6f} to {difference.high:.6f}"


def _rho(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.3f}"
