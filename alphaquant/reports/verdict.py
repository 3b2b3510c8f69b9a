"""What a search found, in sentences: the headline of its reports, who won and why that one."""

from dataclasses import dataclass

from alphaquant.reports.bits import of_original
from alphaquant.reports.front import interval_text
from alphaquant.reports.tables import with_error
from alphaquant.studies.gate.intervals import Difference
from alphaquant.studies.gate.judge import SEARCH, Comparison, HeldoutRow
from alphaquant.studies.gate.rules import SAME_SIZE
from alphaquant.studies.gate.winner import best_reason
from alphaquant.studies.result import SearchResult

_MANY_TIMES, _FEW_TIMES = 10, 1.1
"""Ratios from which on tenths say nothing, and below which percents say more."""


@dataclass(frozen=True)
class Headline:
    """A result in three short sentences, for who reads no more than that.

    Attributes:
        claim: how close `best.json` is to the original, beside a uniform format.
        size: of its checkpoint and of the original in bf16.
        perplexity: of the original and of `best.json`; empty where the former is not known.
    """

    claim: str
    size: str
    perplexity: str

    @property
    def text(self) -> str:
        """All of it in one line."""
        return "; ".join(filter(None, (self.claim, self.perplexity, self.size)))


def headline(result: SearchResult) -> Headline:
    """The three sentences of a result; no sentence ends in a full stop.

    Worked example: a KL of 0.001 beside 0.011 of uniform int4-g64 of equal size makes `11 times
    closer to the original than uniform int4-g64 at the same bytes`, and 8.14 MB and a perplexity
    of 56.08 make `8.14 MB of 18.94 MB in bf16` and `perplexity 56.03 -> 56.08`.
    """
    row, before = result.gate.published_row, result.original_perplexity
    perplexity = "" if before is None else f"perplexity {before:.2f} -> {row.perplexity:.2f}"
    return Headline(
        _claim(result), of_original(row.checkpoint_bytes, result.bf16_bytes), perplexity
    )


def sentence(text: str) -> str:
    """The text with a capital at its start, unless that is the name of a file."""
    return text if text.startswith("best.json") else f"{text[0].upper()}{text[1:]}"


def _claim(result: SearchResult) -> str:
    """How close the published assignment is to the original."""
    row, gate = result.gate.published_row, result.gate
    if gate.winner != SEARCH:
        return f"no mix of formats was closer to the original than uniform {row.name} beyond noise"
    if row.rival is None:
        return f"KL {row.kl:.6f} to the original, where no uniform format fits the budget"
    size = _size_text(row.checkpoint_bytes, gate.row(row.rival.name).checkpoint_bytes)
    return f"{_closeness(row.kl, row.rival)} uniform {row.rival.name} {size}"


def _closeness(kl: float, rival: Comparison) -> str:
    """`11 times closer to the original than`; the noise of the text decides which word it is."""
    low, high = rival.difference.low, rival.difference.high
    if low is None or high is None or low <= 0 <= high:
        return "as close to the original, within noise, as"
    closer, lower, higher = low > 0, *sorted((kl, rival.kl))
    word = "closer to" if closer else "farther from"
    if lower == 0:
        return f"{word} the original than"
    ratio = higher / lower
    if ratio < _FEW_TIMES:
        return f"{100 * (ratio - 1):.1f} % {word} the original than"
    return f"{ratio:.{0 if ratio >= _MANY_TIMES else 1}f} times {word} the original than"


def _size_text(n_bytes: int, rival_bytes: int) -> str:
    """The size beside that of a rival: `at the same bytes`, `in 4.0 % fewer bytes`."""
    more = n_bytes / rival_bytes - 1
    if abs(more) <= SAME_SIZE:
        return "at the same bytes"
    return f"in {100 * abs(more):.1f} % {'more' if more > 0 else 'fewer'} bytes"


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
    reason = best_reason([row for row in result.rows if row.bits_per_weight <= result.limit])
    lower = [r for r in gate.rows if r.trial is not None and r.is_within_budget]
    lowest = min(lower, key=lambda row: row.kl)
    if lowest.kl >= gate.best.kl:
        return reason
    return (
        f"{reason}; {lowest.name} has a lower KL on held-out text ({lowest.kl:.6f}), but there "
        "another takes the place of the choice only with no more bits and a lead beyond noise"
    )


def _comparison_text(result: SearchResult, best: HeldoutRow, rival: Comparison) -> str:
    ratio = f"{best.kl / rival.kl:.3f} x " if rival.kl > 0 else "beside "
    outside = "" if rival.name in result.space.menu else ", which is not in --formats"
    return (
        f"{ratio}uniform {rival.name} ({rival.kl:.6f} at {rival.bits_per_weight:.3f} bits"
        f"{outside}), {_difference_text(rival.difference)}"
    )


def _difference_text(difference: Difference) -> str:
    error = "" if difference.stderr is None else f" +- {difference.stderr:.6f}"
    interval = interval_text(difference)
    return f"paired difference {difference.mean:.6f}{error}, 95 % interval {interval}"
