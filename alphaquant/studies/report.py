"""What a search leaves behind: front.json, configs/*.json, best.json, trials.csv, report.md.

All are written from one `SearchResult`, so their numbers agree.
"""

import textwrap
from dataclasses import asdict
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.budget import counting_rule
from alphaquant.spaces.config import config_from_assignment, dump_config
from alphaquant.studies.gate import BEST, SEARCH, HeldoutRow
from alphaquant.studies.result import SearchResult
from alphaquant.studies.storage import TrialRow, find_duplicate
from alphaquant.studies.tables import aligned, markdown, with_error
from alphaquant.studies.trials import UNIFORM

FRONT_VERSION = 1
_RARE_SHARE = 0.25


def write_configs(result: SearchResult) -> None:
    """Write best.json and one configuration per point of the front; older points are removed."""
    folder = result.folder
    for row in result.front:
        assignment = folder.load_assignment(row.digest)
        folder.write_text(config_name(row), config_text(result, assignment, row))
    published = find_duplicate(result.rows, result.published.digest)
    folder.write_text("best.json", config_text(result, result.published, published))
    wanted = {folder.path / config_name(row) for row in result.front}
    for path in set((folder.path / "configs").glob("trial-*.json")) - wanted:
        path.unlink()


def write_report(result: SearchResult) -> None:
    """Write front.json, trials.csv and report.md."""
    result.folder.write_json("front.json", front_json(result))
    result.folder.write_text("trials.csv", trials_frame(result).to_csv(index=False))
    result.folder.write_text("report.md", report_text(result))


def config_name(row: TrialRow) -> str:
    """File of a front point, e.g. `configs/trial-012.json`."""
    return f"configs/trial-{row.number:03d}.json"


def config_text(result: SearchResult, assignment: Assignment, row: TrialRow | None) -> str:
    """A configuration with the numbers of its trial; None for a uniform format that was none."""
    data = result.facts["data"]
    heldout = [r for r in result.gate.rows if r.digest == assignment.digest]
    summary: dict[str, Any] = {
        "budget": result.spec.budget,
        **asdict(assignment.count_bits(result.space.inventory)),
        "profile": result.space.profile_name,
        "study": result.spec.study,
        "trial": None if row is None else row.number,
        "origin": UNIFORM + result.gate.winner if row is None else row.origin,
        "scores": [] if row is None else _scores(row),
        "heldout": [asdict(r) for r in heldout[:1]],
        "assignment_digest": assignment.digest,
        "model": result.facts["model"],
        "model_digest": result.facts["model_digest"],
        "calibration": data["calibration"],
        "evaluation": data["search"],
        "quantization": asdict(result.spec.quant),
        "versions": result.facts["versions"],
    }
    return dump_config(config_from_assignment(assignment, result.space.inventory, summary))


def rank_correlation(result: SearchResult) -> float | None:
    """Spearman's rho of predicted and measured KL over the distinct trials.

    None below three trials, or where one of the two is constant.
    """
    distinct = [r for r in result.rows if r.duplicate_of is None]
    predicted, measured = [r.predicted_kl for r in distinct], [r.kl for r in distinct]
    if len(distinct) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return None
    return float(spearmanr(predicted, measured).statistic)


def front_json(result: SearchResult) -> dict[str, Any]:
    """The front with everything that the report says, for programs."""
    return {
        "version": FRONT_VERSION,
        "budget": result.spec.budget,
        "limit_bits": result.space.limit_bits,
        "counting_rule": counting_rule(),
        "profile": result.space.profile_name,
        "menu": list(result.space.menu),
        "n_units": len(result.space.units),
        "best": {"winner": result.gate.winner, "config": "best.json", **asdict(result.counts)},
        "front": [{**_public(row), "config": config_name(row)} for row in result.front],
        "heldout": [asdict(row) for row in result.gate.rows],
        "n_trials": len(result.rows),
        "n_evaluations": _n_distinct(result) + len(result.gate.rows),
        "spearman_predicted_measured": rank_correlation(result),
        "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
        "provenance": dict(result.facts),
        "settings": result.spec.facts(),
    }


def trials_frame(result: SearchResult) -> pd.DataFrame:
    """One row per trial."""
    frame = pd.DataFrame([_public(row) for row in result.rows])
    frame["duplicate_of"] = frame["duplicate_of"].astype("Int64")
    on_front = {row.number for row in result.front}
    frame["on_front"] = [n in on_front for n in frame["number"]]
    return frame


def bit_lines(counts: BitCount) -> list[str]:
    """The three bit counts, one per line."""
    routed = counts.routed_bits_per_weight
    return [
        f"routed experts   {'none' if routed is None else f'{routed:.4f} bits per weight'}",
        f"all quantizable  {counts.bits_per_weight:.4f} bits per weight, "
        f"{counts.quantized_bytes} bytes",
        f"whole checkpoint {counts.checkpoint_bits_per_weight:.4f} bits per weight, "
        f"{counts.checkpoint_bytes} bytes",
    ]


def winner_text(result: SearchResult) -> str:
    """One sentence: who won on held-out text, by how much."""
    best, limit = result.gate.best, result.space.limit_bits / result.space.inventory.n_weights
    rivals = [r for r in result.gate.rows[1:] if r.bits_per_weight <= limit]
    if result.gate.winner != SEARCH:
        uniform = next(r for r in rivals if r.name == result.gate.winner)
        return (
            f"best.json is uniform {uniform.name}: on held-out text its KL of "
            f"{with_error(uniform.kl, uniform.kl_stderr)} is no higher than the "
            f"{with_error(best.kl, best.kl_stderr)} of the best trial, so the search found "
            "nothing better within this budget"
        )
    measured = f"held-out KL {with_error(best.kl, best.kl_stderr)}"
    if not rivals:
        return f"{measured}; no uniform format fits this budget, so there is nothing to beat"
    rival = min(rivals, key=lambda r: r.kl)
    return f"{measured}: {_comparison(result, rival)}"


