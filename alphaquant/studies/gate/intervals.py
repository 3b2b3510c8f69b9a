"""How sure a difference between two models on the same windows is.

Windows are the independent samples, and both models are measured on the same ones, so the
difference per window is what is averaged, given an error and resampled.

Letters: N windows, R resamples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from torch import Tensor

from alphaquant.evaluators.base import paired_difference
from alphaquant.search.arrays import FloatArray

LEVEL = 0.95
N_RESAMPLES = 10_000
_SEED = 0
_MOST_RHO = 0.999999
"""A correlation of 1 would have no interval on the transformed scale."""


@dataclass(frozen=True)
class Difference:
    """KL of a rival minus KL of a row over the same windows: above 0 where the row is better.

    Attributes:
        mean: nats per token.
        stderr: standard error of the mean; None of a single window.
        low: lower end of the 95 % bootstrap interval of the mean; None of a single window.
        high: upper end.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None


def compare_kl(kl: Tensor, rival: Tensor, domains: Sequence[str]) -> Difference:
    """Compare a row with a rival.

    Args:
        kl: of the row, per window [N].
        rival: of the rival, on the same windows [N].
        domains: of the windows, N names.
    """
    mean, stderr = paired_difference(rival, kl)
    if len(kl) == 1:
        return Difference(mean, None, None, None)
    differences = (rival.double() - kl.double()).numpy(force=True)
    low, high = bootstrap_interval(differences, domains)
    return Difference(mean, stderr, low, high)


def bootstrap_interval(values: FloatArray, domains: Sequence[str]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean, stratified by domain.

    Every resample draws from each domain as many windows as it has, with replacement. Domains of
    one window are one stratum together. The draws have a fixed seed.

    Args:
        values: one per window, float64 [N].
        domains: of the windows, N names.

    Returns:
        The 2.5 % and the 97.5 % quantile of the means of `N_RESAMPLES` resamples.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    rng = np.random.default_rng(_SEED)
    sizes = Counter(domains)
    strata = np.array([name if sizes[name] > 1 else "" for name in domains])
    sums = np.zeros(N_RESAMPLES)
    for stratum in dict.fromkeys(strata.tolist()):
        inside = values[strata == stratum]
        draws = rng.integers(len(inside), size=(N_RESAMPLES, len(inside)))
        sums += inside[draws].sum(axis=1)  # [R, n] -> [R]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(sums / len(values), (tail, 1 - tail))
    return float(low), float(high)


def spearman_interval(rho: float, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a rank correlation, by Fisher's transformation.

    Worked example: 0.5 of 28 pairs: atanh 0.549, error sqrt(1.125 / 25) = 0.212, so 0.133 to
    0.747.

    Args:
        rho: Spearman's.
        n: pairs.

    Returns:
        Both ends; None where rho is not defined or of fewer than 4 pairs.

    Source:
        Bonett and Wright, Sample size requirements for estimating Pearson, Kendall and Spearman
        correlations, Psychometrika 65, 2000: the variance (1 + rho^2 / 2) / (n - 3).
    """
    if math.isnan(rho) or n < 4:
        return None
    at = math.atanh(max(-_MOST_RHO, min(_MOST_RHO, rho)))
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(at - half), math.tanh(at + half)
