"""How assignments are proposed."""

from dataclasses import dataclass
from typing import Literal

from alphaquant.specs.check import Natural, check

Mode = Literal["auto", "knobs", "groups"]
Grouping = Literal["layer", "utilization"]
SamplerName = Literal["tpe", "gp", "nsga2", "random"]


@dataclass(frozen=True, kw_only=True)
class ProposalSpec:
    """Which assignments are evaluated, in which order."""

    mode: Mode = "auto"
    """auto or knobs: sampled knobs of the allocator; groups: sampled formats of groups of
    units."""
    grouping: Grouping = "layer"
    """Units that share a format in mode groups: layer (and role), utilization."""
    sampler: SamplerName = "tpe"
    """Optuna sampler: tpe, gp, nsga2, random."""
    seed: Natural = 0
    """Seed of text windows, labels and proposals."""

    def __post_init__(self) -> None:
        """Refuse wrong types and unknown names.

        Raises:
            ConfigError: naming the field.
        """
        check(self)
