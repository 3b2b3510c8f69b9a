"""The sentences and tables of `report.md`, each from one `SearchResult`."""

import math
import re

from alphaquant.progress import Stage
from alphaquant.reports.cautions import (
    RARE_TOKENS,
    costs_caution,
    rare_caution,
    rho_interval_text,
    rho_text,
)
from alphaquant.reports.front import (
    COMPARISON_HEAD,
    comparison_cells,
    front_rows,
    interval_text,
)
from alphaquant.reports.tables import markdown, with_error
from alphaquant.studies.result import SearchResult, stage_gains
from alphaquant.studies.store.study import TrialRow

FRONT_NOTE = (
    "KL is to the original model, in nats per token, with the standard error over windows. "
    "Beside it is the best uniform format of at most the same bits (of best.json: within the "
    "budget); the difference is its KL minus that of the point over the same windows, above 0 "
    "where the point is better, with a bootstrap interval that is stratified by domain. Every "
    "searched point has a whole interval above 0 against every uniform format, and against "
    "every other published row, of at most its bits; best.json stays in any case."
)
"""What the columns of the front mean."""

_RARE_SHARE = 0.25
_LEAST_WHOLE = 1e5


def model_name(model: str) -> str:
    """A model's name without the folders of this machine: `org/name` of the hub, or the last part.

    Worked example: `/home/me/models/olmoe` and `../olmoe` are `olmoe`, `allenai/OLMoE` stays.
    """
    parts = [part for part in re.split(r"[/\\\\]", model) if part not in ("", ".", "..", "~")]
    is_hub_id = model == "/".join(parts) and len(parts) == 2
    return model if is_hub_id or not parts else parts[-1]


def published_table(result: SearchResult) -> str:
    """Published points beside the uniform format of the same size."""
    rows = [
        [
            row.label,
            row.kl_text,
            f"{row.bits_per_weight:.4f}",
            row.megabytes,
            *comparison_cells(row.rival),
        ]
        for row in front_rows(result)
    ]
    return markdown(["", "KL", "bits/weight", "MB", "uniform", *COMPARISON_HEAD], rows)


def files_table(result: SearchResult) -> str:
    """What else is known of the published points, and their files."""
    rows = [
        [
            row.name,
            row.config,
            row.origin,
            str(row.checkpoint_bytes),
            f"{100 * row.same_top:.2f} %",
            f"{row.perplexity:.3f}",
        ]
        for row in front_rows(result)
    ]
    return markdown(["", "file", "origin", "bytes", "same top", "perplexity"], rows)


def withheld_text(result: SearchResult) -> str:
    """Points in whose place another row is published, and why."""
    rows = [
        [
            row.name,
            f"{row.bits_per_weight:.4f}",
            with_error(row.kl, row.kl_stderr),
            *comparison_cells(row.replaced_by),
            row.reason.removeprefix("withheld: "),
        ]
        for row in result.gate.withheld
    ]
    if not rows:
        return (
            "None: every point is better beyond noise than every uniform format of the menu and "
            "every published row of at most its bits."
        )
    head = ["", "bits/weight", "KL", "published instead", *COMPARISON_HEAD]
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
            cells += [f"{kl:.6f}", f"{difference.mean:.6f}", interval_text(difference)]
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
    for point in front_rows(result):
        trial = None if point.trial is None else result.rows[point.trial]
        if trial is not None and not trial.is_pruned:
            cells = [_score_cell(trial, metric.name) for metric in metrics]
            rows.append([point.label, f"{point.bits_per_weight:.4f}", *cells])
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


def seconds_table(result: SearchResult) -> str:
    """Wall time of each stage of this run."""
    rows = [[Stage(name).text, f"{seconds:.1f}"] for name, seconds in result.seconds.items()]
    return markdown(["stage", "seconds"], rows)


def costs_text(result: SearchResult) -> str:
    """How the costs rank random assignments."""
    probe = result.probe
    if probe is None:
        return "Not measured in this search."
    rows = [
        [name, rho_text(rho), rho_interval_text(rho, probe.n_assignments)]
        for name, rho in sorted(probe.spearman.items())
    ]
    text = (
        f"Spearman correlation of predicted and measured KL over {probe.n_assignments} random "
        f"assignments within the budget, {probe.n_windows} windows each:\n\n"
        + markdown(["costs", "rho", "95 % interval"], rows)
    )
    caution = costs_caution(probe)
    return text if caution is None else f"{text}\n\n{caution}"


def coverage_text(result: SearchResult) -> str:
    """Calibration tokens per expert, and which experts saw few."""
    counts = result.provenance.calibration_tokens_per_expert
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
    reached = f"Every matrix was reached by {RARE_TOKENS} tokens or more."
    return f"{table}\n\n{rare_caution(result.provenance.rare_matrices) or reached}"
