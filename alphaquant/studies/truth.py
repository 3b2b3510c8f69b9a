"""The true divergence of choices, arrays instead of assignments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alphaquant.search.arrays import FloatArray, IntArray
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.objective import SearchObjective
from alphaquant.studies.rounds import Steps, tell_nobody


@dataclass(frozen=True)
class ChoiceTruth:
    """Measures choices on the evaluation text.

    Attributes:
        objective: measures assignments, and remembers what it measured.
        spread: the assignment of a choice, int64 [U].
    """

    objective: SearchObjective
    spread: Callable[[IntArray], Assignment]

    @property
    def n_windows(self) -> int:
        """Windows of the evaluation text."""
        return self.objective.n_windows

    def measure(self, choice: IntArray, n_windows: int) -> FloatArray:
        """KL of the first windows, float64 [n_windows]."""
        found = self.objective.measure(self.spread(choice), n_windows)
        return np.asarray(found.kl.double().numpy(), dtype=np.float64)

    def measure_together(
        self, choices: Sequence[IntArray], n_windows: int, tell: Steps = tell_nobody
    ) -> None:
        """Measure many at once, so that `measure` finds them.

        Args:
            choices: int64 [U] each.
            n_windows: how many of the first windows.
            tell: told how much of the work is done.
        """
        self.objective.measure_together([self.spread(c) for c in choices], n_windows, tell)
