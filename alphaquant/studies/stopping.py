"""When a search has sampled enough: what is still to be gained is below what can be told.

The rule has the form of Optuna's terminators (Makarova et al., Automatic termination for
hyperparameter optimization, 2022): stop where the room for improvement is less than the error of
the measurement. Theirs are not used: optuna.terminator is deprecated since 4.9, goes with 6, and
is for studies of one objective. Here the room is taken from the trials themselves:

    lead    how far the lowest KL, if a sampled trial has it, is below the lowest of all others
    room    lead * ROUND / n: if the sampled trials could have come in any order, the last of them
            improved by the lead with probability 1 / n and else by nothing; so the next one is
            expected to gain lead / n, and `ROUND` of them that many times it
    error   `NOISE` standard errors of the lead, paired by window, or `LEAST_GAIN` where that is
            more: a smaller lead does not change what a search chooses (`studies/gate/winner.py`)

Both are in parts of the KL. The decision depends on finished trials alone, so a search that is
resumed stops where one that was not interrupted does.

Letters: n sampled trials, W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphaquant.evaluators.base import paired_difference
from alphaquant.studies.gate.winner import NOISE
from alphaquant.studies.store.study import TrialRow

ROUND = 4
"""Sampled trials that are weighed at a time, and the fewest that the rule judges by."""

LEAST_GAIN = 0.01
"""Share of the KL below which a gain is not worth a round of trials, however well it is told."""

N_STAGNANT = 8
"""Sampled trials off the front after which a search of further objectives ends."""

MOST_TRIALS = 48
"""Trials of a search that no rule ends earlier and whose number is not given."""


@dataclass(frozen=True)
class Outlook:
    """What sampling further is worth, in parts of the KL.

    Attributes:
        n_sampled: trials so far that a sampler proposed at the budget.
        room: expected improvement of the next `ROUND` together.
        error: the least lead that counts.
    """

    n_sampled: int
    room: float
    error: float

    @property
    def is_over(self) -> bool:
        """Whether sampling further is not worth it."""
        return self.room <= self.error

    @property
    def text(self) -> str:
        """What is weighed, a sentence without an end."""
        return (
            f"after {self.n_sampled} sampled trials at the budget, {ROUND} more are expected to "
            f"lower the KL by {100 * self.room:.2g} %, and less than {100 * self.error:.2g} % is "
            "noise or not worth them"
        )


def outlook(sampled: Sequence[TrialRow], rows: Sequence[TrialRow]) -> Outlook | None:
    """What sampling further is worth.

    Worked example: a planned trial of KL 1.10, sampled ones of 1.0, 1.2, 1.3, 1.2 and 1.4: the
    lead is 10 %, four more are expected to gain 10 % * 4 / 5 = 8 %. With a standard error of 5 %
    the search ends, with one of 1 % it goes on.

    Args:
        sampled: trials that a sampler proposed at the budget.
        rows: all trials within the budget, those included.

    Returns:
        None while fewer than `ROUND` were sampled.
    """
    n = len(sampled)
    if n < ROUND:
        return None
    complete = sorted((r for r in rows if not r.is_pruned), key=lambda r: (r.kl, r.number))
    if complete[0] not in sampled or len(complete) < 2 or not complete[0].kl:
        return Outlook(n, 0.0, LEAST_GAIN)
    lead, stderr = paired_difference(
        *(torch.tensor(row.kl_per_window) for row in reversed(complete[:2]))
    )
    error = NOISE * stderr / complete[0].kl
    return Outlook(n, ROUND / n * lead / complete[0].kl, max(error, LEAST_GAIN))


def stagnation(is_on_front: Sequence[bool]) -> str | None:
    """Why sampling ends where more than bits and KL are optimized; None where it goes on.

    The room of several objectives has no common unit, so the front itself is looked at.

    Args:
        is_on_front: of each sampled trial in order, whether none beats it.
    """
    if len(is_on_front) < N_STAGNANT or any(is_on_front[-N_STAGNANT:]):
        return None
    return f"none of the last {N_STAGNANT} sampled trials is on the front of all objectives"
