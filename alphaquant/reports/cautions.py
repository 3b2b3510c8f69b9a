"""What a reader of a report must know before trusting its numbers, one sentence each.

Every sentence is made from the numbers; sections of the report that warn of the same thing show
the sentence from here.
"""

import math
from collections.abc import Sequence

from alphaquant.models.gguf.converted import GgufOrigin
from alphaquant.provenance import Provenance
from alphaquant.reports.verdict import winner_text
from alphaquant.studies.gate.intervals import spearman_interval
from alphaquant.studies.gate.judge import SEARCH
from alphaquant.studies.result import Probe, SearchResult

FEW_WINDOWS = 30
"""Windows of a text below which its intervals are said to be rough: at 30, the quantile of
Student's distribution that they rest on is 4 % above the normal one."""

LEAST_SPEARMAN = 0.6
"""Below this the costs are said not to be trusted."""

RARE_TOKENS = 64
"""Calibration tokens below which a matrix's own costs count less than its group's by default."""

WIDE_INTERVAL = 0.5
"""Width of the interval of a rank correlation from which on it is said to settle nothing."""

_N_NAMED = 8


def cautions(result: SearchResult) -> tuple[str, ...]:
    """Everything that speaks against taking a result as it is; none for a sound one."""
    found = (
        None if result.gate.winner == SEARCH else f"{winner_text(result)}.",
        withheld_caution(len(result.gate.withheld)),
        costs_caution(result.probe),
        rare_caution(result.provenance.rare_matrices),
        bank_caution(result.provenance.lacking_formats),
        *source_cautions(result.provenance),
        *_window_cautions(result),
    )
    return tuple(text for text in found if text is not None)


def source_cautions(provenance: Provenance) -> tuple[str, ...]:
    """That the original is quantized itself, and what of its file nobody read."""
    if provenance.gguf is None:
        return ()
    return tuple(f"{note}." for note in GgufOrigin(**provenance.gguf).notes)


def withheld_caution(n_withheld: int) -> str | None:
    """That points of the front are not published."""
    if not n_withheld:
        return None
    points = "1 point of the front was"
    if n_withheld > 1:
        points = f"{n_withheld} points of the front were"
    return (
        f"{points} withheld, because on held-out text the lead over a uniform format or another "
        "point of at most the same size is within the noise; that one is published instead."
    )


def costs_caution(probe: Probe | None) -> str | None:
    """That the costs rank random assignments badly."""
    if probe is None:
        return None
    rho = probe.spearman.get("default", math.nan)
    if rho >= LEAST_SPEARMAN:
        return None
    return (
        f"The default costs are not to be trusted on this model: rho is {rho_text(rho)}, less "
        f"than {LEAST_SPEARMAN}, over {probe.n_assignments} random assignments. What was measured "
        "on the text decides."
    )


def rare_caution(names: Sequence[str]) -> str | None:
    """That costs of some matrices rest on few tokens."""
    if not names:
        return None
    named = ", ".join(names[:_N_NAMED]) + (", ..." if len(names) > _N_NAMED else "")
    return (
        f"{len(names)} matrices were reached by fewer than {RARE_TOKENS} tokens, so their costs "
        f"are mostly their group's: {named}. More calibration windows, or text of another domain, "
        "reach them."
    )


def bank_caution(names: Sequence[str]) -> str | None:
    """That some formats were quantized only where they can win, so never as uniform ones."""
    if not names:
        return None
    return (
        f"The bank is short: {len(names)} formats were quantized only for matrices for which they "
        f"can win near the budget, and not compared with as uniform ones: {', '.join(names)}. "
        "--bank full has all."
    )


def correlation_caution(rho: float, n: int) -> str | None:
    """That a rank correlation of so few pairs settles nothing."""
    found = spearman_interval(rho, n)
    if found is not None and found[1] - found[0] < WIDE_INTERVAL:
        return None
    return f"{n} are too few to judge costs by"


def rho_text(value: float) -> str:
    """A rank correlation; undefined where a side is constant."""
    return "not defined" if math.isnan(value) else f"{value:.3f}"


def rho_interval_text(rho: float, n: int) -> str:
    """The 95 % interval of a rank correlation of n pairs: `0.312 to 0.804`."""
    found = spearman_interval(rho, n)
    return "not defined" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"


def _window_cautions(result: SearchResult) -> list[str]:
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
