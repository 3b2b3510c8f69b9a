"""What a search found, as one object: the runner makes it, the report writes it down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphaquant.search.pareto import nondominated
from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.space import SearchSpace
from alphaquant.studies.folder import RunFolder
from alphaquant.studies.gate import GateResult
from alphaquant.studies.spec import SearchSpec
from alphaquant.studies.storage import TrialRow


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        spec: what was asked.
        space: units, menu, budget.
        rows: all complete trials.
        gate: the comparison on held-out text.
        seconds: wall time by stage, of this run.
        n_evaluations: how often the model ran over a text in this run.
        facts: provenance.
        folder: where everything is written.
    """

    spec: SearchSpec
    space: SearchSpace
    rows: tuple[TrialRow, ...]
    gate: GateResult
    seconds: Mapping[str, float]
    n_evaluations: int
    facts: Mapping[str, Any]
    folder: RunFolder

    @property
    def front(self) -> tuple[TrialRow, ...]:
        """The non-dominated trials over (bits, KL), by bits."""
        return front_of(self.rows)

    @property
    def best(self) -> TrialRow:
        """The trial of lowest KL on the evaluation text."""
        return best_of(self.rows)

    @property
    def published(self) -> Assignment:
        """The assignment of `best.json`."""
        return self.gate.published

    @property
    def counts(self) -> BitCount:
        """Bits and bytes of `best.json`."""
        return self.published.count_bits(self.space.inventory)


def front_of(rows: Sequence[TrialRow]) -> tuple[TrialRow, ...]:
    """The exact non-dominated set over (bits, KL), by bits; of equal points the first."""
    mask = nondominated(np.array([[r.bits_per_weight, r.kl] for r in rows]))
    kept = [row for row, keep in zip(rows, mask, strict=True) if keep]
    return tuple(sorted(kept, key=lambda r: r.bits_per_weight))


def best_of(rows: Sequence[TrialRow]) -> TrialRow:
    """The row of the lowest KL; of equal ones the smallest, then the first."""
    return min(rows, key=lambda r: (r.kl, r.bits_per_weight, r.number))
