"""The front of a search as rows: what every table of it is made of, in text, HTML and pandas.

A row is a published point with the best uniform format of at most its bits beside it. All numbers
are of the held-out text.
"""

from dataclasses import dataclass

from alphaquant.reports.tables import with_error
from alphaquant.studies.gate.intervals import Difference
from alphaquant.studies.gate.judge import Comparison, HeldoutRow
from alphaquant.studies.result import SearchResult
from alphaquant.studies.trials import UNIFORM

COMPARISON_HEAD = ("its KL", "difference", "95 % interval")
"""Columns of `comparison_cells` behind the name; the interval is that of the difference."""


@dataclass(frozen=True)
class FrontRow:
    """A published point.

    Attributes:
        name: `trial-012`, or a format's name.
        trial: its number; None for a uniform format that is in the place of a point.
        config: file of its configuration in the search's directory.
        origin: where it comes from.
        bits_per_weight: stored bits per quantizable weight.
        checkpoint_bytes: bytes of all tensors.
        kl: nats per token.
        kl_stderr: its standard error over windows.
        same_top: share of positions.
        perplexity: token perplexity.
        rival: the best uniform format of at most its bits; None where there is none.
        is_within_budget: whether it may be `best.json`.
        is_best: whether it is.
    """

    name: str
    trial: int | None
    config: str
    origin: str
    bits_per_weight: float
    checkpoint_bytes: int
    kl: float
    kl_stderr: float
    same_top: float
    perplexity: float
    rival: Comparison | None
    is_within_budget: bool
    is_best: bool

    @property
    def label(self) -> str:
        """Its name, and what is special about it: `trial-012 (best.json)`."""
        notes = ["best.json"] if self.is_best else []
        if not self.is_within_budget:
            notes.append("above the budget")
        return f"{self.name} ({', '.join(notes)})" if notes else self.name

    @property
    def mark(self) -> str:
        """The same in front of a number: `*` for the best, `^` above the budget."""
        return ("*" if self.is_best else "") + ("" if self.is_within_budget else "^")

    @property
    def kl_text(self) -> str:
        """The KL with its standard error."""
        return with_error(self.kl, self.kl_stderr)

    @property
    def megabytes(self) -> str:
        """The size: `8.14`."""
        return f"{self.checkpoint_bytes / 1e6:.2f}"

    @property
    def rival_name(self) -> str:
        """The uniform format beside it, `none` where there is none."""
        return "none" if self.rival is None else self.rival.name

    @property
    def rival_kl(self) -> str:
        """The KL of that, empty where there is none."""
        return "" if self.rival is None else f"{self.rival.kl:.6f}"


def front_rows(result: SearchResult) -> tuple[FrontRow, ...]:
    """The published points by bits."""
    return tuple(_front_row(result, row) for row in result.gate.points)


def _front_row(result: SearchResult, row: HeldoutRow) -> FrontRow:
    return FrontRow(
        name=row.name,
        trial=row.trial,
        config=config_name(row),
        origin=origin_of(result, row),
        bits_per_weight=row.bits_per_weight,
        checkpoint_bytes=row.checkpoint_bytes,
        kl=row.kl,
        kl_stderr=row.kl_stderr,
        same_top=row.same_top,
        perplexity=row.perplexity,
        rival=row.rival,
        is_within_budget=row.is_within_budget,
        is_best=result.gate.is_best(row),
    )


def config_name(row: HeldoutRow) -> str:
    """File of a published point: `configs/trial-012.json`, `configs/uniform-int4-g64.json`."""
    if row.trial is not None:
        return f"configs/trial-{row.trial:03d}.json"
    return f"configs/uniform-{row.name}.json"


def origin_of(result: SearchResult, row: HeldoutRow) -> str:
    """Where a published point comes from."""
    return UNIFORM + row.name if row.trial is None else result.rows[row.trial].origin


def comparison_cells(rival: Comparison | None) -> list[str]:
    """Name, KL, difference and interval of a comparison."""
    if rival is None:
        return ["none", "", "", ""]
    difference = rival.difference
    cells = [rival.name, f"{rival.kl:.6f}", f"{difference.mean:.6f}"]
    return [*cells, interval_text(difference)]


def interval_text(difference: Difference) -> str:
    """The 95 % interval: `0.000800 to 0.001200`."""
    if difference.low is None or difference.high is None:
        return "of one window"
    return f"{difference.low:.6f} to {difference.high:.6f}"
