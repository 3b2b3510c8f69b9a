"""Scores: measured numbers of a model, with everything needed to trust them."""

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
        stderr: standard error of the mean over sequences, which are the independent samples; None where not defined.
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
    """Mean and its standard error over sequences, from one number per sequence [N]; the error of one sequence is NaN."""
    values = per_sequence.double()
    n = values.numel()
    stderr = float(values.std(unbiased=True)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), stderr


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean and standard error of a - b over the same sequences, [N] each; far sharper than the two errors apart."""
    return mean_and_stderr(a.double() - b.double())
