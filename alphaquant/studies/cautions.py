"""What a reader of a report must know before trusting its numbers, one sentence each."""

import math

from alphaquant.studies.gate import SEARCH
from alphaquant.studies.report_sections import (
    LEAST_SPEARMAN,
    costs_text,
    coverage_text,
    winner_text,
)
from alphaquant.studies.result import SearchResult

FEW_WINDOWS = 30
"""Windows of a text below which its intervals are said to be rough: at 30, the quantile of
Student's distribution that they rest on is 4 % above the normal one."""


def cautions(result: SearchResult) -> tuple[str, ...]:
    """Everything that speaks against taking a result as it is; none for a sound one."""
    found = [_winner(result), _withheld(result), _costs(result), _rare(result)]
    return tuple(text for text in (*found, *_few_windows(result)) if text is not None)


def _winner(result: SearchResult) -> str | None:
    return None if result.gate.winner == SEARCH else f"{winner_text(result)}."


def _withheld(result: SearchResult) -> str | None:
    n = len(result.gate.withheld)
    if not n:
        return None
    said = "1 point of the front was" if n == 1 else f"{n} points of the front were"
    return (
        f"{said} withheld, because on held-out text the lead over a uniform format or another "
        "point of at most the same size is within the noise; that one is published instead."
    )


def _costs(result: SearchResult) -> str | None:
    """The last sentence of the report's section on costs, where that warns."""
    if result.probe is None:
        return None
    is_trusted = result.probe.spearman.get("default", math.nan) >= LEAST_SPEARMAN
    return None if is_trusted else costs_text(result).split("\n\n")[-1]


def _rare(result: SearchResult) -> str | None:
    """The last sentence of the report's section on coverage, where that warns."""
    return coverage_text(result).split("\n\n")[-1] if result.facts["rare_matrices"] else None


def _few_windows(result: SearchResult) -> list[str]:
    """Texts whose intervals are rough."""
    domains = result.gate.best.domains
    counts = {
        "held-out": sum(score.n_windows for score in domains.values()),
        "evaluation": max(len(row.kl_per_window) for row in result.rows),
    }
    found = [
        f"Only {n} windows of {text} text: standard errors and intervals are rough. Ask for "
        f"{FEW_WINDOWS} or more."
        for text, n in counts.items()
        if n < FEW_WINDOWS
    ]
    single = [name for name, score in domains.items() if score.kl_stderr is None]
    if single:
        found.append(f"One held-out window only, so no interval, of: {', '.join(single)}.")
    return found
