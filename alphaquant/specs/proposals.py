"""How assignments are proposed."""

from dataclasses import dataclass
from typing import Literal

from alphaquant.specs.check import Natural, check

Mode = Literal["knobs", "groups"]
Grouping = Literal["layer", "utilization"]
BankName = Literal["auto", "full", "short"]
SamplerName = Literal["tpe", "gp", "nsga2", "random"]


@dataclass(frozen=True, kw_only=True)
class ProposalSpec:
    """Which assignments are evaluated, in which order."""

    mode: Mode = "knobs"
    """What is sampled: knobs of the allocator, or groups: formats of groups of units."""
    grouping: Grouping = "layer"
    """Units that share a format in mode groups: layer (and role), utilization."""
    allocator: str | None = None
    """Run one allocator alone, beside uniform formats: blend, fisher, token-fisher, error,
    utilization, random, uniform, alpha-hill, alphaq, pmq, gemq, prismaquant or evolution; none
    by default."""
    allocators: str = ""
    """Allocators among the first trials, of the same names, comma-separated; all: every published
    and plain one but random and evolution; none by default."""
    bank: BankName = "auto"
    """What is quantized: full: every matrix in every format; short: in a few formats, then in
    those that can win; auto: short from 10^8 quantizable weights on."""
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

    @property
    def allocator_names(self) -> tuple[str, ...]:
        """The names in `allocators`."""
        return tuple(name.strip() for name in self.allocators.split(",") if name.strip())