def summary_text(result: SearchResult) -> str:
    """What the command prints: the front, the three bit counts, the winner, the next step."""
    rows = [
        [
            f"{'*' if row.digest == result.published.digest else ''}{row.number}",
            f"{row.bits_per_weight:.3f}",
            f"{row.checkpoint_bytes / 1e6:.2f}",
            with_error(row.kl, row.kl_stderr),
            f"{100 * row.same_top:.2f} %",
            row.origin,
        ]
        for row in result.front
    ]
    head = ("trial", "bits", "MB", "KL +- stderr", "same top", "from")
    best = result.folder.path / "best.json"
    return "\n".join(
        [
            f"front of {result.facts['model']} at {result.spec.budget} (evaluation text; * best)",
            aligned(head, rows, left=("from",)),
            f"configurations: {result.folder.path / 'configs'}/trial-NNN.json",
            "",
            *bit_lines(result.counts),
            *textwrap.wrap(counting_rule(), 80),
            "",
            *textwrap.wrap(winner_text(result), 80),
            f"best: {best}",
            f"next: aq-quantize --model {result.spec.model} --config {best} --out DIR",
        ]
    )


def trial_line(row: TrialRow) -> str:
    """One line about a finished trial: number, origin, bits, KL, seconds."""
    same = "" if row.duplicate_of is None else f" = trial {row.duplicate_of}"
    return (
        f"trial {row.number}: {row.origin}{same}, {row.bits_per_weight:.3f} bits, "
        f"KL {with_error(row.kl, row.kl_stderr)}, {row.seconds:.1f} s"
    )


def trial_note(row: TrialRow) -> str:
    """A trial in 21 characters, for beside a progress bar."""
    return f"{row.kl:.6f} at {row.bits_per_weight:.2f} bits"


def report_text(result: SearchResult) -> str:
    """report.md."""
    parts = [
        f"# {result.facts['model']} at {result.spec.budget}",
        winner_text(result) + ".",
        "## Size of best.json",
        "\n".join(f"    {line}" for line in bit_lines(result.counts)),
        counting_rule(),
        "## Held-out text",
        _heldout_table(result),
        "KL is to the original model, in nats per token, with the standard error over windows; "
        "`difference` is KL minus that of best over the same windows, with its own standard "
        "error.",
        "## Front (evaluation text)",
        _front_table(result),
        "## The search",
        _search_text(result),
        "## Seconds per stage (this run; what the cache or the study held is not repeated)",
        markdown(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in result.seconds.items()]),
        "## Calibration coverage",
        _coverage_text(result),
        "## Next",
        f"    aq-quantize --model {result.spec.model} --config "
        f"{result.folder.path / 'best.json'} --out DIR\n"
        f"    aq-eval --model DIR --reference {result.spec.model}",
    ]
    return "\n\n".join(parts) + "\n"


def _comparison(result: SearchResult, rival: HeldoutRow) -> str:
    ratio = f"{result.gate.best.kl / rival.kl:.3f} x " if rival.kl > 0 else "beside "
    outside = "" if rival.name in result.space.menu else ", which is not in --formats"
    return (
        f"{ratio}uniform {rival.name} ({rival.kl:.6f} at {rival.bits_per_weight:.3f} bits"
        f"{outside}), paired difference {with_error(rival.difference, rival.difference_stderr)}"
    )


def _n_distinct(result: SearchResult) -> int:
    return sum(row.duplicate_of is None for row in result.rows)


def _scores(row: TrialRow) -> list[dict[str, Any]]:
    n_samples = len(row.kl_per_window)
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
    ]


def _public(row: TrialRow) -> dict[str, Any]:
    return {k: v for k, v in asdict(row).items() if k != "kl_per_window"}


def _heldout_table(result: SearchResult) -> str:
    rows = [
        [
            row.name if row.name == BEST else f"uniform {row.name}",
            f"{row.bits_per_weight:.4f}",
            with_error(row.kl, row.kl_stderr),
            with_error(row.difference, row.difference_stderr),
            f"{100 * row.same_top:.2f} %",
            f"{row.perplexity:.3f}",
        ]
        for row in result.gate.rows
    ]
    return markdown(["", "bits/weight", "KL", "difference", "same top", "perplexity"], rows)


def _front_table(result: SearchResult) -> str:
    rows = [
        [
            f"{row.bits_per_weight:.4f}",
            str(row.checkpoint_bytes),
            with_error(row.kl, row.kl_stderr),
            f"{100 * row.same_top:.2f} %",
            row.origin,
            config_name(row),
        ]
        for row in result.front
    ]
    return markdown(["bits/weight", "bytes", "KL", "same top", "origin", "config"], rows)


def _search_text(result: SearchResult) -> str:
    rho = rank_correlation(result)
    space = result.space
    return (
        f"{len(result.rows)} trials, of which {_n_distinct(result)} ran the model; "
        f"{len(space.units)} units, {len(space.menu)} formats ({', '.join(space.menu)}), profile "
        f"{space.profile_name}. Spearman correlation of predicted and measured KL: "
        f"{'not defined' if rho is None else f'{rho:.3f}'}. Largest certified solver gap: "
        f"{max((r.gap or 0.0) for r in result.rows):.2e}."
    )


def _coverage_text(result: SearchResult) -> str:
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
    return markdown(["experts", "routed tokens", "fewest", "most", rare_head], rows)
