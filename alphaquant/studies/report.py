"""What a search leaves behind: front.json, configs/*.json, best.json, trials.csv, report.md.

All five are written from one `SearchResult`, so their numbers agree.
"""

from dataclasses import asdict
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.config import config_from_assignment, dump_config
from alphaquant.studies.runner import SearchResult
from alphaquant.studies.storage import TrialRow

FRONT_VERSION = 1


def write_report(result: SearchResult) -> None:
    """Write every file of a search's output."""
    folder = result.folder
    for row in result.front:
        assignment = folder.load_assignment(row.digest)
        folder.write_text(config_name(row), _config_text(result, assignment, row))
    folder.write_text("best.json", _config_text(result, result.published, _published_row(result)))
    folder.write_json("front.json", front_json(result))
    folder.write_text("trials.csv", trials_frame(result).to_csv(index=False))
    folder.write_text("report.md", report_text(result))


def config_name(row: TrialRow) -> str:
    """File of a front point, e.g. `configs/3.497bits-trial-012.json`."""
    return f"configs/{row.bits_per_weight:.3f}bits-trial-{row.number:03d}.json"


def rank_correlation(result: SearchResult) -> float | None:
    """Spearman's rho between the predicted and the measured KL over the distinct trials; None below three."""
    distinct = [r for r in result.rows if r.duplicate_of is None]
    if len(distinct) < 3:
        return None
    return float(spearmanr([r.predicted_kl for r in distinct], [r.kl for r in distinct]).statistic)


def front_json(result: SearchResult) -> dict[str, Any]:
    """The front with everything that the report says, for programs."""
    counts = result.published.count_bits(result.space.inventory)
    return {
        "version": FRONT_VERSION,
        "budget": result.spec.budget,
        "limit_bits": result.space.limit_bits,
        "counting_rule": counting_rule(),
        "profile": result.space.profile_name,
        "menu": list(result.space.menu),
        "n_units": len(result.space.units),
        "best": {"winner": result.gate.winner, "config": "best.json", **asdict(counts)},
        "front": [{**_public(row), "config": config_name(row)} for row in result.front],
        "heldout": [asdict(row) for row in result.gate.rows],
        "n_trials": len(result.rows),
        "n_evaluations": sum(r.duplicate_of is None for r in result.rows) + len(result.gate.rows),
        "spearman_predicted_measured": rank_correlation(result),
        "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
        "provenance": result.facts,
        "settings": result.spec.facts(),
    }


def trials_frame(result: SearchResult) -> pd.DataFrame:
    """One row per trial."""
    frame = pd.DataFrame([_public(row) for row in result.rows])
    on_front = {row.number for row in result.front}
    frame["on_front"] = [n in on_front for n in frame["number"]]
    return frame


def bit_lines(counts: BitCount) -> list[str]:
    """The three bit counts, one per line."""
    routed = counts.routed_bits_per_weight
    return [
        f"routed experts   {'none' if routed is None else f'{routed:.4f} bits per weight'}",
        f"all quantizable  {counts.bits_per_weight:.4f} bits per weight, {counts.quantized_bytes} bytes",
        f"whole checkpoint {counts.checkpoint_bits_per_weight:.4f} bits per weight, {counts.checkpoint_bytes} bytes",
    ]


def winner_text(result: SearchResult) -> str:
    """One sentence: who won on held-out text, by how much."""
    best = result.gate.rows[0]
    rivals = [r for r in result.gate.rows[1:] if r.bits_per_weight <= result.space.limit_bits / result.space.inventory.n_weights]
    if result.gate.winner != "search":
        return (
            f"uniform {result.gate.winner} has a lower held-out KL than the best of the search ({best.kl:.6f}) within this budget, so "
            "best.json is uniform: the search found nothing better"
        )
    if not rivals:
        return f"held-out KL {best.kl:.6f}; no uniform format fits this budget, so there is nothing to beat"
    rival = min(rivals, key=lambda r: r.kl)
    return (
        f"held-out KL {best.kl:.6f} +- {best.kl_stderr:.6f}: {best.kl / rival.kl:.3f} x {rival.name} ({rival.kl:.6f} at "
        f"{rival.bits_per_weight:.3f} bits), paired difference {rival.difference:.6f} +- {rival.difference_stderr:.6f}"
    )


