"""A search: everything that `aq-search`, `alphaquant.search` and a file can ask for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.profiles import find_profile, included
from alphaquant.specs.check import check
from alphaquant.specs.checkpoint import CheckpointSpec
from alphaquant.specs.flat import make, subject
from alphaquant.specs.limits import LimitSpec
from alphaquant.specs.proposals import ProposalSpec
from alphaquant.specs.quantizer import RoundingSpec
from alphaquant.specs.run import RunSpec
from alphaquant.specs.scores import ScoreSpec
from alphaquant.specs.texts import TextSpec

_OPEN = frozenset(
    ("calibration_samples", "seq_len", "evaluation_samples", "heldout_samples")
    + ("n_starts", "refine_sweeps", "two_sided")
)
"""Sizes that may be open, as None."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """A search, by subject; the options of everyday come first.

    Attributes:
        limits: the budget, the formats, and limits beside it.
        checkpoint: the model.
        run: how long, and where files are.
        texts: the three texts.
        proposals: how assignments are proposed.
        scores: what is measured of every trial.
        quantizer: how matrices are quantized.
    """

    limits: Annotated[LimitSpec, subject("Budget", 0)]
    checkpoint: Annotated[CheckpointSpec, subject("Model", 1)] = CheckpointSpec()
    run: Annotated[RunSpec, subject("Run", 2)] = RunSpec()
    texts: Annotated[TextSpec, subject("Text", 3)] = TextSpec()
    proposals: Annotated[ProposalSpec, subject("Search", 4)] = ProposalSpec()
    scores: Annotated[ScoreSpec, subject("Scores", 5)] = ScoreSpec()
    quantizer: Annotated[RoundingSpec, subject("Quantizer", 6)] = RoundingSpec()

    @classmethod
    def of(cls, **settings: Any) -> "SearchSpec":
        """The specification of flat settings, named as the options of the command.

        Raises:
            ConfigError: an unknown name, a missing one, or a value that makes no sense.
        """
        return make(cls, settings, "search")

    def __post_init__(self) -> None:
        """Refuse parts of the wrong type.

        Raises:
            ConfigError: naming the part.
        """
        check(self)

    def facts(self) -> dict[str, Any]:
        """What decides the sequence of trials, ready for JSON; equal budgets read the same.

        Of `run` only the effort: how many trials, how long and where files go may change between
        the runs of one study. Sizes that are still open are left out.
        """
        found = {k: v for part, d in asdict(self).items() if part != "run" for k, v in d.items()}
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in found.items()}
        known = {k: v for k, v in plain.items() if v is not None or k not in _OPEN}
        limits, budget = self.limits, parse_budget(self.limits.budget)
        own = {"budget": budget.canonical, "effort": self.run.effort}
        if limits.candidates is None:
            profile = find_profile(limits.profile, limits.kernels)
            own["include"] = ",".join(included(limits.include, budget, profile)) or "none"
        return known | own
