"""Scores: measured numbers of a model, with everything needed to trust them.

Also the mean over windows that every score is, and the paired comparison of two models. Runs no
model.

Letters: N windows (the sequences of a text, which are the independent samples).
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        metric: `kl`, `same_top`, `perplexity`, ...
        value: the number.
        unit: of the number, e.g. `nats/token`.
        direction: whether less or more is better.
        stderr: standard error of the mean over sequences, which are the independent samples; NaN
            from a single sequence, None for a number that is no mean.
        n_samples: sequences.
        n_tokens: predicted positions.
        seconds: wall time of the measurement (shared by scores of one pass).
        data_digest: sha256 of the token windows.
    """

    metric: str
    value: float
    unit: str
    direction: Direction
    stderr: float | None
    n_samples: int
    n_tokens: int
    seconds: float
    data_digest: str


def mean_and_stderr(per_sequence: Tensor) -> tuple[float, float]:
    """Mean and its standard error over sequences.

    (1, 2, 3, 6) gives 3 and sqrt(14 / 3 / 4) = 1.0801: squares of -2, -1, 0, 3 over N - 1, over N.

    Args:
        per_sequence: one number per sequence, [N].

    Returns:
        (mean, standard error); the error of one sequence is NaN.
    """
    values = per_sequence.double()
    n = values.numel()
    stderr = float(values.std(unbiased=True)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), stderr


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean and standard error of a - b over the same sequences; far sharper than the errors apart.

    Args:
        a: one number per sequence, [N].
        b: the other model's numbers on the same sequences, [N].

    Returns:
        (mean, standard error); the error of one sequence is NaN.
    """
    return mean_and_stderr(a.double() - b.double())