def report_text(result: SearchResult) -> str:
    """report.md."""
    counts = result.published.count_bits(result.space.inventory)
    rho = rank_correlation(result)
    parts = [
        f"# {result.facts['model']} at {result.spec.budget}",
        winner_text(result) + ".",
        "## Size of best.json",
        "\n".join(f"    {line}" for line in bit_lines(counts)),
        counting_rule(),
        "## Held-out text",
        _heldout_table(result),
        "KL is to the original model, in nats per token, with the standard error over windows; `difference` is KL minus that of best "
        "over the same windows, with its own standard error.",
        "## Front (evaluation text)",
        _front_table(result),
        "## The search",
        f"{len(result.rows)} trials, of which {sum(r.duplicate_of is None for r in result.rows)} ran the model; "
        f"{len(result.space.units)} units, {len(result.space.menu)} formats ({', '.join(result.space.menu)}), profile "
        f"{result.space.profile_name}. Spearman correlation of predicted and measured KL: {'too few trials' if rho is None else f'{rho:.3f}'}. "
        f"Largest certified solver gap: {max((r.gap or 0.0) for r in result.rows):.2e}.",
        "## Seconds per stage (this run; what the cache or the study held is not repeated)",
        _table(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in result.seconds.items()]),
        "## Calibration coverage",
        _coverage_text(result),
        "## Next",
        f"    aq-quantize --model {result.spec.model} --config {result.folder.path / 'best.json'} --out DIR\n"
        f"    aq-eval --model DIR --reference {result.spec.model}",
    ]
    return "\n\n".join(parts) + "\n"


def _config_text(result: SearchResult, assignment: Assignment, row: TrialRow | None) -> str:
    counts = assignment.count_bits(result.space.inventory)
    data = result.facts["data"]
    summary: dict[str, Any] = {
        "budget": result.spec.budget,
        **asdict(counts),
        "profile": result.space.profile_name,
        "study": result.spec.study,
        "trial": None if row is None else row.number,
        "origin": f"uniform:{result.gate.winner}" if row is None else row.origin,
        "scores": [] if row is None else _scores(row),
        "heldout": [asdict(result.gate.rows[0])] if row is not None and row.digest == result.best.digest else [],
        "assignment_digest": assignment.digest,
        "model": result.facts["model"],
        "model_digest": result.facts["model_digest"],
        "calibration": data["calibration"],
        "evaluation": data["search"],
        "quantization": asdict(result.spec.quant),
        "versions": result.facts["versions"],
    }
    return dump_config(config_from_assignment(assignment, result.space.inventory, summary))


def _published_row(result: SearchResult) -> TrialRow | None:
    """The trial of the published assignment; None for a uniform format that was no trial."""
    return next((r for r in result.rows if r.digest == result.published.digest), None)


def _scores(row: TrialRow) -> list[dict[str, Any]]:
    return [
        {"metric": "kl", "value": row.kl, "stderr": row.kl_stderr, "unit": "nats/token", "n_samples": len(row.kl_per_window)},
        {"metric": "same_top", "value": row.same_top, "unit": "share of positions"},
        {"metric": "perplexity", "value": row.perplexity, "unit": "per token"},
    ]


def _public(row: TrialRow) -> dict[str, Any]:
    return {k: v for k, v in asdict(row).items() if k != "kl_per_window"}


def _heldout_table(result: SearchResult) -> str:
    rows = [
        [
            r.name,
            f"{r.bits_per_weight:.4f}",
            f"{r.kl:.6f} +- {r.kl_stderr:.6f}",
            f"{r.difference:+.6f} +- {r.difference_stderr:.6f}",
            f"{100 * r.same_top:.2f} %",
            f"{r.perplexity:.3f}",
        ]
        for r in result.gate.rows
    ]
    return _table(["", "bits/weight", "KL", "difference", "same top", "perplexity"], rows)


def _front_table(result: SearchResult) -> str:
    rows = [
        [f"{r.bits_per_weight:.4f}", str(r.checkpoint_bytes), f"{r.kl:.6f} +- {r.kl_stderr:.6f}", f"{100 * r.same_top:.2f} %", r.origin, config_name(r)]
        for r in result.front
    ]
    return _table(["bits/weight", "bytes", "KL", "same top", "origin", "config"], rows)


def _coverage_text(result: SearchResult) -> str:
    counts = result.facts["calibration_tokens_per_expert"]
    if not counts:
        return "No routed experts; every matrix saw every token."
    rows = []
    for name, tokens in counts.items():
        uniform = sum(tokens) / len(tokens)
        rare = [e for e, n in enumerate(tokens) if n < 0.25 * uniform]
        rows.append([name, str(sum(tokens)), str(min(tokens)), str(max(tokens)), ", ".join(map(str, rare)) or "none"])
    return _table(["experts", "routed tokens", "fewest", "most", "under 25 % of the uniform share"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
