"""How long a study goes on, and where its files are."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from alphaquant.errors import ConfigError
from alphaquant.specs.check import Natural, Positive, Share, check

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")

EffortName = Literal["quick", "default", "thorough"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """How much is spent, and where files are.

    All but `effort` may change between the runs of one study.
    """

    effort: EffortName = "default"
    """How much is spent where no numbers are given: quick, default or thorough set the windows of
    the texts, sweeps and starts of the quantizer, what a short bank holds, and trials."""
    time_limit: str | None = None
    """Time for the whole search, such as 90min or 2h: the largest effort whose plan fits is taken,
    none above --effort, and no further trial starts after it; none by default."""
    trials: Positive | None = None
    """Assignments to evaluate, planned ones included; by default as many as the gain that is
    still expected is worth, 48 at most, 10 with --effort quick."""
    recipes: Natural = 0
    """Trials of how best.json is quantized, after the search: damping, shrinkage, Hessians of
    experts, calibration text and rotation, each option alone and then a sampler's; what is better
    on held-out text becomes recipe.json; none by default."""
    timeout: Share | None = None
    """Seconds after which no further trial of the search starts, those of --recipes left out; none
    by default."""
    out: Path = Path("aq-out")
    """Directory of results; the same command resumes in it."""
    overwrite: Annotated[bool, Parameter(negative="")] = False
    """Replace out if it holds a search with other settings."""
    cache: Path | None = None
    """Directory of banks, predictions and copies of weights; default $ALPHAQUANT_CACHE or
    ~/.cache/alphaquant."""
    scratch: Path | None = None
    """Directory on a disk of this machine for copies of what is read often, where the cache is on
    a network file system: prepared weights and the bank; none by default."""
    workers: Positive | None = None
    """Processes of this machine that share the work, one per GPU with --device cuda; by default
    one process does all. Results do not depend on how many."""
    cluster: str | None = None
    """Ray cluster whose nodes share the work: auto, or the address of its head; one worker per
    GPU, or per node where there are none, or --workers in all; none by default."""
    storage: str | None = None
    """Optuna storage: sqlite:///FILE, postgresql://USER@HOST/DATABASE, grpc://HOST:PORT or
    journal:FILE; default study.db in out."""
    artifacts: str | None = None
    """Where trials' configurations go for the dashboard: s3://BUCKET/PREFIX; default the folder
    artifacts in out."""
    study: str = "aq-search"
    """Name of the Optuna study."""

    def __post_init__(self) -> None:
        """Refuse wrong types, negative limits and a study without a name.

        Raises:
            ConfigError: naming the field.
        """
        check(self)
        if self.time_limit is not None:
            duration_seconds(self.time_limit)
        if not self.study.strip():
            raise ConfigError("the study has no name; give study a name, or leave it out")

    @property
    def limit_seconds(self) -> float | None:
        """`time_limit` in seconds."""
        return None if self.time_limit is None else duration_seconds(self.time_limit)


def duration_seconds(text: str) -> float:
    """Seconds of a duration such as `90min`, `2h`, `1.5 h` or `600s`.

    Raises:
        ConfigError: it is none.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"time_limit is {text!r}; give a duration such as 600s, 90min or 2h")
    return float(found[1]) * _UNITS[found[2]]
