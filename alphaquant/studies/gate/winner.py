"""Which of many trials is the best: the lowest divergence, as far as it can be told from luck."""

from collections.abc import Sequence

import torch

from alphaquant.evaluators.base import paired_difference
from alphaquant.studies.store.study import TrialRow

NOISE = 2.0
"""Standard errors by which a trial must be better to replace an earlier one as the best."""


def best_of(rows: Sequence[TrialRow]) -> TrialRow:
    """The first complete row that none beats by more than the noise of the evaluation text.

    Among many trials the lowest KL is partly luck, and where it is, the same assignment is no
    better on other text (Breiman et al. 1984 choose by one standard error). Trials begin with
    theory, so of those within `NOISE` standard errors of the lowest, paired by window, the first
    is taken.

    Worked example: KL per window (2, 4), (1, 3), (1.5, 2.9): the lowest mean is the second's, the
    third is 0.2 +- 0.3 above it, the first 1 +- 0; the second comes first and is taken.
    """
    complete = sorted((row for row in rows if not row.is_pruned), key=lambda row: row.number)
    lowest = min(complete, key=lambda row: (row.kl, row.bits_per_weight, row.number))
    return next(row for row in complete if row is lowest or _is_as_good(row, lowest))


def best_reason(rows: Sequence[TrialRow]) -> str:
    """Why `best_of` takes the row that it takes, in one sentence without an end.

    Args:
        rows: trials within the budget.
    """
    best = best_of(rows)
    complete = [row for row in rows if not row.is_pruned]
    lowest = min(complete, key=lambda row: (row.kl, row.bits_per_weight, row.number))
    if lowest is best:
        return (
            f"trial {best.number} has the lowest KL of all trials within the budget on the "
            f"evaluation text ({best.kl:.6f})"
        )
    return (
        f"trial {best.number} is the first whose KL on the evaluation text ({best.kl:.6f}) is "
        f"within {NOISE:g} standard errors, paired, of the lowest ({lowest.kl:.6f}, trial "
        f"{lowest.number}): the lowest of many trials is partly luck"
    )


def _is_as_good(row: TrialRow, lowest: TrialRow) -> bool:
    """Whether a row's KL is within the noise of the lowest."""
    found, least = torch.tensor(row.kl_per_window), torch.tensor(lowest.kl_per_window)
    mean, stderr = paired_difference(found, least)
    return mean <= NOISE * stderr
