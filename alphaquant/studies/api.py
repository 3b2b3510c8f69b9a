"""`alphaquant.search(...)`: a search from Python, with results that a notebook shows.

Settings are named as the fields of `SearchSpec`, `DataSpec`, `ScoreSpec` and `QuantSettings`, in
one flat list, or as the options of aq-search where those have another name (`ALIASES`).
"""

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
import pandas as pd

from alphaquant.errors import ConfigError
from alphaquant.quant.bank import Progress
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.field_types import shown
from alphaquant.studies.gate import HeldoutRow
from alphaquant.studies.loop import OnTrial
from alphaquant.studies.progress import no_progress
from alphaquant.studies.report import summary_text, trials_frame
from alphaquant.studies.report_sections import config_name, origin_of, winner_text
from alphaquant.studies.result import SearchResult
from alphaquant.studies.runner import search as run_search
from alphaquant.studies.spec import DataSpec, ScoreSpec, SearchSpec, quant_settings

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "calibration_samples": "n_calibration",
        "evaluation_samples": "n_evaluation",
        "heldout_samples": "n_heldout",
        "also": "reported",
        "shots": "n_shots",
    }
)
"""Options of aq-search, and the fields that they set."""


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
        rows = [self._front_row(row) for row in self.result.gate.points]
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
            f"<p>{escape(winner_text(self.result))}</p>"
            f"{front.to_html(float_format='{:.6g}'.format, border=0)}"
            f"<p>best: <code>{escape(str(self.best))}</code></p>"
        )

    def _front_row(self, row: HeldoutRow) -> dict[str, Any]:
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
            "origin": origin_of(self.result, row),
            "is_within_budget": row.is_within_budget,
            "is_best": row.digest == self.result.published.digest,
            "config": self.result.folder.path / config_name(row),
        }


def search(
    budget: str,
    *,
    progress: Progress = no_progress,
    on_trial: OnTrial = lambda row: None,
    **settings: Any,
) -> Study:
    """Search formats for a model under a budget: `alphaquant.search("4.25bits", model=DIR)`.

    The same call resumes a search that was stopped, from its `out`.

    Args:
        budget: `4.25bits`, `13GiB`, ...
        progress: called with a stage's name, steps done, steps.
        on_trial: called after each trial.
        **settings: fields of `SearchSpec` (`model`, `out`, `trials`, ...), of its `DataSpec`
            (`calibration`, `n_calibration`, ...), of its `ScoreSpec` (`objectives`, ...) and of
            its `QuantSettings` (`method`, ...), or options of aq-search with underscores
            (`calibration_samples`). `formats` may be a list, paths may be text.

    Raises:
        AlphaQuantError: a setting that does not exist, or bad input.
    """
    spec = make_spec(budget, settings)
    with _quiet_optuna():
        return Study(run_search(spec, progress=progress, on_trial=on_trial))


def make_spec(budget: str, settings: Mapping[str, Any]) -> SearchSpec:
    """The specification of flat settings.

    Raises:
        ConfigError: an unknown name, or a value that makes no sense.
    """
    named = _named(settings)
    own, data, scores, quant = map(_field_names, (SearchSpec, DataSpec, ScoreSpec, QuantSettings))
    known = sorted(own | data | scores | quant | ALIASES.keys())
    for name in named:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ConfigError(f"search has no setting {name!r}; perhaps {', '.join(near)}")
    measured = _part(named, scores)
    if measured and "scores" in named:
        raise ConfigError(f"scores and {', '.join(measured)} are both given; give one of the two")
    whole = {"scores": ScoreSpec(**measured)} if measured else {}
    return SearchSpec(
        budget=budget,
        data=DataSpec(**_part(named, data)),
        quant=quant_settings(**_part(named, quant)),
        **{**_part(named, own), **whole},
    )


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names and with the types of the specification's fields.

    Raises:
        ConfigError: one is given under both of its names, or cannot be of its type.
    """
    twice = [name for name, field in ALIASES.items() if {name, field} <= settings.keys()]
    if twice:
        raise ConfigError(f"{twice[0]} and {ALIASES[twice[0]]} are one setting; give one of them")
    named = {ALIASES.get(name, name): value for name, value in settings.items()}
    for name in ("out", "cache", "model", "latency_table", "task_data"):
        if isinstance(named.get(name), str | os.PathLike):
            text = os.fspath(named[name])
            named[name] = Path(text) if name in ("out", "cache") else text
    formats = named.get("formats")
    if isinstance(formats, list | tuple):
        if not all(isinstance(name, str) for name in formats):
            raise ConfigError(f"formats is {shown(formats)}; give names such as 'int4-g64'")
        named["formats"] = ",".join(formats)
    return named


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without Optuna's own lines about studies and trials; its level is put back."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


_Kind = type[SearchSpec] | type[DataSpec] | type[ScoreSpec] | type[QuantSettings]


def _field_names(kind: _Kind) -> set[str]:
    return {field.name for field in fields(kind)} - {"budget", "data", "quant"}


def _part(settings: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}
