"""`alphaquant.search(...)`: a search from Python, with results that a notebook shows.

Settings have the names of aq-search's options, in one flat list (`alphaquant.specs.flat`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from alphaquant.commands.search import search as run_search
from alphaquant.progress import Progress, no_progress
from alphaquant.reports.front import FrontRow, front_rows
from alphaquant.reports.report import summary_text, trials_frame
from alphaquant.reports.verdict import headline, winner_text
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.flat import read_file
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.loop import OnTrial
from alphaquant.studies.result import SearchResult


@dataclass(frozen=True)
class Study:
    """A finished search; as the last line of a notebook's cell it shows its front.

    Attributes:
        result: everything that was found, as the reports see it.
    """

    result: SearchResult

    @property
    def front(self) -> pd.DataFrame:
        """The published points by size: what `front.json` and `report.md` say of them.

        One row per point, indexed by its name: `bits_per_weight`, `checkpoint_bytes`, `kl` and
        `kl_stderr` (nats per token, held-out text), `uniform` (the best uniform format of at most
        its bits) and `uniform_kl`, `difference` (that KL minus the point's) with its 95 % interval
        `low` to `high`, `same_top`, `perplexity`, `origin`, `is_within_budget`, `is_best`,
        `config` (path).
        """
        rows = [self._front_row(row) for row in front_rows(self.result)]
        return pd.DataFrame(rows).set_index("name")

    @property
    def trials(self) -> pd.DataFrame:
        """Every trial, as in `trials.csv`; numbers are of the evaluation text."""
        return trials_frame(self.result).set_index("number")

    @property
    def best(self) -> Path:
        """`best.json`: the configuration for the budget, input of `alphaquant.quantize`."""
        return self.result.folder.path / "best.json"

    @property
    def assignment(self) -> Assignment:
        """The formats of `best.json`, matrix by matrix."""
        return self.result.published

    def __str__(self) -> str:
        """What the command prints."""
        return summary_text(self.result)

    def _repr_html_(self) -> str:
        front = self.front.drop(columns=["config", "checkpoint_bytes"])
        return (
            f"<p><b>{escape(headline(self.result).text)}</b></p>"
            f"<p>{escape(winner_text(self.result))}</p>"
            f"{front.to_html(float_format='{:.6g}'.format, border=0)}"
            f"<p>best: <code>{escape(str(self.best))}</code></p>"
        )

    def _front_row(self, row: FrontRow) -> dict[str, Any]:
        rival = row.rival
        difference = None if rival is None else rival.difference
        return {
            "name": row.name,
            "bits_per_weight": row.bits_per_weight,
            "checkpoint_bytes": row.checkpoint_bytes,
            "kl": row.kl,
            "kl_stderr": row.kl_stderr,
            "uniform": None if rival is None else rival.name,
            "uniform_kl": None if rival is None else rival.kl,
            "difference": None if difference is None else difference.mean,
            "low": None if difference is None else difference.low,
            "high": None if difference is None else difference.high,
            "same_top": row.same_top,
            "perplexity": row.perplexity,
            "origin": row.origin,
            "is_within_budget": row.is_within_budget,
            "is_best": row.is_best,
            "config": self.result.folder.path / row.config,
        }


def search(
    budget: str | float | None = None,
    *,
    spec: str | Path | None = None,
    progress: Progress = no_progress,
    on_trial: OnTrial = lambda row: None,
    **settings: Any,
) -> Study:
    """Search formats for a model under a budget: `alphaquant.search("4.25bits", model=DIR)`.

    The same call resumes a search that was stopped, from its `out`.

    Args:
        budget: `4.25bits`, `13GiB`, or bits per weight as a number.
        spec: TOML file of options, as `aq-search --spec` takes it; what is given beside it wins.
        progress: called with a stage's name, steps done, steps.
        on_trial: called after each trial.
        **settings: the options of aq-search with underscores: `model`, `out`, `trials`,
            `calibration_samples`, ... (fields of `SearchSpec` and its parts). `formats` and
            `objectives` may be lists, paths may be text.

    Raises:
        AlphaQuantError: a setting that does not exist, or bad input.
    """
    given = settings if budget is None else {"budget": budget, **settings}
    asked = SearchSpec.of(**{**({} if spec is None else read_file(spec)), **given})
    with _quiet_optuna():
        return Study(run_search(asked, progress=progress, on_trial=on_trial))


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without Optuna's own lines about studies and trials; its level is put back."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
